/* What libfabric alone moves by large single operations: two processes, one endpoint each, no kvferry.
 *
 * usage: libfabric_limit LIBRARY PROVIDER NODE BYTES SIZE ROUNDS
 * such as libfabric_limit libfabric.so.1 tcp 127.0.0.1 671088640 1048576 7
 *
 * One process reads BYTES of the other's memory, and writes as many into it, SIZE at a time with 16 operations under way. Each round is timed
 * from its first call to the last completion; a write's says that the target has it (FI_DELIVERY_COMPLETE), which 1.17's shm does not end. Bytes are
 * compared behind each. It prints a line per round: `libfabric write n=.. bb=.. X GB/s`. Status 1 and a reason if anything fails. Both processes
 * poll without rest: figures of a machine that does something else beside are of no use.
 *
 * cc -O2 benches/libfabric_limit.c -o target/libfabric_limit -ldl   (headers: libfabric-dev) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH = 16, NAME_MAX_BYTES = 256, WITHIN_SECONDS = 60, HUGE_PAGE_BYTES = 2 << 20 };

static const char *(*text_of)(int);

static void check(const char *what, long status) {
    if (status < 0) {
        fprintf(stderr, "libfabric_limit: %s: %s\n", what, text_of ? text_of((int)-status) : "failed");
        exit(1);
    }
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "libfabric_limit: %s\n", dlerror());
        exit(1);
    }
    return found;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* What one side tells the other. */
struct card {
    char name[NAME_MAX_BYTES];
    uint64_t length, address, key;
};

struct side {
    struct fid_ep *endpoint;
    struct fid_cq *queue;
    struct fid_mr *region;
    unsigned char *memory;
    fi_addr_t peer;
    struct card theirs;
};

static void exchange(int socket, const void *own, void *theirs, size_t length) {
    if (send(socket, own, length, 0) != (ssize_t)length || recv(socket, theirs, length, MSG_WAITALL) != (ssize_t)length) {
        fprintf(stderr, "libfabric_limit: the other process is gone\n");
        exit(1);
    }
}

/* Attributes are larger than this header's, and zero: a newer library reads fields that an older header does not have. */
union room {
    struct fi_cq_attr queue;
    struct fi_av_attr addresses;
    struct fi_mr_attr region;
    char bytes[512];
};

/* As kvferry's pools: from the start of a huge page on, on such pages where the kernel gives them when asked. */
static unsigned char *allocate(size_t bytes) {
    char *start = mmap(NULL, bytes + HUGE_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
        perror("libfabric_limit: memory");
        exit(1);
    }
    start += -(uintptr_t)start % HUGE_PAGE_BYTES;
    madvise(start, bytes, MADV_HUGEPAGE);
    return memset(start, 0, bytes);
}

static struct side open_side(const char *path, const char *provider, const char *node, size_t bytes, int socket) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "libfabric_limit: %s\n", dlerror());
        exit(1);
    }
    text_of = (const char *(*)(int))symbol(library, "fi_strerror");
    uint32_t (*version)(void) = (uint32_t(*)(void))symbol(library, "fi_version");
    struct fi_info *(*duplicate)(const struct fi_info *) = (struct fi_info * (*)(const struct fi_info *)) symbol(library, "fi_dupinfo");
    int (*find)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **) =
        (int (*)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **))symbol(library, "fi_getinfo");
    int (*open_fabric)(struct fi_fabric_attr *, struct fid_fabric **, void *) =
        (int (*)(struct fi_fabric_attr *, struct fid_fabric **, void *))symbol(library, "fi_fabric");

    struct fi_info *hints = duplicate(NULL), *info;
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->fabric_attr->prov_name = strdup(provider);
    uint32_t known = FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION);
    check("fi_getinfo", find(version() < known ? version() : known, node, NULL, FI_SOURCE, hints, &info));

    struct side side = {0};
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_av *addresses;
    check("fi_fabric", open_fabric(info->fabric_attr, &fabric, NULL));
    check("fi_domain", fi_domain(fabric, info, &domain, NULL));
    union room room = {0};
    room.queue.format = FI_CQ_FORMAT_CONTEXT;
    room.queue.wait_obj = FI_WAIT_NONE;
    check("fi_cq_open", fi_cq_open(domain, &room.queue, &side.queue, NULL));
    memset(&room, 0, sizeof room);
    check("fi_av_open", fi_av_open(domain, &room.addresses, &addresses, NULL));
    check("fi_endpoint", fi_endpoint(domain, info, &side.endpoint, NULL));
    check("fi_ep_bind", fi_ep_bind(side.endpoint, &side.queue->fid, FI_TRANSMIT | FI_RECV));
    check("fi_ep_bind", fi_ep_bind(side.endpoint, &addresses->fid, 0));
    check("fi_enable", fi_enable(side.endpoint));

    side.memory = allocate(bytes);
    struct iovec range = {side.memory, bytes};
    memset(&room, 0, sizeof room);
    room.region.mr_iov = &range;
    room.region.iov_count = 1;
    room.region.access = FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE;
    room.region.requested_key = 7;
    check("fi_mr_regattr", fi_mr_regattr(domain, &room.region, 0, &side.region));
    if (info->domain_attr->mr_mode & FI_MR_ENDPOINT) {
        check("fi_mr_bind", fi_mr_bind(side.region, &side.endpoint->fid, 0));
        check("fi_mr_enable", fi_mr_enable(side.region));
    }
    struct card own = {.length = NAME_MAX_BYTES, .key = fi_mr_key(side.region)};
    own.address = info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? (uint64_t)(uintptr_t)side.memory : 0;
    size_t length = sizeof own.name;
    check("fi_getname", fi_getname(&side.endpoint->fid, own.name, &length));
    exchange(socket, &own, &side.theirs, sizeof own);
    check("fi_av_insert", fi_av_insert(addresses, side.theirs.name, 1, &side.peer, 0, NULL) - 1);
    return side;
}

/* Says whether something ended. */
static int poll_once(struct side *side) {
    struct fi_cq_entry entry;
    ssize_t status = fi_cq_read(side->queue, &entry, 1);
    if (status == -FI_EAGAIN)
        return 0;
    check("a completion", status);
    return 1;
}

/* Moves everything once, `size` at a time; seconds. */
static double move(struct side *side, int writes, size_t bytes, size_t size) {
    static struct fi_context2 contexts[DEPTH];
    void *descriptor = fi_mr_desc(side->region);
    size_t posted = 0, ended = 0, all = bytes / size;
    double began = seconds();
    while (ended < all) {
        if (posted < all && posted - ended < DEPTH) {
            size_t at = posted * size;
            struct iovec local = {side->memory + at, size};
            struct fi_rma_iov remote = {side->theirs.address + at, size, side->theirs.key};
            struct fi_msg_rma message = {&local, &descriptor, 1, side->peer, &remote, 1, &contexts[posted % DEPTH], 0};
            ssize_t status = writes ? fi_writemsg(side->endpoint, &message, FI_COMPLETION | FI_DELIVERY_COMPLETE)
                                    : fi_readmsg(side->endpoint, &message, FI_COMPLETION);
            if (status == 0)
                posted++;
            else if (status != -FI_EAGAIN)
                check(writes ? "fi_writemsg" : "fi_readmsg", status);
        }
        ended += (size_t)poll_once(side);
        if (seconds() - began > WITHIN_SECONDS) {
            fprintf(stderr, "libfabric_limit: %zu of %zu operations ended within %d s\n", ended, all, WITHIN_SECONDS);
            exit(1);
        }
    }
    return seconds() - began;
}

static void fill(unsigned char *memory, size_t bytes, unsigned seed) {
    for (size_t at = 0; at < bytes; at++)
        memory[at] = (unsigned char)(at * 31 + (at >> 12) + seed);
}

static void compare(const unsigned char *memory, size_t bytes, unsigned seed) {
    for (size_t at = 0; at < bytes; at++)
        if (memory[at] != (unsigned char)(at * 31 + (at >> 12) + seed)) {
            fprintf(stderr, "libfabric_limit: byte %zu is wrong\n", at);
            exit(1);
        }
}

/* Answers until it is told what to do next. */
static char serve(struct side *side, int socket) {
    char word;
    while (recv(socket, &word, 1, MSG_DONTWAIT) != 1)
        poll_once(side);
    return word;
}

static void other(struct side *side, int socket, size_t bytes) {
    unsigned seed = 0;
    for (;;) {
        char word = serve(side, socket);
        if (word == 'r')
            fill(side->memory, bytes, ++seed);
        else if (word == 'w')
            memset(side->memory, 0, bytes), ++seed;
        else if (word == 'c')
            compare(side->memory, bytes, seed);
        else
            return;
        if (send(socket, &word, 1, MSG_NOSIGNAL) != 1)
            return;
    }
}

/* While it waits for the answer it answers itself: some providers need both. */
static void ask(struct side *side, int socket, char word) {
    if (send(socket, &word, 1, MSG_NOSIGNAL) != 1)
        exit(1);
    char answer;
    ssize_t status;
    while ((status = recv(socket, &answer, 1, MSG_DONTWAIT)) != 1) {
        if (status == 0) {
            fprintf(stderr, "libfabric_limit: the other process ended\n");
            exit(1);
        }
        poll_once(side);
    }
}

int main(int count, char **words) {
    if (count != 7) {
        fprintf(stderr, "usage: libfabric_limit LIBRARY PROVIDER NODE BYTES SIZE ROUNDS\n");
        return 2;
    }
    size_t size = strtoull(words[5], NULL, 10), rounds = strtoull(words[6], NULL, 10);
    size_t bytes = size ? strtoull(words[4], NULL, 10) / size * size : 0;
    if (!bytes || !rounds) {
        fprintf(stderr, "libfabric_limit: BYTES, SIZE and ROUNDS must be numbers from 1, BYTES at least SIZE\n");
        return 2;
    }
    int sockets[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets)) {
        perror("libfabric_limit");
        return 1;
    }
    pid_t child = fork();
    if (child < 0) {
        perror("libfabric_limit");
        return 1;
    }
    int socket = sockets[child == 0];
    close(sockets[child != 0]);
    if (child == 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct side side = open_side(words[1], words[2], words[3], bytes, socket);
    if (child == 0) {
        other(&side, socket, bytes);
        return 0;
    }
    unsigned seed = 0;
    for (size_t round = 0; round < rounds; round++) {
        memset(side.memory, 0, bytes);
        ask(&side, socket, 'r');
        double took = move(&side, 0, bytes, size);
        compare(side.memory, bytes, ++seed);
        printf("libfabric read n=%zu bb=%zu %.3f GB/s\n", bytes / size, size, (double)bytes / took / 1e9);
        fill(side.memory, bytes, ++seed);
        ask(&side, socket, 'w');
        took = move(&side, 1, bytes, size);
        ask(&side, socket, 'c');
        printf("libfabric write n=%zu bb=%zu %.3f GB/s\n", bytes / size, size, (double)bytes / took / 1e9);
    }
    if (send(socket, "e", 1, MSG_NOSIGNAL) != 1)
        return 1;
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
