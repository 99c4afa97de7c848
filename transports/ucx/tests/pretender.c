/* A library with UCX's names and none of its devices, for what a host must show that has them: versions, functions that are missing, memory
 * that the kernel does not let a device lock. MAJOR and MINOR say its version. Renaming a function with -D takes it away. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OK = 0, IO_ERROR = -3, NO_MEMORY = -4, UNSUPPORTED = -22 };

/* The beginnings of UCX's own structures. */
struct worker_attr {
    uint64_t field_mask;
    int thread_mode;
    uint32_t address_flags;
    void *address;
    size_t address_length;
};
struct mem_map_params {
    uint64_t field_mask;
    void *address;
    size_t length;
};
struct memory {
    void *address;
    size_t length;
};

/* What a device's driver locks for its queues. */
static char queues[128 << 10];

void ucp_get_version(unsigned *major, unsigned *minor, unsigned *release) {
    *major = MAJOR;
    *minor = MINOR;
    *release = 0;
}
const char *ucs_status_string(int status) { return status == NO_MEMORY ? "Out of memory" : "Input/output error"; }

static int object;
int ucp_config_read(const char *prefix, const char *file, void **config) { *config = &object; return OK; }
int ucp_config_modify(void *config, const char *name, const char *value) { return OK; }
void ucp_config_release(void *config) {}
int ucp_init_version(unsigned major, unsigned minor, const void *params, const void *config, void **context) {
    *context = &object;
    return OK;
}
void ucp_cleanup(void *context) {}

int ucp_worker_create(void *context, const void *params, void **worker) {
    if (mlock(queues, sizeof(queues)) != 0) return IO_ERROR;
    *worker = &object;
    return OK;
}
void ucp_worker_destroy(void *worker) { munlock(queues, sizeof(queues)); }
int ucp_worker_query(void *worker, struct worker_attr *attr) {
    attr->address = "nowhere";
    attr->address_length = 7;
    return OK;
}
void ucp_worker_release_address(void *worker, void *address) {}
int ucp_worker_set_am_recv_handler(void *worker, const void *params) { return OK; }
unsigned ucp_worker_progress(void *worker) { return 0; }

/* As a device's driver: memory that is registered is locked. */
int ucp_mem_map(void *context, const struct mem_map_params *params, void **handle) {
    struct memory *memory;
    if (mlock(params->address, params->length) != 0) return NO_MEMORY;
    memory = malloc(sizeof(*memory));
    memory->address = params->address;
    memory->length = params->length;
    *handle = memory;
    return OK;
}
int ucp_mem_unmap(void *context, void *handle) {
    struct memory *memory = handle;
    munlock(memory->address, memory->length);
    free(memory);
    return OK;
}
int ucp_rkey_pack(void *context, void *handle, void **buffer, size_t *length) {
    *buffer = strdup("key");
    *length = 3;
    return OK;
}
void ucp_rkey_buffer_release(void *buffer) { free(buffer); }

/* There are no peers. */
int ucp_worker_get_efd(void *worker, int *fd) { return UNSUPPORTED; }
int ucp_worker_arm(void *worker) { return UNSUPPORTED; }
void *ucp_worker_flush_nbx(void *worker, const void *params) { return NULL; }
int ucp_ep_create(void *worker, const void *params, void **endpoint) { return UNSUPPORTED; }
void *ucp_ep_close_nbx(void *endpoint, const void *params) { return NULL; }
void *ucp_ep_flush_nbx(void *endpoint, const void *params) { return NULL; }
void ucp_ep_print_info(void *endpoint, void *stream) {}
int ucp_ep_rkey_unpack(void *endpoint, const void *key, void **handle) { return UNSUPPORTED; }
void ucp_rkey_destroy(void *handle) {}
void *ucp_am_send_nbx(void) { return NULL; }
void *ucp_am_recv_data_nbx(void) { return NULL; }
void ucp_am_data_release(void *worker, void *data) {}
void *ucp_get_nbx(void) { return NULL; }
void ucp_request_free(void *request) {}
