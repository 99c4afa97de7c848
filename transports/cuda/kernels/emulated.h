// Enough of CUDA for walk.cu to run on a processor, one lane after another: the tests compare it with the definition of a program.
#include <stdint.h>
#include <string.h>
#define KVFERRY_EMULATED
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n)
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct uint2 {
    unsigned x, y;
} __attribute__((aligned(8)));
struct Dimensions {
    unsigned x;
};
static Dimensions threadIdx, blockIdx, blockDim, gridDim;
static unsigned long long misaligned;
template <typename V> static V __ldcs(const V *at) {
    if ((uintptr_t)at % sizeof(V))
        misaligned++;
    V value;
    __builtin_memcpy(&value, at, sizeof(V));
    return value;
}
template <typename V> static void __stcs(V *at, V value) {
    if ((uintptr_t)at % sizeof(V))
        misaligned++;
    __builtin_memcpy(at, &value, sizeof(V));
}
static unsigned atomicAdd(unsigned *at, unsigned value) {
    const unsigned before = *at;
    *at += value;
    return before;
}
// Every look at the clock is a millisecond after the one before.
static unsigned long long nanoseconds() {
    static unsigned long long now;
    return now += 1000000;
}
static void __syncthreads() {}
static uint4 __ldcv(const uint4 *at) { return *at; }
static void __threadfence() {}
static void __threadfence_system() {}

#include "walk.cu"

// Whether the launch is there before its order, and whether that never comes.
enum StandingBy { NOT, ORDERED, IN_VAIN };

// Runs a walking kernel, and says how many accesses were not aligned as a GPU needs them, and whether its end was not told as it should be.
extern "C" unsigned long long emulate(const unsigned char *payload, unsigned rectangles, unsigned items, unsigned blocks, unsigned warps,
                                      unsigned argument_bytes, bool is_even, StandingBy standing_by) {
    misaligned = 0;
    gridDim.x = blocks;
    blockDim.x = warps * 32;
    static Payload<SMALL_BYTES> small;
    static Payload<INLINE_BYTES> argument;
    unsigned ended = 0, flags[FLAGS + 1] = {}, arrived = 0, given_up = 0;
    const Done done = {&ended, flags, 7};
    struct alignas(16) Order {
        u8 bytes[ORDER_PAYLOAD + INLINE_BYTES];
    };
    static Order order, passed;
    memset(&passed, 0, sizeof passed);
    memcpy(order.bytes + ORDER_PAYLOAD, payload, standing_by ? argument_bytes : 0);
    // One that is not for this launch is no order.
    *(u64 *)order.bytes = order_word(standing_by == IN_VAIN ? 6 : 7, rectangles, argument_bytes / sizeof(uint4));
    const Standby standby = {order.bytes, &arrived, passed.bytes, &given_up, 0, done};
    if (argument_bytes == SMALL_BYTES)
        __builtin_memcpy(small.bytes, payload, SMALL_BYTES);
    else if (argument_bytes == INLINE_BYTES)
        __builtin_memcpy(argument.bytes, payload, INLINE_BYTES);
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) {
            if (standing_by)
                kvferry_even_standby(standby);
            else if (argument_bytes == SMALL_BYTES)
                (is_even ? kvferry_even_small : kvferry_walk_small)(small, rectangles, items, done);
            else if (argument_bytes == INLINE_BYTES)
                (is_even ? kvferry_even_inline : kvferry_walk_inline)(argument, rectangles, items, done);
            else
                (is_even ? kvferry_even : kvferry_walk)(payload, rectangles, items, done);
        }
    const unsigned told = standing_by == IN_VAIN ? 0 : blocks <= FLAGS ? blocks : 1;
    misaligned += given_up != (standing_by == IN_VAIN ? 7 : 0);
    for (unsigned flag = 0; flag <= FLAGS; flag++)
        misaligned += flags[flag] != (flag < told ? 7 : 0);
    return misaligned + ended + arrived;
}

// Runs the kernels of known blocks: writes them where `wrong` is null, bits of `flip` the other way round, else counts bytes that differ.
extern "C" void emulate_known(const KnownBlock *blocks, const KnownRun *runs, unsigned count, unsigned long long flip, unsigned *wrong,
                              unsigned grid, unsigned warps) {
    gridDim.x = grid;
    blockDim.x = warps * 32;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) {
            if (wrong)
                kvferry_count_unknown(blocks, runs, count, wrong);
            else
                kvferry_write_known(blocks, runs, count, flip);
        }
}
