// Walks a program on the GPU: every warp finds its own pieces from block tables and strides, so one launch moves any number of them.
//
// The host cuts a launch into rectangles (see src/rectangle.rs, whose structs these mirror): planes x cells of tokens. A cell lies in one block
// on either side; its bytes, in the order of the merged nest, are cut into chunks (items), and one warp moves one chunk at a time. Whatever
// the order of chunks, each destination byte is written once.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define CHUNK 4096u
#define BATCH 8
#define WARPS_MAX 32
#define INLINE_BYTES 3840
#define SMALL_BYTES 1024

// One plane of a pool: block b lies at base + b * stride.
struct Plane {
    u64 base;
    u64 stride;
};

struct Side {
    const Plane *planes;
    u64 token_pitch;
    u64 head_pitch;
    u64 offset;
    u32 plane;
    u32 plane_step;
    // Word of the payload's tables that stands for the request's (or this rank's) block number 0; wraps.
    u32 table;
    u32 block_tokens;
    u32 cp;
    u32 cp_rank;
};

struct Rectangle {
    Side source;
    Side destination;
    // Items of the launch before the end of this rectangle.
    u32 items_end;
    u32 plane;
    u32 token_start;
    u32 token_end;
    u32 cell_tokens;
    u32 cells;
    u32 cells_per_block;
    // First own block of the side whose blocks are enumerated.
    u32 first_block;
    u32 chunks;
    u32 heads;
    u32 run_bytes;
    // Bit 0: the destination's blocks are enumerated. Bit 1: tokens are the inner dimension.
    u32 flags;
};

template <u32 BYTES> struct alignas(16) Payload {
    u8 bytes[BYTES];
};

template <typename V> __device__ __forceinline__ V load(const u8 *at) { return __ldcs((const V *)at); }
template <typename V> __device__ __forceinline__ void store(u8 *at, V value) { __stcs((V *)at, value); }

// A whole aligned chunk, by one warp. Nearly every byte takes this path: it alone is inlined, so that it has the registers to itself.
__device__ __forceinline__ void whole_chunk(const u8 *from, u8 *to, u32 lane) {
    from += lane * sizeof(uint4);
    to += lane * sizeof(uint4);
    uint4 held[CHUNK / (32 * sizeof(uint4))];
#pragma unroll
    for (u32 j = 0; j < CHUNK / (32 * sizeof(uint4)); j++)
        held[j] = load<uint4>(from + j * 32 * sizeof(uint4));
#pragma unroll
    for (u32 j = 0; j < CHUNK / (32 * sizeof(uint4)); j++)
        store<uint4>(to + j * 32 * sizeof(uint4), held[j]);
}

// A contiguous chunk, by one warp: BATCH vectors of each lane are under way at once.
template <typename V> __device__ __noinline__ void line(const u8 *from, u8 *to, u32 bytes, u32 lane) {
    const u32 count = bytes / sizeof(V);
    for (u32 base = lane; base < count; base += 32 * BATCH) {
        V held[BATCH];
#pragma unroll
        for (u32 j = 0; j < BATCH; j++)
            if (base + 32 * j < count)
                held[j] = load<V>(from + (u64)(base + 32 * j) * sizeof(V));
#pragma unroll
        for (u32 j = 0; j < BATCH; j++)
            if (base + 32 * j < count)
                store<V>(to + (u64)(base + 32 * j) * sizeof(V), held[j]);
    }
}

// What is left of a cell's nest after merging: outer x inner runs.
struct Nest {
    u64 run;
    u32 inner;
    u64 inner_source, inner_destination;
    u64 outer_source, outer_destination;
    bool is_flat;
};

// A chunk of several runs, by one warp. `within` bytes of run `first` come before it.
template <typename V>
__device__ __noinline__ void runs(const u8 *from, u8 *to, const Nest &nest, u32 first, u64 within, u32 bytes, u32 lane) {
    const u32 count = bytes / sizeof(V);
    for (u32 base = lane; base < count; base += 32 * 4) {
        V held[4];
        u8 *places[4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u32 index = base + 32 * j;
            if (index < count) {
                const u64 at = within + (u64)index * sizeof(V);
                // A run that is longer than a chunk ends at most once in it.
                const u32 skipped = nest.run > CHUNK ? (u32)(at >= nest.run) : (u32)at / (u32)nest.run;
                const u64 byte = at - skipped * nest.run;
                const u32 run = first + skipped;
                const u32 outer = nest.is_flat ? 0 : run / nest.inner;
                const u32 inner = nest.is_flat ? run : run - outer * nest.inner;
                held[j] = load<V>(from + outer * nest.outer_source + inner * nest.inner_source + byte);
                places[j] = to + outer * nest.outer_destination + inner * nest.inner_destination + byte;
            }
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++)
            if (base + 32 * j < count)
                store<V>(places[j], held[j]);
    }
}

// What one warp moves at a time.
struct Piece {
    const u8 *from;
    u8 *to;
    // 0: nothing.
    u32 bytes;
    // Whether it is one contiguous run on both sides; else `within` bytes of run `first` of the nest come before it, and `from` and `to` are
    // the nest's beginning.
    bool is_line;
    u32 first;
    u64 within;
    Nest nest;
};

// Chunk `number` of a cell of `tokens` tokens that begins at `from` and `to`.
__device__ __forceinline__ void chunk(const Rectangle &rectangle, u32 tokens, u32 number, u64 from, u64 to, Piece *piece) {
    const bool token_inner = rectangle.flags & 2;
    u32 inner = token_inner ? tokens : rectangle.heads;
    u32 outer = token_inner ? rectangle.heads : tokens;
    Nest &nest = piece->nest;
    nest.run = rectangle.run_bytes;
    nest.inner_source = token_inner ? rectangle.source.token_pitch : rectangle.source.head_pitch;
    nest.inner_destination = token_inner ? rectangle.destination.token_pitch : rectangle.destination.head_pitch;
    nest.outer_source = token_inner ? rectangle.source.head_pitch : rectangle.source.token_pitch;
    nest.outer_destination = token_inner ? rectangle.destination.head_pitch : rectangle.destination.token_pitch;
#pragma unroll
    for (u32 pass = 0; pass < 2; pass++) {
        if (inner == 1 || (nest.inner_source == nest.run && nest.inner_destination == nest.run)) {
            nest.run *= inner;
            inner = outer;
            nest.inner_source = nest.outer_source;
            nest.inner_destination = nest.outer_destination;
            outer = 1;
        }
    }
    nest.inner = inner;
    nest.is_flat = outer == 1;
    const u32 count = inner * outer;
    const u64 total = nest.run * count;
    const u64 start = (u64)number * CHUNK;
    // A cell that the request fills only in part has fewer chunks.
    if (start >= total)
        return;
    const u32 bytes = total - start < CHUNK ? (u32)(total - start) : CHUNK;
    u32 first = 0;
    u64 within = start;
    if (count > 1) {
        first = (total >> 32) ? (u32)(start / nest.run) : (u32)start / (u32)nest.run;
        within = start - first * nest.run;
    }
    piece->is_line = within + bytes <= nest.run;
    if (piece->is_line) {
        const u32 row = nest.is_flat ? 0 : first / inner;
        const u32 column = first - row * inner;
        from += row * nest.outer_source + column * nest.inner_source + within;
        to += row * nest.outer_destination + column * nest.inner_destination + within;
    }
    piece->from = (const u8 *)from;
    piece->to = (u8 *)to;
    piece->bytes = bytes;
    piece->first = first;
    piece->within = within;
}

// Where the first head of `token` lies on one side, `false` if that side does not hold it.
__device__ __forceinline__ bool locate(const Side &side, const u32 *tables, u32 layer, u32 token, u64 *address) {
    const u32 block = token / side.block_tokens;
    u32 own = block;
    if (side.cp > 1) {
        own = block / side.cp;
        if (block - own * side.cp != side.cp_rank)
            return false;
    }
    const Plane plane = side.planes[side.plane + layer * side.plane_step];
    const u32 slot = tables[side.table + own];
    *address = plane.base + slot * plane.stride + side.offset + (token - block * side.block_tokens) * side.token_pitch;
    return true;
}

// A launch, as every thread sees it.
struct Launch {
    const Rectangle *rectangles;
    const u32 *tables;
    u32 items;
};

// The piece that an item stands for. `at` is a rectangle at or before the item's, and becomes the item's.
__device__ __forceinline__ Piece find(const Launch &launch, u32 item, u32 *at) {
    Piece piece;
    piece.from = 0;
    piece.to = 0;
    piece.bytes = 0;
    piece.is_line = true;
    if (item >= launch.items)
        return piece;
    while (item >= launch.rectangles[*at].items_end)
        ++*at;
    const Rectangle &rectangle = launch.rectangles[*at];
    u32 rest = item - (*at ? launch.rectangles[*at - 1].items_end : 0), number = 0;
    if (rectangle.chunks > 1) {
        const u32 cell = rest / rectangle.chunks;
        number = rest - cell * rectangle.chunks;
        rest = cell;
    }
    const u32 row = rest / rectangle.cells;
    const u32 cell = rest - row * rectangle.cells;
    const u32 layer = rectangle.plane + row;
    const Side &driver = rectangle.flags & 1 ? rectangle.destination : rectangle.source;
    u32 block = cell, inside = 0;
    if (rectangle.cells_per_block > 1) {
        block = cell / rectangle.cells_per_block;
        inside = (cell - block * rectangle.cells_per_block) * rectangle.cell_tokens;
    }
    const u64 first = (u64)((rectangle.first_block + block) * driver.cp + driver.cp_rank) * driver.block_tokens + inside;
    const u64 last = first + rectangle.cell_tokens;
    const u32 token = first < rectangle.token_start ? rectangle.token_start : (u32)first;
    const u32 until = last > rectangle.token_end ? rectangle.token_end : (u32)last;
    if (first >= rectangle.token_end || until <= token)
        return piece;
    u64 from, to;
    if (locate(rectangle.source, launch.tables, layer, token, &from) &&
        locate(rectangle.destination, launch.tables, layer, token, &to))
        chunk(rectangle, until - token, number, from, to, &piece);
    return piece;
}

// What a lane found for its whole warp: bytes, and the logarithm of the vectors' length above them.
struct Move {
    u64 from;
    u64 to;
    u32 shape;
};

#define SHAPE_SHIFT 16
#define SCATTERED 5u
#define WHOLE (CHUNK | 4u << SHAPE_SHIFT)

// The longest vectors, at most 16 bytes, that whatever these bits are made of is a multiple of.
__device__ __forceinline__ u32 vector(u32 odd) { return !(odd & 15) ? 4 : !(odd & 7) ? 3 : !(odd & 3) ? 2 : !(odd & 1) ? 1 : 0; }

// Not inlined, that its registers are not taken from the copies.
__device__ __noinline__ void plan(const Rectangle *rectangles, const u32 *tables, u32 items, u32 item, u32 *at, Move *move) {
    const Launch launch = {rectangles, tables, items};
    const Piece piece = find(launch, item, at);
    move->from = (u64)piece.from;
    move->to = (u64)piece.to;
    const u32 kind = piece.is_line ? vector((u32)(u64)piece.from | (u32)(u64)piece.to | piece.bytes) : SCATTERED;
    move->shape = piece.bytes == 0 ? 0 : piece.bytes | kind << SHAPE_SHIFT;
}

// A chunk that is not whole, or not aligned.
__device__ __noinline__ void line_of(u64 from, u64 to, u32 shape, u32 lane) {
    const u8 *source = (const u8 *)from;
    u8 *destination = (u8 *)to;
    const u32 bytes = shape & ((1u << SHAPE_SHIFT) - 1);
    switch (shape >> SHAPE_SHIFT) {
    case 4:
        return line<uint4>(source, destination, bytes, lane);
    case 3:
        return line<uint2>(source, destination, bytes, lane);
    case 2:
        return line<u32>(source, destination, bytes, lane);
    case 1:
        return line<u16>(source, destination, bytes, lane);
    default:
        return line<u8>(source, destination, bytes, lane);
    }
}

// A chunk of several runs: every lane needs all of its nest, which each finds again.
__device__ __noinline__ void scattered(const Rectangle *rectangles, const u32 *tables, u32 item, u32 lane) {
    const Launch launch = {rectangles, tables, item + 1};
    u32 at = 0;
    const Piece piece = find(launch, item, &at);
    const Nest &nest = piece.nest;
    u32 odd = (u32)(u64)piece.from | (u32)(u64)piece.to | (u32)nest.run | (u32)nest.inner_source | (u32)nest.inner_destination;
    if (!nest.is_flat)
        odd |= (u32)nest.outer_source | (u32)nest.outer_destination;
    switch (vector(odd)) {
    case 4:
        return runs<uint4>(piece.from, piece.to, nest, piece.first, piece.within, piece.bytes, lane);
    case 3:
        return runs<uint2>(piece.from, piece.to, nest, piece.first, piece.within, piece.bytes, lane);
    case 2:
        return runs<u32>(piece.from, piece.to, nest, piece.first, piece.within, piece.bytes, lane);
    case 1:
        return runs<u16>(piece.from, piece.to, nest, piece.first, piece.within, piece.bytes, lane);
    default:
        return runs<u8>(piece.from, piece.to, nest, piece.first, piece.within, piece.bytes, lane);
    }
}

// With few thread blocks the instructions between two chunks are what a launch waits for. So the 32 lanes of a warp plan its next 32 items
// at once, and then all of them move one after another.
__device__ __forceinline__ void walk(const u8 *payload, u32 rectangles, u32 items) {
    __shared__ Move plans[WARPS_MAX][32];
    const u32 lane = threadIdx.x & 31, stride = blockDim.x >> 5;
    // Every thread block has items of its own, one behind the other: few planes, and few pages for its address translation.
    const u32 share = (items + gridDim.x - 1) / gridDim.x, start = blockIdx.x * share;
    const u32 end = items < start + share ? items : start + share;
    const Rectangle *first = (const Rectangle *)payload;
    const u32 *tables = (const u32 *)(first + rectangles);
    Move *moves = plans[threadIdx.x >> 5];
    u32 at = 0;
    for (u32 base = start + (threadIdx.x >> 5); base < end; base += 32 * stride) {
#ifdef KVFERRY_EMULATED
        // Lanes run one after another there: each plans for all.
        for (u32 turn = 0; turn < 32; turn++) {
            at = 0;
            plan(first, tables, end, base + turn * stride, &at, &moves[turn]);
        }
#else
        // Not before every lane has read the plans of the last round.
        __syncwarp();
        plan(first, tables, end, base + lane * stride, &at, &moves[lane]);
        __syncwarp();
#endif
        // No call is in this loop, so that all of it stays in registers.
        u32 others = 0;
#pragma unroll 1
        for (u32 turn = 0; turn < 32; turn++) {
            const Move move = moves[turn];
            if (move.shape == WHOLE)
                whole_chunk((const u8 *)move.from, (u8 *)move.to, lane);
            else
                others += move.shape != 0;
        }
#pragma unroll 1
        for (u32 turn = 0; others != 0 && turn < 32; turn++) {
            const Move move = moves[turn];
            if (move.shape == WHOLE || move.shape == 0)
                continue;
            if (move.shape >> SHAPE_SHIFT == SCATTERED)
                scattered(first, tables, base + turn * stride, lane);
            else
                line_of(move.from, move.to, move.shape, lane);
        }
    }
}

// --- Even pieces: whole 16-byte vectors, equally long and, on either side, in the same places of every plane. ---
//
// Most programs are nothing else, and what a short launch waits for first is code and tables that are cold. So this walk is short, and what
// it is told are arguments: the places of a plane's pieces, and strides.

// Bytes that a warp moves at a time: eight vectors of each lane are under way at once.
#ifndef SHARE
#define SHARE 4096u
#endif

struct EvenSide {
    // Of the first plane; or what is added to the bases in `table`.
    u64 base;
    // Bytes from plane to plane; or from entry to entry of the table.
    u64 step;
    // Bases of planes that do not follow each other evenly; else null.
    const u8 *table;
};

// Planes x pieces.
struct Even {
    EvenSide source;
    EvenSide destination;
    u32 items;
    // Of a piece.
    u32 bytes;
    u32 shares;
    // Of a plane.
    u32 pieces;
    // Word pair of the payload that is the first piece's places.
    u32 first;
    // Division by `shares` and by `pieces`: times this, shifted by bits 0 to 7 and 8 to 15 of `shifts`.
    u32 of_shares;
    u32 of_pieces;
    u32 shifts;
};

// Where a piece lies in its plane, in vectors.
struct alignas(8) Places {
    u32 source;
    u32 destination;
};

__device__ __forceinline__ u32 quotient(u32 number, u32 factor, u32 shift) { return (u32)((u64)number * factor >> shift); }

__device__ __forceinline__ u64 plane_of(const EvenSide &side, u32 plane) {
    const u64 at = plane * side.step;
    return side.base + (side.table ? *(const u64 *)(side.table + at) : at);
}

__device__ __forceinline__ void even_share(const Even &even, const Places *places, u32 item, u32 lane) {
    const u32 number = quotient(item, even.of_shares, even.shifts & 255), share = item - number * even.shares;
    const u32 plane = quotient(number, even.of_pieces, even.shifts >> 8), piece = number - plane * even.pieces;
    const Places at = places[even.first + piece];
    const u32 start = share * SHARE + lane * (u32)sizeof(uint4);
    const u8 *from = (const u8 *)(plane_of(even.source, plane) + at.source * (u64)sizeof(uint4) + start);
    u8 *to = (u8 *)(plane_of(even.destination, plane) + at.destination * (u64)sizeof(uint4) + start);
    uint4 held[SHARE / (32 * sizeof(uint4))];
#pragma unroll
    for (u32 j = 0; j < SHARE / (32 * sizeof(uint4)); j++)
        if (start + j * 32 * (u32)sizeof(uint4) < even.bytes)
            held[j] = load<uint4>(from + j * 32 * sizeof(uint4));
#pragma unroll
    for (u32 j = 0; j < SHARE / (32 * sizeof(uint4)); j++)
        if (start + j * 32 * (u32)sizeof(uint4) < even.bytes)
            store<uint4>(to + j * 32 * sizeof(uint4), held[j]);
}

// All warps of the launch take shares in turn, from one rectangle to the next.
__device__ __forceinline__ void walk_even(const u8 *payload, u32 rectangles) {
    const Even *evens = (const Even *)payload;
    const Places *places = (const Places *)(evens + rectangles);
    const u32 lane = threadIdx.x & 31, warps = gridDim.x * (blockDim.x >> 5);
    u32 item = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
#pragma unroll 1
    for (u32 rectangle = 0; rectangle < rectangles; rectangle++) {
#pragma unroll 1
        for (; item < evens[rectangle].items; item += warps)
            even_share(evens[rectangle], places, item, lane);
        item -= evens[rectangle].items;
    }
}

// How the host learns that a launch has moved everything, a little before the driver knows that the kernel has ended.
#ifndef FLAGS
#define FLAGS 16u
#endif

struct Done {
    // How many thread blocks have ended; zero between launches.
    u32 *blocks;
    // In host memory: one for every thread block, or, of more than FLAGS, one for all.
    u32 *flags;
    // What they become.
    u32 serial;
};

// Whoever sees it sees everything that this thread knows to be stored, on this GPU or elsewhere.
__device__ __forceinline__ void tell(u32 *flag, u32 serial) {
#ifdef KVFERRY_EMULATED
    *flag = serial;
#else
    asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(flag), "r"(serial) : "memory");
#endif
}

__device__ __forceinline__ void finish(const Done &done) {
    // The barrier puts what all threads stored before what the first one tells.
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    if (gridDim.x <= FLAGS)
        return tell(done.flags + blockIdx.x, done.serial);
    // Between the blocks of this launch a fence of this GPU's suffices; the last one's word counts for all that it has seen.
    __threadfence();
    if (atomicAdd(done.blocks, 1u) + 1 != gridDim.x)
        return;
    __threadfence();
    *done.blocks = 0;
    tell(done.flags, done.serial);
}

// Small launches bring their payload as an argument, which costs the less the shorter it is.
extern "C" __global__ void __launch_bounds__(1024, 1)
    kvferry_walk_small(const __grid_constant__ Payload<SMALL_BYTES> payload, u32 rectangles, u32 items, Done done) {
    walk(payload.bytes, rectangles, items);
    finish(done);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    kvferry_walk_inline(const __grid_constant__ Payload<INLINE_BYTES> payload, u32 rectangles, u32 items, Done done) {
    walk(payload.bytes, rectangles, items);
    finish(done);
}

extern "C" __global__ void __launch_bounds__(1024, 1) kvferry_walk(const u8 *payload, u32 rectangles, u32 items, Done done) {
    walk(payload, rectangles, items);
    finish(done);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    kvferry_even_small(const __grid_constant__ Payload<SMALL_BYTES> payload, u32 rectangles, u32, Done done) {
    walk_even(payload.bytes, rectangles);
    finish(done);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    kvferry_even_inline(const __grid_constant__ Payload<INLINE_BYTES> payload, u32 rectangles, u32, Done done) {
    walk_even(payload.bytes, rectangles);
    finish(done);
}

extern "C" __global__ void __launch_bounds__(1024, 1) kvferry_even(const u8 *payload, u32 rectangles, u32, Done done) {
    walk_even(payload, rectangles);
    finish(done);
}

// --- A launch that is on the GPU before it is known what it moves. ---
//
// From the host's word to the first byte a launch takes several times as long as this kernel does once it runs: it looks for an order in host
// memory, for as long as it was told, and then moves what the order says or says that it gave up. One of both, never both: one thread decides, and
// what comes after it gave up it does not see.

// Where the payload begins behind the order's word.
#define ORDER_PAYLOAD 128

struct Standby {
    // In host memory: a word as below, and the payload behind it.
    const u8 *order;
    // In this GPU's memory: how many thread blocks have come; zero between launches. The first to come looks for the order, so that nobody waits
    // for one that has no room yet.
    u32 *arrived;
    // The order again, for the others: a read of host memory keeps the next one of the same place waiting for a microsecond.
    u8 *passed;
    // In host memory: becomes the serial when it gives up.
    u32 *given_up;
    // Nanoseconds.
    u64 limit;
    Done done;
};

// The serial of the launch that it is for (bits 32 to 63), its rectangles (bits 16 to 31) and how many 16-byte vectors its payload has (bits 0 to
// 15): none if the launch gives up, or is told to.
__device__ __forceinline__ u64 order_word(u32 serial, u32 rectangles, u32 vectors) { return (u64)serial << 32 | rectangles << 16 | vectors; }
__device__ __forceinline__ bool is_for(u64 order, u32 serial) { return (u32)(order >> 32) == serial; }

#ifdef KVFERRY_EMULATED
__device__ __forceinline__ u64 order_at(const u8 *at) { return __atomic_load_n((const u64 *)at, __ATOMIC_ACQUIRE); }
__device__ __forceinline__ u64 passed_at(const u8 *at) { return *(const u64 *)at; }
__device__ __forceinline__ void pass(u8 *at, u64 order) { *(u64 *)at = order; }
#else
// Whatever was written before it, by the host or by whom the host had waited for, is seen behind it.
__device__ __forceinline__ u64 order_at(const u8 *at) {
    u64 order;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(order) : "l"(at) : "memory");
    return order;
}
__device__ __forceinline__ u64 passed_at(const u8 *at) {
    u64 order;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(order) : "l"(at) : "memory");
    return order;
}
__device__ __forceinline__ void pass(u8 *at, u64 order) { asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(order) : "memory"); }
__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}
#endif

// Waits for the order, or gives up. Looks are bounded, too: no target promises that the clock runs. Each takes most of a microsecond over PCIe.
__device__ __forceinline__ u64 await_order(const Standby &standby) {
    const u32 serial = standby.done.serial;
    const u64 start = nanoseconds(), looks = standby.limit / 64 + 1024;
    for (u64 look = 0;; look++) {
        // Before the word is looked at, which counts even if it comes late.
        const bool is_last = look == looks || nanoseconds() - start >= standby.limit;
        const u64 order = order_at(standby.order);
        if (is_for(order, serial))
            return order;
        if (is_last)
            return order_word(serial, 0, 0);
    }
}

extern "C" __global__ void __launch_bounds__(1024, 1) kvferry_even_standby(const __grid_constant__ Standby standby) {
    __shared__ u64 order;
    __shared__ bool is_first;
    __shared__ uint4 payload[INLINE_BYTES / sizeof(uint4)];
#ifdef KVFERRY_EMULATED
    // One thread after another: each fetches all of it.
    const u32 first = 0, step = 1;
#else
    const u32 first = threadIdx.x, step = blockDim.x;
#endif
    if (threadIdx.x == 0) {
        const u32 before = atomicAdd(standby.arrived, 1u);
        if (before + 1 == gridDim.x)
            *standby.arrived = 0;
        is_first = before == 0;
        u64 found = is_first ? await_order(standby) : 0;
        while (!is_for(found, standby.done.serial))
            found = passed_at(standby.passed);
        order = found;
    }
    __syncthreads();
    const bool decides = is_first;
    const u32 vectors = (u32)order & 0xffff, rectangles = (u32)order >> 16;
    const uint4 *from = (const uint4 *)((decides ? standby.order : standby.passed) + ORDER_PAYLOAD);
    for (u32 at = first; at < vectors; at += step) {
        const uint4 vector = __ldcv(from + at);
        payload[at] = vector;
        if (decides)
            ((uint4 *)(standby.passed + ORDER_PAYLOAD))[at] = vector;
    }
    __syncthreads();
    if (decides && threadIdx.x == 0) {
        pass(standby.passed, order);
        if (!vectors)
            tell(standby.given_up, standby.done.serial);
    }
    if (!vectors)
        return;
    walk_even((const u8 *)payload, rectangles);
    finish(standby.done);
}

// --- Verification: blocks that consist of runs, each of which follows from a number (kvferry_transport::KnownBlocks). ---

struct KnownRun {
    u64 state;
    u32 offset;
    u32 bytes;
};

struct KnownBlock {
    u64 address;
    u32 bytes;
    u32 first;
    u32 count;
    u32 background;
};

// Word `index` of what follows from a number.
__device__ __forceinline__ u64 known_word(u64 state, u64 index) {
    u64 word = state + index * 0x9e3779b97f4a7c15ull;
    word = (word ^ word >> 32) * 0xd6e8feb86659fd93ull;
    return word ^ word >> 29;
}

// Bytes of `word` that differ from `due`.
__device__ __forceinline__ u32 differing(u64 word, u64 due) {
    u32 count = 0;
    for (u64 odd = word ^ due; odd; odd >>= 8)
        count += (odd & 255) != 0;
    return count;
}

// One warp's share of a stretch of a block: words that follow from `state`, or `background` throughout; bits of `flip` the other way round.
template <bool WRITES>
__device__ __forceinline__ u32 stretch(u8 *at, u32 bytes, bool is_run, u64 state, u32 background, u64 flip, u32 lane) {
    u32 wrong = 0;
    const bool is_aligned = !((u64)at & 7);
    for (u32 word = lane; word * 8ull < bytes; word += 32) {
        const u64 due = (is_run ? known_word(state, word) : background * 0x0101010101010101ull) ^ flip;
        u8 *place = at + word * 8ull;
        const u32 left = bytes - word * 8;
        if (is_aligned && left >= 8) {
            if (WRITES)
                *(u64 *)place = due;
            else
                wrong += differing(*(const u64 *)place, due);
        } else {
            for (u32 byte = 0; byte < 8 && byte < left; byte++) {
                const u8 value = (u8)(due >> 8 * byte);
                if (WRITES)
                    place[byte] = value;
                else
                    wrong += place[byte] != value;
            }
        }
    }
    return wrong;
}

// Every thread block takes blocks in turn, every warp of it runs in turn, each with the gap behind it.
template <bool WRITES>
__device__ __forceinline__ void known(const KnownBlock *blocks, const KnownRun *runs, u32 count, u64 flip, u32 *wrong) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (u32 number = blockIdx.x; number < count; number += gridDim.x) {
        const KnownBlock block = blocks[number];
        u32 found = 0;
        // Run -1 is nothing: behind it is the gap before the first.
        for (u32 next = warp; next <= block.count; next += warps) {
            u8 *base = (u8 *)block.address;
            u32 end = 0;
            if (next > 0) {
                const KnownRun run = runs[block.first + next - 1];
                found += stretch<WRITES>(base + run.offset, run.bytes, true, run.state, 0, flip, lane);
                end = run.offset + run.bytes;
            }
            const u32 until = next < block.count ? runs[block.first + next].offset : block.bytes;
            found += stretch<WRITES>(base + end, until - end, false, 0, block.background, flip, lane);
        }
        if (!WRITES && found)
            atomicAdd(&wrong[number], found);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    kvferry_write_known(const KnownBlock *blocks, const KnownRun *runs, u32 count, u64 flip) {
    known<true>(blocks, runs, count, flip, 0);
}

// wrong[i] must be zero before, and becomes the number of bytes of block i that are not what they have to be.
extern "C" __global__ void __launch_bounds__(256)
    kvferry_count_unknown(const KnownBlock *blocks, const KnownRun *runs, u32 count, u32 *wrong) {
    known<false>(blocks, runs, count, 0, wrong);
}
