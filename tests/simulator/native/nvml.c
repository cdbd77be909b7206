/* A simulated libnvidia-ml.so.1: what NVML answers, taken from the shared state.
 *
 * NVML_WITHOUT_V2 leaves out the newer versions of memory info and process lists
 * (a driver before R510), NVML_WITHOUT_MIG the MIG functions too (before R450):
 * pynvml then raises NVMLError_FunctionNotFound.
 */
#include "shared.h"

#define API __attribute__((visibility("default")))

/* Tells build() whether a library that it finds is up to date. */
API const char gpushare_simulator_stamp[] = NVML_STAMP;

/* Handles point into this array; only the position counts, never the content. */
typedef const char *device_t;
static const char handles[DEVICE_LIMIT];

static int record_of(device_t handle) {
    if (!S || handle < handles || handle >= handles + S->device_count) return -1;
    return (int)(handle - handles);
}

/* In a function about one device: check, inject, lock; afterwards `d` is its record. */
#define ABOUT(handle, pointer)                                          \
    if (!__atomic_load_n(&references, __ATOMIC_ACQUIRE)) return NVML_ERROR_UNINITIALIZED; \
    int at = record_of(handle);                                         \
    if (at < 0 || !(pointer)) return NVML_ERROR_INVALID_ARGUMENT;       \
    int rc = begin(__func__, at);                                       \
    if (rc) return rc;                                                  \
    sim_device *d = &S->devices[at];                                    \
    (void)d

/* In a function about the system, or about a device that is still to be found. */
#define GENERAL(record)                                                 \
    if (!__atomic_load_n(&references, __ATOMIC_ACQUIRE)) return NVML_ERROR_UNINITIALIZED; \
    int rc = begin(__func__, record);                                   \
    if (rc) return rc

static int answer_text(const char *text, char *out, unsigned length) {
    if (!out) return NVML_ERROR_INVALID_ARGUMENT;
    if (strlen(text) >= length) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

/* --- life of the library --- */

static int start(const char *function) {
    int rc = map_state();
    if (!rc) rc = begin(function, ANY_DEVICE);
    if (rc) return rc;
    __atomic_add_fetch(&references, 1, __ATOMIC_ACQ_REL);
    return finish(NVML_SUCCESS);
}

API int nvmlInit(void) { return start(__func__); }
API int nvmlInit_v2(void) { return start(__func__); }
API int nvmlInitWithFlags(unsigned flags) { (void)flags; return start(__func__); }

API int nvmlShutdown(void) {
    GENERAL(ANY_DEVICE);
    __atomic_sub_fetch(&references, 1, __ATOMIC_ACQ_REL);
    return finish(NVML_SUCCESS);
}

API const char *nvmlErrorString(int code) {
    for (size_t i = 0; i < sizeof nvml_errors / sizeof *nvml_errors; i++) {
        if (nvml_errors[i].code == code) return nvml_errors[i].text;
    }
    return "Unknown Error";
}

/* --- the system --- */

API int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    GENERAL(ANY_DEVICE);
    return finish(answer_text(S->driver, out, length));
}

API int nvmlSystemGetNVMLVersion(char *out, unsigned length) {
    GENERAL(ANY_DEVICE);
    char text[96];
    /* NVML puts its CUDA major version in front of the driver's. */
    snprintf(text, sizeof text, "%d.%s", S->cuda_version / 1000, S->driver);
    return finish(answer_text(text, out, length));
}

static int cuda_version(const char *function, int *out) {
    if (!out) return NVML_ERROR_INVALID_ARGUMENT;
    int rc = map_state(); /* needs no nvmlInit */
    if (!rc) rc = begin(function, ANY_DEVICE);
    if (rc) return rc;
    *out = S->cuda_version;
    return finish(NVML_SUCCESS);
}

API int nvmlSystemGetCudaDriverVersion(int *out) { return cuda_version(__func__, out); }
API int nvmlSystemGetCudaDriverVersion_v2(int *out) { return cuda_version(__func__, out); }

API int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned length) {
    GENERAL(ANY_DEVICE);
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) return finish(NVML_ERROR_NOT_FOUND);
    ssize_t size = read(descriptor, text, sizeof text - 1);
    close(descriptor);
    text[size > 0 ? size : 0] = 0; /* the first argument ends with a NUL of its own */
    if (!out || !length) return finish(NVML_ERROR_INVALID_ARGUMENT);
    snprintf(out, length, "%s", text); /* NVML cuts long names */
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetCount_v2(unsigned *out) {
    GENERAL(ANY_DEVICE);
    if (!out) return finish(NVML_ERROR_INVALID_ARGUMENT);
    *out = S->gpu_count;
    return finish(NVML_SUCCESS);
}

/* --- finding a device --- */

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *out) {
    GENERAL(S && index < S->gpu_count ? (int)index : ANY_DEVICE);
    if (!out || index >= S->gpu_count) return finish(NVML_ERROR_INVALID_ARGUMENT);
    *out = handles + index;
    return finish(NVML_SUCCESS);
}

static int found(int record, device_t *out) {
    if (!out) return NVML_ERROR_INVALID_ARGUMENT;
    if (record < 0) return NVML_ERROR_NOT_FOUND;
    *out = handles + record;
    return NVML_SUCCESS;
}

API int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *out) {
    int record = ANY_DEVICE;
    for (uint32_t i = 0; S && uuid && i < S->device_count; i++) {
        if (!strcmp(S->devices[i].uuid, uuid)) record = (int)i;
    }
    GENERAL(record);
    return finish(uuid ? found(record, out) : NVML_ERROR_INVALID_ARGUMENT);
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *out) {
    unsigned domain, bus, device, record = DEVICE_LIMIT;
    if (S && bus_id && sscanf(bus_id, "%x:%x:%x", &domain, &bus, &device) == 3) {
        if (!domain && !device && bus >= 1 && bus <= S->gpu_count) record = bus - 1;
    }
    int at = record < DEVICE_LIMIT ? (int)record : ANY_DEVICE;
    GENERAL(at);
    return finish(bus_id ? found(at, out) : NVML_ERROR_INVALID_ARGUMENT);
}

#include "device.h"
