/* A library with NVML's calls and their layouts, for tests: two GPUs of GB200. How new it is: OLD has no call for the fabric, FIRST the one
   without versions, SECOND knows version 2 of the structure; otherwise version 3, too. NOTHING does not start, DEADLY ends the process. */
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef struct { unsigned index; } *nvmlDevice_t;
typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;
typedef struct {
    unsigned char clusterUuid[16];
    nvmlReturn_t status;
    unsigned cliqueId;
    unsigned char state;
} nvmlGpuFabricInfo_t;
typedef struct {
    unsigned version;
    unsigned char clusterUuid[16];
    nvmlReturn_t status;
    unsigned cliqueId;
    unsigned char state;
    unsigned healthMask;
} nvmlGpuFabricInfo_v2_t;
typedef struct {
    unsigned version;
    unsigned char clusterUuid[16];
    nvmlReturn_t status;
    unsigned cliqueId;
    unsigned char state;
    unsigned healthMask;
    unsigned char healthSummary;
} nvmlGpuFabricInfo_v3_t;
#define VERSION(n) (unsigned)(sizeof(nvmlGpuFabricInfo_v##n##_t) | (n##u << 24))

static struct { unsigned index; } gpus[2] = {{0}, {1}};
static const unsigned char cluster[16] = {0x5b, 0x1c, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};

nvmlReturn_t nvmlInit_v2(void)
{
#ifdef DEADLY
    abort();
#elif defined(NOTHING)
    return 9;
#else
    return 0;
#endif
}
const char *nvmlErrorString(nvmlReturn_t code) { return code == 9 ? "Driver Not Loaded" : "Insufficient Resources"; }
nvmlReturn_t nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "570.124.06", length); return 0; }
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
    if (index > 1)
        return 2;
    *device = &gpus[index];
    return 0;
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, void **device)
{
    /* The last digit is the GPU's number. */
    if (strncmp(uuid, "GPU-00010203-0405-0607-0809-0a0b0c0d0e0", 39))
        return 6;
    return nvmlDeviceGetHandleByIndex_v2(uuid[39] - '0', device);
}
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *text, unsigned length) { strncpy(text, "NVIDIA GB200", length); return 0; }
nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    strcpy(pci->busId, device->index ? "00000009:01:00.0" : "00000008:01:00.0");
    return 0;
}
#ifndef OLD
nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, nvmlGpuFabricInfo_t *info)
{
    memcpy(info->clusterUuid, cluster, 16);
    info->status = device->index ? 15 : 0;
    info->cliqueId = 32766;
    info->state = 3;
    return 0;
}
#ifndef FIRST
nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, nvmlGpuFabricInfo_v3_t *info)
{
    const unsigned health = 2 | 2 << 2 | (device->index ? 1 : 2) << 4 | 2 << 6 | 1 << 8 | 1 << 12;
    if (info->version == VERSION(2)) {
        nvmlGpuFabricInfo_v2_t *second = (nvmlGpuFabricInfo_v2_t *)info;
        second->healthMask = health;
#ifndef SECOND
    } else if (info->version == VERSION(3)) {
        info->healthMask = health;
        info->healthSummary = device->index ? 2 : 1;
#endif
    } else {
        return 25;
    }
    memcpy(info->clusterUuid, cluster, 16);
    info->status = device->index ? 15 : 0;
    info->cliqueId = 32766;
    info->state = 3;
    return 0;
}
#endif
#endif
