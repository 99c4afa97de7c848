// What the walking kernels take without a transport around them, from the launch to the last flag: the general one beside the short one.
//
// usage: start FILE.ptx...     Between GPUs 0 and 1 of one process, every byte compared. A file's name may say how its short kernel was made:
// "share2048" (SHARE), "counted" (FLAGS 0), "old" (before thread blocks told their ends themselves). Includes nothing of CUDA: its driver is loaded at run time.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>
typedef uint64_t u64;
typedef uint32_t u32;
typedef void *H;
static void *lib;
template <typename... A> static int call(const char *name, A... a) {
    auto f = (int (*)(A...))dlsym(lib, name);
    if (!f) { printf("no %s\n", name); exit(1); }
    int r = f(a...);
    if (r) { printf("%s: %d\n", name, r); exit(1); }
    return r;
}
static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count() * 1e6; }
struct Plane { u64 base, stride; };
struct Side { u64 planes, token_pitch, head_pitch, offset; u32 plane, plane_step, table, block_tokens, cp, cp_rank; };
struct Rectangle { Side source, destination; u32 items_end, plane, token_start, token_end, cell_tokens, cells, per_block, first_block, chunks, heads, run_bytes, flags; };
struct EvenSide { u64 base, step, table; };
struct Even { EvenSide source, destination; u32 items, bytes, shares, pieces, first, of_shares, of_pieces, shifts; };
static_assert(sizeof(Rectangle) == 160 && sizeof(Even) == 80, "");
struct Done { u64 blocks, flags; u32 serial; };
static void factor(u32 d, u32 *f, u32 *s) {
    u32 bits = 0;
    while ((1ull << bits) < d) bits++;
    *f = (u32)(((1ull << (31 + bits)) + d - 1) / d);
    *s = 31 + bits;
}
int main(int argc, char **argv) {
    lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib) { puts("no driver"); return 1; }
    call("cuInit", 0u);
    int count = 0;
    call("cuDeviceGetCount", &count);
    int dev[2] = {0, count > 1 ? 1 : 0};
    H ctx[2];
    for (int i = 0; i < 2; i++) call("cuDevicePrimaryCtxRetain", &ctx[i], dev[i]);
    const u32 planes = 160;
    for (auto shape : std::vector<std::pair<u32, u32>>{{64, 4096}, {256, 4096}, {2, 4096}}) {
        const u32 blocks = shape.first, bytes = shape.second, share = 4096;
        const u64 plane = 2ull * blocks * bytes, total = plane * planes;
        u64 src, dst, stable, dtable, ended;
        call("cuCtxSetCurrent", ctx[1]);
        call("cuMemAlloc_v2", &src, (size_t)total);
        std::vector<u32> data(total / 4);
        for (size_t i = 0; i < data.size(); i++) data[i] = (u32)(i * 2654435761u) ^ blocks;
        call("cuMemcpyHtoD_v2", src, (const void *)data.data(), (size_t)total);
        call("cuCtxSetCurrent", ctx[0]);
        if (count > 1) {
            auto f = (int (*)(H, unsigned))dlsym(lib, "cuCtxEnablePeerAccess");
            int r = f(ctx[1], 0);
            if (r && r != 704) { printf("peer access: %d\n", r); return 1; }
        }
        call("cuMemAlloc_v2", &dst, (size_t)total);
        call("cuMemAlloc_v2", &stable, (size_t)planes * 16);
        call("cuMemAlloc_v2", &dtable, (size_t)planes * 16);
        call("cuMemAlloc_v2", &ended, (size_t)64);
        call("cuMemsetD8_v2", ended, (unsigned char)0, (size_t)64);
        std::vector<Plane> st, dt;
        for (u32 p = 0; p < planes; p++) st.push_back({src + p * plane, bytes}), dt.push_back({dst + p * plane, bytes});
        call("cuMemcpyHtoD_v2", stable, (const void *)st.data(), (size_t)planes * 16);
        call("cuMemcpyHtoD_v2", dtable, (const void *)dt.data(), (size_t)planes * 16);
        u32 *flags;
        call("cuMemHostAlloc", (void **)&flags, (size_t)4096, 1u);
        memset(flags, 0, 4096);
        H stream, event;
        call("cuStreamCreate", &stream, 1u);
        call("cuEventCreate", &event, 2u);
        std::vector<u32> a(2 * blocks), b(2 * blocks);
        for (u32 i = 0; i < 2 * blocks; i++) a[i] = b[i] = i;
        std::mt19937 g(1);
        std::shuffle(a.begin(), a.end(), g);
        std::shuffle(b.begin(), b.end(), g);
        u32 serial = 0;
        for (int turn = 2; turn < 2 * argc; turn++) {
            const int file = turn / 2;
            const bool even = turn & 1;
            std::ifstream in(argv[file]);
            std::string ptx((std::istreambuf_iterator<char>(in)), {});
            H module, function;
            call("cuModuleLoadData", &module, (const void *)ptx.c_str());
            std::vector<unsigned char> payload(3840);
            u32 rectangles = 1, items;
            size_t length;
            if (even) {
                u32 sh = share;
                if (const char *at = strstr(argv[file], "share"))
                    sh = atoi(at + 5);
                Even e = {};
                e.source = {src, plane, 0};
                e.destination = {dst, plane, 0};
                e.bytes = bytes;
                e.shares = (bytes + sh - 1) / sh;
                e.pieces = blocks;
                e.items = items = planes * blocks * e.shares;
                u32 s1, s2;
                factor(e.shares, &e.of_shares, &s1);
                factor(e.pieces, &e.of_pieces, &s2);
                e.shifts = s1 | s2 << 8;
                length = sizeof e + 8 * blocks;
                memcpy(payload.data(), &e, sizeof e);
                for (u32 i = 0; i < blocks; i++) {
                    u32 pair[2] = {a[i] * (bytes / 16), b[i] * (bytes / 16)};
                    memcpy(payload.data() + sizeof e + 8 * i, pair, 8);
                }
            } else {
                Rectangle r = {};
                Side side = {stable, bytes / 16, bytes / 16, 0, 0, 1, 0, 16, 1, 0};
                r.source = side;
                side.planes = dtable;
                side.table = blocks;
                r.destination = side;
                r.items_end = items = planes * blocks * ((bytes + 4095) / 4096);
                r.token_end = 16 * blocks;
                r.cell_tokens = 16;
                r.cells = blocks;
                r.per_block = 1;
                r.chunks = (bytes + 4095) / 4096;
                r.heads = 1;
                r.run_bytes = bytes / 16;
                length = sizeof r + 8 * blocks;
                memcpy(payload.data(), &r, sizeof r);
                memcpy(payload.data() + sizeof r, a.data(), 4 * blocks);
                memcpy(payload.data() + sizeof r + 4 * blocks, b.data(), 4 * blocks);
            }
            std::string name = std::string(even ? "kvferry_even" : "kvferry_walk") + (length <= 1024 ? "_small" : "_inline");
            // Older files have no short kernel.
            if (((int (*)(H *, H, const char *))dlsym(lib, "cuModuleGetFunction"))(&function, module, name.c_str())) {
                call("cuModuleUnload", module);
                continue;
            }
            for (u32 grid : {8u, 12u, 16u, 20u}) {
                const bool counted = grid > 16 || strstr(argv[file], "counted") || strstr(argv[file], "old");
                const u32 told = counted ? 1 : grid;
                call("cuMemsetD8_v2", dst, (unsigned char)0xee, (size_t)total);
                call("cuCtxSynchronize");
                std::vector<double> times;
                for (int round = 0; round < 60; round++) {
                    // About as long as a bench takes between two transfers.
                    for (double until = now() + 150; now() < until;) {}
                    serial++;
                    Done done = {ended, (u64)flags, serial};
                    void *parameters[] = {payload.data(), &rectangles, &items, &done};
                    const double start = now();
                    call("cuLaunchKernel", function, grid, 1u, 1u, 1024u, 1u, 1u, 0u, stream, (void **)parameters, (void **)nullptr);
                    call("cuEventRecord", event, stream);
                    for (;;) {
                        u32 seen = 0;
                        while (seen < told && ((volatile u32 *)flags)[seen] == serial) seen++;
                        if (seen == told) break;
                        if (now() > start + 1e6) { puts("no end"); return 1; }
                    }
                    times.push_back(now() - start);
                    call("cuStreamSynchronize", stream);
                }
                std::sort(times.begin(), times.end());
                std::vector<unsigned char> found(total);
                call("cuMemcpyDtoH_v2", (void *)found.data(), dst, (size_t)total);
                u64 wrong = 0;
                for (u32 p = 0; p < planes; p++)
                    for (u32 i = 0; i < blocks; i++)
                        wrong += memcmp(found.data() + p * plane + (u64)b[i] * bytes, (char *)data.data() + p * plane + (u64)a[i] * bytes, bytes) != 0;
                const double moved = (double)planes * blocks * bytes;
                printf("%-28s %s blocks %3u grid %2u  p50 %7.2f us  min %7.2f  %6.1f GB/s  wrong %llu\n", strrchr(argv[file], '/') ? strrchr(argv[file], '/') + 1 : argv[file],
                       even ? "even" : "walk", blocks, grid, times[30], times[0], moved / times[30] / 1e3, (unsigned long long)wrong);
                fflush(stdout);
            }
            call("cuModuleUnload", module);
        }
        for (u64 m : {dst, stable, dtable, ended}) call("cuMemFree_v2", m);
        call("cuMemFreeHost", (void *)flags);
        call("cuCtxSetCurrent", ctx[1]);
        call("cuMemFree_v2", src);
        call("cuCtxSetCurrent", ctx[0]);
    }
}
