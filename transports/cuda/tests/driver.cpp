// A CUDA driver without a GPU, for tests: a device whose memory is this process's own, whose kernels are walk.cu run by the processor before the
// call returns, and whose physical memory is memfds. A descriptor stands for it, or 64 bytes, by which any process of this user finds it.
// DRIVER_OF_NONE_GPUS has more such devices, DRIVER_OF_NONE_APART none that reaches another, DRIVER_OF_NONE_MIG the first be a MIG instance.
#include "../kernels/emulated.h"

#include <atomic>
#include <errno.h>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <chrono>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

typedef int Result;
typedef unsigned long long Address;
typedef void *Handle;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, NOT_READY = 600, INVALID_HANDLE = 400, NOT_SUPPORTED = 801 };
enum { DESCRIPTOR = 1, FABRIC = 8 };

static const size_t PAGE = 2 << 20;
static const char MARK[16] = "kvferry-fabric!";
static std::mutex lock;
typedef std::lock_guard<std::mutex> Locked;

struct Physical {
    int fd;
    size_t bytes;
    int kind;
    int holders;
};
struct Fabric {
    char mark[16];
    pid_t owner;
    int fd;
    ino_t number;
    char rest[64 - 16 - sizeof(pid_t) - sizeof(int) - sizeof(ino_t)];
};
static_assert(sizeof(Fabric) == 64, "a fabric handle has 64 bytes");
struct Mapped {
    size_t bytes;
    Physical *physical; // none of plain memory
};
static std::set<Physical *> physicals;
static std::map<Address, size_t> reserved;
static std::map<Address, Mapped> pieces;

static void drop(Physical *physical) {
    if (--physical->holders)
        return;
    close(physical->fd);
    physicals.erase(physical);
    delete physical;
}
static Physical *known(Address handle) {
    Physical *physical = (Physical *)handle;
    return physicals.count(physical) ? physical : nullptr;
}
static const std::pair<const Address, Mapped> *piece_at(Address at) {
    auto next = pieces.upper_bound(at);
    if (next == pieces.begin())
        return nullptr;
    auto &found = *--next;
    return at < found.first + found.second.bytes ? &found : nullptr;
}

extern "C" {
Result cuInit(unsigned) { return SUCCESS; }
// A test may have an older one, by what it says of itself.
Result cuDriverGetVersion(int *version) {
    const char *older = getenv("DRIVER_OF_NONE_VERSION");
    return *version = older ? atoi(older) : 13000, SUCCESS;
}
Result cuGetErrorString(Result code, const char **text) { return *text = code == NOT_SUPPORTED ? "not supported" : "refused", SUCCESS; }
Result cuDeviceGetCount(int *count) {
    const char *more = getenv("DRIVER_OF_NONE_GPUS");
    return *count = more ? atoi(more) : 1, SUCCESS;
}
Result cuDeviceGet(int *device, int ordinal) {
    int count;
    cuDeviceGetCount(&count);
    return *device = ordinal, ordinal < 0 || ordinal >= count ? INVALID_VALUE : SUCCESS;
}
Result cuDeviceGetName(char *name, int bytes, int device) {
    return strncpy(name, !device && getenv("DRIVER_OF_NONE_MIG") ? "Processor MIG 1g.5gb" : "Processor", bytes), SUCCESS;
}
Result cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int at = 0; at < 16; at++)
        uuid[at] = at == 15 ? device : at;
    return SUCCESS;
}
static std::atomic<int> asked;
// How often attributes were asked for.
int driver_of_none_asked() { return asked; }
Result cuDeviceGetAttribute(int *value, int attribute, int) { return asked++, *value = attribute == 75 ? 9 : 1, SUCCESS; }
Result cuDeviceCanAccessPeer(int *can, int, int) { return *can = !getenv("DRIVER_OF_NONE_APART"), SUCCESS; }
Result cuDeviceGetP2PAttribute(int *value, int, int, int) { return *value = 1, SUCCESS; }
Result cuDevicePrimaryCtxRetain(Handle *context, int) { return *context = (Handle)1, SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(Handle) { return SUCCESS; }
Result cuCtxEnablePeerAccess(Handle, unsigned) { return SUCCESS; }

static const char *const KERNELS[] = {"kvferry_walk_small", "kvferry_walk_inline", "kvferry_walk",        "kvferry_even_small",
                                      "kvferry_even_inline", "kvferry_even",       "kvferry_write_known", "kvferry_count_unknown",
                                      "kvferry_even_standby"};
Result cuModuleLoadData(Handle *module, const void *) { return *module = (Handle)1, SUCCESS; }
Result cuModuleUnload(Handle) { return SUCCESS; }
Result cuModuleGetFunction(Handle *function, Handle, const char *name) {
    for (size_t at = 0; at < sizeof KERNELS / sizeof *KERNELS; at++)
        if (!strcmp(name, KERNELS[at]))
            return *function = (Handle)(at + 1), SUCCESS;
    return NOT_FOUND;
}
// Launches that stand by run one after another, in the order in which they were made, beside all others. Their orders are awaited here, without the
// lock: what the source calls threadIdx and so on is one for all.
typedef std::atomic<unsigned long long> Count;
static Count standing, stood;
static std::atomic<int> ordered, overlooked, launched, refused;
static std::atomic<bool> overlooks, refuses;
// How many of them have moved something; how many launches of all kinds have.
int driver_of_none_ordered() { return ordered; }
int driver_of_none_moved() { return launched + ordered; }
// Have them overlook their orders, as if each came just too late, and end long after they gave up; how many have.
int driver_of_none_overlook() { return overlooks = !overlooks; }
int driver_of_none_overlooked() { return overlooked; }
// Refuse to launch them; how many were refused.
int driver_of_none_refuse() { return refuses = !refuses; }
int driver_of_none_refused() { return refused; }
static void stand_by(Standby standby, unsigned blocks, unsigned long long turn) {
    while (stood != turn)
        std::this_thread::yield();
    const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(standby.limit);
    const auto has_order = [&] { return is_for(order_at(standby.order), standby.done.serial); };
    while (!has_order() && std::chrono::steady_clock::now() < until)
        std::this_thread::yield();
    static const u64 no_order = 0;
    if (overlooks && has_order()) {
        overlooked++;
        standby.order = (const u8 *)&no_order;
    }
    standby.limit = 0;
    // Lanes run one after another, the one that tells first: the host hears when all are done.
    u32 *const flags = standby.done.flags, *const given_up = standby.given_up;
    u32 own_flags[FLAGS] = {}, own_given_up = 0;
    standby.done.flags = own_flags;
    standby.given_up = &own_given_up;
    {
        Locked alone(lock);
        gridDim.x = blocks;
        blockDim.x = 32;
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                kvferry_even_standby(standby);
    }
    if (own_given_up) {
        __atomic_store_n(given_up, own_given_up, __ATOMIC_RELEASE);
    } else {
        ordered++;
        for (u32 flag = 0; flag < FLAGS; flag++)
            if (own_flags[flag])
                __atomic_store_n(flags + flag, own_flags[flag], __ATOMIC_RELEASE);
    }
    if (overlooks)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    stood++;
}

Result cuLaunchKernel(Handle function, unsigned blocks, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle stream, void **parameters,
                      void **) {
    Locked alone(lock);
    gridDim.x = blocks;
    // One warp of each thread block does it all.
    blockDim.x = 32;
    const auto number = [&](int at) { return *(const unsigned *)parameters[at]; };
    const auto pointer = [&](int at) { return *(void **)parameters[at]; };
    const size_t kernel = (size_t)function;
    launched += kernel <= 6;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
            switch (kernel) {
            case 1:
            case 4:
                (kernel == 1 ? kvferry_walk_small : kvferry_even_small)(*(Payload<SMALL_BYTES> *)parameters[0], number(1), number(2),
                                                                        *(Done *)parameters[3]);
                break;
            case 2:
            case 5:
                (kernel == 2 ? kvferry_walk_inline : kvferry_even_inline)(*(Payload<INLINE_BYTES> *)parameters[0], number(1), number(2),
                                                                          *(Done *)parameters[3]);
                break;
            case 3:
            case 6:
                (kernel == 3 ? kvferry_walk : kvferry_even)((const u8 *)pointer(0), number(1), number(2), *(Done *)parameters[3]);
                break;
            case 7:
                kvferry_write_known((const KnownBlock *)pointer(0), (const KnownRun *)pointer(1), number(2), *(u64 *)parameters[3]);
                break;
            case 8:
                kvferry_count_unknown((const KnownBlock *)pointer(0), (const KnownRun *)pointer(1), number(2), (u32 *)pointer(3));
                break;
            case 9:
                if (refuses)
                    return refused++, NOT_SUPPORTED;
                std::thread(stand_by, *(Standby *)parameters[0], blocks, standing++).detach();
                *(Count *)stream = standing.load();
                return SUCCESS;
            default:
                return INVALID_HANDLE;
            }
    return SUCCESS;
}

// How many launches had stood by after the last one in a stream, or before an event: all others are over when they have been made.
// Default streams are small numbers.
static unsigned long long standing_in(Handle at) { return (size_t)at > 2 ? ((Count *)at)->load() : 0; }
static void wait_for(unsigned long long count) {
    while (stood < count)
        std::this_thread::yield();
}
Result cuStreamCreate(Handle *stream, unsigned) { return *stream = new Count(0), SUCCESS; }
Result cuStreamDestroy_v2(Handle stream) { return delete (Count *)stream, SUCCESS; }
Result cuStreamSynchronize(Handle stream) { return wait_for(standing_in(stream)), SUCCESS; }
Result cuStreamWaitEvent(Handle, Handle, unsigned) { return SUCCESS; }
Result cuLaunchHostFunc(Handle, void (*call)(void *), void *argument) { return call(argument), SUCCESS; }
Result cuEventCreate(Handle *event, unsigned) { return *event = new Count(0), SUCCESS; }
Result cuEventDestroy_v2(Handle event) { return delete (Count *)event, SUCCESS; }
Result cuEventRecord(Handle event, Handle stream) { return *(Count *)event = standing_in(stream), SUCCESS; }
Result cuEventQuery(Handle event) { return stood < standing_in(event) ? NOT_READY : SUCCESS; }
Result cuEventSynchronize(Handle event) { return wait_for(standing_in(event)), SUCCESS; }
Result cuEventElapsedTime_v2(float *milliseconds, Handle, Handle) { return *milliseconds = 0, SUCCESS; }

Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, Handle) { return memcpy((void *)to, from, bytes), SUCCESS; }
Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, Handle) { return memcpy(to, (const void *)from, bytes), SUCCESS; }
Result cuMemsetD8Async(Address to, unsigned char byte, size_t bytes, Handle) { return memset((void *)to, byte, bytes), SUCCESS; }
Result cuMemGetInfo_v2(size_t *left, size_t *total) { return *left = *total = (size_t)8 << 30, SUCCESS; }
Result cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    return posix_memalign(address, 4096, (bytes + 4095) & ~(size_t)4095) ? OUT_OF_MEMORY : SUCCESS;
}
Result cuMemFreeHost(void *address) { return free(address), SUCCESS; }
Result cuMemAlloc_v2(Address *address, size_t bytes) {
    Locked alone(lock);
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return OUT_OF_MEMORY;
    pieces[*address = (Address)at] = {bytes, nullptr};
    return SUCCESS;
}
Result cuMemFree_v2(Address address) {
    Locked alone(lock);
    const auto *piece = piece_at(address);
    if (!piece || piece->first != address || piece->second.physical)
        return INVALID_VALUE;
    munmap((void *)address, piece->second.bytes);
    pieces.erase(address);
    return SUCCESS;
}
Result cuMemGetAddressRange_v2(Address *base, size_t *bytes, Address address) {
    Locked alone(lock);
    const auto *piece = piece_at(address);
    if (!piece)
        return INVALID_VALUE;
    *base = piece->first;
    *bytes = piece->second.bytes;
    return SUCCESS;
}
Result cuPointerGetAttribute(void *value, int attribute, Address address) {
    Locked alone(lock);
    const auto *piece = piece_at(address);
    if (!piece)
        return INVALID_VALUE;
    *(int *)value = attribute == 10 ? !piece->second.physical : 0;
    return SUCCESS;
}
// Plain memory is of its process only, whatever stands for it.
Result cuIpcGetMemHandle(void *handle, Address address) { return memset(handle, 0, 64), memcpy(handle, &address, sizeof address), SUCCESS; }
struct IpcHandle {
    char bytes[64];
};
Result cuIpcOpenMemHandle_v2(Address *, IpcHandle, unsigned) { return NOT_SUPPORTED; }
Result cuIpcCloseMemHandle(Address) { return INVALID_VALUE; }

struct Properties {
    int type, kind;
};
Result cuMemGetAllocationGranularity(size_t *bytes, const Properties *, int) { return *bytes = PAGE, SUCCESS; }
Result cuMemCreate(Address *handle, size_t bytes, const Properties *properties, unsigned long long) {
    Locked alone(lock);
    if (!bytes || bytes % PAGE)
        return INVALID_VALUE;
    const int fd = memfd_create("gpu", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, bytes))
        return OUT_OF_MEMORY;
    Physical *physical = new Physical{fd, bytes, properties->kind, 1};
    physicals.insert(physical);
    *handle = (Address)physical;
    return SUCCESS;
}
Result cuMemRelease(Address handle) {
    Locked alone(lock);
    Physical *physical = known(handle);
    return physical ? drop(physical), SUCCESS : INVALID_HANDLE;
}
Result cuMemRetainAllocationHandle(Address *handle, void *at) {
    Locked alone(lock);
    const auto *piece = piece_at((Address)at);
    if (!piece || !piece->second.physical)
        return INVALID_VALUE;
    piece->second.physical->holders++;
    *handle = (Address)piece->second.physical;
    return SUCCESS;
}
Result cuMemExportToShareableHandle(void *shared, Address handle, int kind, unsigned long long) {
    Locked alone(lock);
    Physical *physical = known(handle);
    if (!physical || physical->kind != kind)
        return INVALID_VALUE;
    if (kind == DESCRIPTOR)
        return (*(int *)shared = fcntl(physical->fd, F_DUPFD_CLOEXEC, 3)) < 0 ? OUT_OF_MEMORY : SUCCESS;
    struct stat file;
    fstat(physical->fd, &file);
    Fabric fabric = {};
    memcpy(fabric.mark, MARK, sizeof MARK);
    fabric.owner = getpid();
    fabric.fd = physical->fd;
    fabric.number = file.st_ino;
    return memcpy(shared, &fabric, sizeof fabric), SUCCESS;
}
Result cuMemImportFromShareableHandle(Address *handle, void *shared, int kind) {
    Locked alone(lock);
    int fd = -1;
    struct stat file = {};
    if (kind == FABRIC) {
        Fabric fabric;
        memcpy(&fabric, shared, sizeof fabric);
        if (memcmp(fabric.mark, MARK, sizeof MARK))
            return INVALID_VALUE;
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/fd/%d", fabric.owner, fabric.fd);
        fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd < 0 || fstat(fd, &file) || file.st_ino != fabric.number)
            return fd < 0 ? INVALID_HANDLE : (close(fd), INVALID_HANDLE);
    } else {
        fd = fcntl((int)(long)shared, F_DUPFD_CLOEXEC, 3);
        if (fd < 0 || fcntl(fd, F_GET_SEALS) < 0 || fstat(fd, &file))
            return fd < 0 ? INVALID_VALUE : (close(fd), INVALID_VALUE);
    }
    Physical *physical = new Physical{fd, (size_t)file.st_size, kind, 1};
    physicals.insert(physical);
    *handle = (Address)physical;
    return SUCCESS;
}
// Of memory that may be anybody's; plain memory has nothing that could stand for it.
Result cuMemGetHandleForAddressRange(void *handle, Address address, size_t bytes, int kind, unsigned long long) {
    Locked alone(lock);
    const auto *piece = piece_at(address);
    if (kind != 1 || address % 4096 || bytes % 4096 || !piece || address + bytes > piece->first + piece->second.bytes)
        return INVALID_VALUE;
    if (!piece->second.physical)
        return NOT_SUPPORTED;
    return (*(int *)handle = fcntl(piece->second.physical->fd, F_DUPFD_CLOEXEC, 3)) < 0 ? OUT_OF_MEMORY : SUCCESS;
}
Result cuFlushGPUDirectRDMAWrites(int target, int scope) { return target == 0 && scope == 200 ? SUCCESS : INVALID_VALUE; }
Result cuMemAddressReserve(Address *address, size_t bytes, size_t, Address, unsigned long long) {
    Locked alone(lock);
    void *at = bytes ? mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : MAP_FAILED;
    if (at == MAP_FAILED)
        return OUT_OF_MEMORY;
    reserved[*address = (Address)at] = bytes;
    return SUCCESS;
}
Result cuMemAddressFree(Address address, size_t bytes) {
    Locked alone(lock);
    const auto found = reserved.find(address);
    if (found == reserved.end() || found->second != bytes || piece_at(address))
        return INVALID_VALUE;
    munmap((void *)address, bytes);
    reserved.erase(found);
    return SUCCESS;
}
Result cuMemMap(Address address, size_t bytes, size_t, Address handle, unsigned long long) {
    Locked alone(lock);
    Physical *physical = known(handle);
    auto range = reserved.upper_bound(address);
    if (!physical || bytes != physical->bytes || range == reserved.begin() || piece_at(address))
        return INVALID_VALUE;
    --range;
    if (bytes > range->second || address - range->first > range->second - bytes)
        return INVALID_VALUE;
    if (mmap((void *)address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->fd, 0) == MAP_FAILED)
        return OUT_OF_MEMORY;
    physical->holders++;
    pieces[address] = {bytes, physical};
    return SUCCESS;
}
Result cuMemUnmap(Address address, size_t bytes) {
    Locked alone(lock);
    for (Address at = address; at < address + bytes;) {
        const auto *piece = piece_at(at);
        if (!piece || piece->first != at || !piece->second.physical)
            return INVALID_VALUE;
        const size_t length = piece->second.bytes;
        mmap((void *)at, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        drop(piece->second.physical);
        pieces.erase(at);
        at += length;
    }
    return SUCCESS;
}
Result cuMemSetAccess(Address address, size_t bytes, const int *description, size_t) {
    // A location's type and number, then what is allowed: 1 to read, 3 to write, too.
    return mprotect((void *)address, bytes, description[2] == 3 ? PROT_READ | PROT_WRITE : PROT_READ) ? INVALID_VALUE : SUCCESS;
}
}
