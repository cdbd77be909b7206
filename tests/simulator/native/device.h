/* NVML's functions about one device; included by nvml.c. */

API int nvmlDeviceGetIndex(device_t handle, unsigned *out) {
    ABOUT(handle, out);
    *out = d->number;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetMinorNumber(device_t handle, unsigned *out) {
    ABOUT(handle, out);
    if (d->parent != NO_PARENT) return finish(NVML_ERROR_NOT_SUPPORTED);
    *out = d->number;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetName(device_t handle, char *out, unsigned length) {
    ABOUT(handle, out);
    return finish(answer_text(d->name, out, length));
}

API int nvmlDeviceGetUUID(device_t handle, char *out, unsigned length) {
    ABOUT(handle, out);
    return finish(answer_text(d->uuid, out, length));
}

API int nvmlDeviceGetComputeMode(device_t handle, unsigned *out) {
    ABOUT(handle, out);
    *out = d->compute_mode;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetCudaComputeCapability(device_t handle, int *major, int *minor) {
    ABOUT(handle, major && minor);
    *major = d->capability_major;
    *minor = d->capability_minor;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetUtilizationRates(device_t handle, nvml_utilization *out) {
    ABOUT(handle, out);
    if (d->mig_enabled || d->parent != NO_PARENT) return finish(NVML_ERROR_NOT_SUPPORTED);
    out->gpu = out->memory = 0; /* nothing here computes */
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetPciInfo_v3(device_t handle, nvml_pci_info *out) {
    ABOUT(handle, out);
    if (d->parent != NO_PARENT) return finish(NVML_ERROR_NOT_SUPPORTED);
    unsigned bus = d->number + 1;
    memset(out, 0, sizeof *out);
    out->bus = bus;
    out->pci_device_id = 0x220310DE; /* GA102, NVIDIA */
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "0000:%02X:00.0", bus & 0xff);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", bus & 0xff);
    return finish(NVML_SUCCESS);
}

/* --- memory --- */

API int nvmlDeviceGetMemoryInfo(device_t handle, nvml_memory_v1 *out) {
    ABOUT(handle, out);
    if (d->memory_mode == MEMORY_UNSUPPORTED) return finish(NVML_ERROR_NOT_SUPPORTED);
    memset(out, 0, sizeof *out);
    if (d->memory_mode == MEMORY_ZERO) return finish(NVML_SUCCESS);
    out->total = d->total;
    out->used = used((uint32_t)at) + d->reserved;
    out->free = d->total - out->used;
    return finish(NVML_SUCCESS);
}

#ifndef NVML_WITHOUT_V2
API int nvmlDeviceGetMemoryInfo_v2(device_t handle, nvml_memory_v2 *out) {
    ABOUT(handle, out);
    if (out->version != NVML_MEMORY_V2) return finish(NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    if (d->memory_mode == MEMORY_UNSUPPORTED) return finish(NVML_ERROR_NOT_SUPPORTED);
    memset(out, 0, sizeof *out);
    out->version = NVML_MEMORY_V2;
    if (d->memory_mode == MEMORY_ZERO) return finish(NVML_SUCCESS);
    out->total = d->total;
    out->reserved = d->reserved;
    out->used = used((uint32_t)at);
    out->free = d->total - d->reserved - out->used;
    return finish(NVML_SUCCESS);
}
#endif

/* --- processes --- */

/* Fill `listed` with what the living processes hold on a device or on its instances. */
static unsigned list_processes(int at, nvml_process_v3 *listed) {
    unsigned n = 0;
    for (uint32_t i = 0; i < S->slot_count; i++) {
        const sim_slot *slot = &S->slots[i];
        if (slot->state == SLOT_FREE || slot->dead_at || slot->device >= S->device_count) continue;
        const sim_device *on = &S->devices[slot->device];
        if (slot->device != (uint32_t)at && on->parent != at) continue;
        bool instance = on->parent != NO_PARENT;
        nvml_process_v3 entry = {
            .pid = slot->pid + (uint32_t)on->pid_offset,
            .used = slot->size,
            .gpu_instance = instance ? on->number + 1 : UINT32_MAX,
            .compute_instance = instance ? 0 : UINT32_MAX,
        };
        unsigned k = 0;
        while (k < n && (listed[k].pid != entry.pid || listed[k].gpu_instance != entry.gpu_instance)) k++;
        if (k < n) listed[k].used += entry.used;
        else listed[n++] = entry;
    }
    for (unsigned k = 0; k < n; k++) {
        if (S->devices[at].process_mode == PROCESSES_HIDDEN_MEMORY) listed[k].used = NVML_VALUE_NOT_AVAILABLE;
        if (S->devices[at].process_mode == PROCESSES_ZERO_MEMORY) listed[k].used = 0;
    }
    return n;
}

/* Called with the lock held, which also guards `listed`. */
static int answer_processes(int at, unsigned *count, void *out, size_t entry_size, bool empty) {
    static nvml_process_v3 listed[SLOT_LIMIT];
    if (S->devices[at].process_mode == PROCESSES_NONE) return NVML_ERROR_NOT_SUPPORTED;
    if (*count && !out) return NVML_ERROR_INVALID_ARGUMENT;
    unsigned room = *count;
    unsigned n = empty ? 0 : list_processes(at, listed);
    *count = n;
    if (n > room) return NVML_ERROR_INSUFFICIENT_SIZE;
    /* Version 1 is the beginning of the later structure. */
    for (unsigned k = 0; k < n; k++) memcpy((char *)out + k * entry_size, &listed[k], entry_size);
    return NVML_SUCCESS;
}

#define PROCESS_LIST(function, type, empty)                                  \
    API int function(device_t handle, unsigned *count, type *out) {          \
        ABOUT(handle, count);                                                \
        return finish(answer_processes(at, count, out, sizeof *out, empty)); \
    }

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses, nvml_process_v1, false)
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, nvml_process_v3, false)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses, nvml_process_v1, true)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, nvml_process_v3, true)
#ifndef NVML_WITHOUT_V2
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, nvml_process_v3, false)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, nvml_process_v3, true)
#endif

/* --- MIG --- */

#ifndef NVML_WITHOUT_MIG
API int nvmlDeviceGetMigMode(device_t handle, unsigned *current, unsigned *pending) {
    ABOUT(handle, current && pending);
    if (!d->mig_capable) return finish(NVML_ERROR_NOT_SUPPORTED);
    *current = *pending = d->mig_enabled;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetMaxMigDeviceCount(device_t handle, unsigned *out) {
    ABOUT(handle, out);
    *out = d->mig_capable ? 7 : 0;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetMigDeviceHandleByIndex(device_t handle, unsigned index, device_t *out) {
    ABOUT(handle, out);
    if (!d->mig_capable) return finish(NVML_ERROR_NOT_SUPPORTED);
    for (uint32_t i = S->gpu_count; i < S->device_count; i++) {
        if (S->devices[i].parent == at && S->devices[i].number == index) {
            *out = handles + i;
            return finish(NVML_SUCCESS);
        }
    }
    return finish(NVML_ERROR_NOT_FOUND);
}

API int nvmlDeviceIsMigDeviceHandle(device_t handle, unsigned *out) {
    ABOUT(handle, out);
    *out = d->parent != NO_PARENT;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device_t handle, device_t *out) {
    ABOUT(handle, out);
    if (d->parent == NO_PARENT) return finish(NVML_ERROR_INVALID_ARGUMENT);
    *out = handles + d->parent;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetGpuInstanceId(device_t handle, unsigned *out) {
    ABOUT(handle, out);
    if (d->parent == NO_PARENT) return finish(NVML_ERROR_NOT_SUPPORTED);
    *out = d->number + 1;
    return finish(NVML_SUCCESS);
}

API int nvmlDeviceGetComputeInstanceId(device_t handle, unsigned *out) {
    ABOUT(handle, out);
    if (d->parent == NO_PARENT) return finish(NVML_ERROR_NOT_SUPPORTED);
    *out = 0;
    return finish(NVML_SUCCESS);
}
#endif
