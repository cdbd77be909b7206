/* A Vulkan layer that makes a Vulkan device in software (llvmpipe) the simulated GPU.
 *
 * A real inference server with a Vulkan backend then sees the VRAM that the simulated NVML
 * shows: its device is a discrete GPU with the total of the shared state, what is free
 * follows the state at every question, and what the server allocates is booked there under
 * its own PID. Memory beyond the total is refused.
 *
 *     VK_LAYER_PATH=<directory of the manifest>
 *     VK_INSTANCE_LAYERS=VK_LAYER_GPUSHARE_simulated_gpu
 *     GPUSHARE_SIM_STATE=<the state file>
 *     GPUSHARE_SIM_VULKAN_GPU=<which GPU of it; default 0>
 *
 * As in CUDA, the first allocation of a process takes its context as well; unlike there,
 * questions take nothing, but what they answer leaves the context out already.
 */
#include "shared.h"

#include <pthread.h>
#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

#define LAYER_NAME "VK_LAYER_GPUSHARE_simulated_gpu"
#define HOST_HEAP_BYTES (64ull << 30) /* host memory is not simulated */
#define ALLOCATION_LIMIT 16384

enum { HOST, DEVICE }; /* heaps, and memory types: one of each */

/* --- the shared state --- */

static pthread_mutex_t booking = PTHREAD_MUTEX_INITIALIZER; /* guards all below */
static uint64_t booked;                                     /* by this process, without context */
static struct { VkDeviceMemory memory; uint64_t size; } allocations[ALLOCATION_LIMIT];
static unsigned allocation_count;

static int the_gpu(void) {
    const char *text = getenv("GPUSHARE_SIM_VULKAN_GPU");
    int number = text ? atoi(text) : 0;
    return S && number >= 0 && (uint32_t)number < S->gpu_count ? number : -1;
}

/* Lock the state and sum it up; the GPU's number, or -1 where there is no simulated GPU. */
static int lock_gpu(void) {
    if (map_state() != NVML_SUCCESS || the_gpu() < 0 || !lock()) return -1;
    survey();
    return the_gpu();
}

static uint64_t start_ticks(void) {
    static uint64_t ticks;
    if (ticks) return ticks;
    char text[1024];
    int descriptor = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) return 0;
    ssize_t length = read(descriptor, text, sizeof text - 1);
    close(descriptor);
    text[length > 0 ? length : 0] = 0;
    const char *rest = strrchr(text, ')');
    unsigned long long found = 0;
    if (rest) {
        sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d"
               " %*d %*d %*d %*d %llu", &found);
    }
    return ticks = found;
}

/* This process's slot of a kind; with `make`, a free one where it has none. */
static sim_slot *own_slot(int gpu, uint32_t kind, bool make) {
    uint32_t pid = (uint32_t)getpid(), vacant = SLOT_LIMIT;
    for (uint32_t i = 0; i < SLOT_LIMIT; i++) {
        sim_slot *slot = &S->slots[i];
        bool is_free = i >= S->slot_count || slot->state == SLOT_FREE;
        if (is_free && vacant == SLOT_LIMIT) vacant = i;
        if (is_free && i >= S->slot_count) break;
        if (!is_free && slot->state == kind && slot->device == (uint32_t)gpu && slot->pid == pid &&
            slot->started == start_ticks()) {
            return slot;
        }
    }
    if (!make || vacant == SLOT_LIMIT) return NULL;
    sim_slot *slot = &S->slots[vacant];
    memset(slot, 0, sizeof *slot);
    slot->device = (uint32_t)gpu;
    slot->pid = pid;
    slot->started = start_ticks();
    slot->serial = ++S->serial;
    slot->state = kind; /* written last */
    if (vacant >= S->slot_count) S->slot_count = vacant + 1;
    return slot;
}

/* What this process may use at most, its context left out. With the lock held. */
static uint64_t usable(int gpu) {
    const sim_slot *data = own_slot(gpu, SLOT_DATA, false);
    const sim_slot *context = own_slot(gpu, SLOT_CONTEXT, false);
    uint64_t own = (data ? data->size : 0) + (context ? context->size : 0);
    uint64_t taken = used((uint32_t)gpu) - own + S->context;
    uint64_t total = S->devices[gpu].total - S->devices[gpu].reserved;
    return taken < total ? total - taken : 0;
}

/* Book so many bytes for this process in all; false, and nothing changed, if they do not fit. */
static bool book(uint64_t bytes) {
    int gpu = lock_gpu();
    if (gpu < 0) return true;
    bool fits = bytes <= booked || bytes <= usable(gpu);
    sim_slot *data = fits ? own_slot(gpu, SLOT_DATA, bytes > 0) : NULL;
    if (!fits) {
        S->devices[gpu].oom_count++;
    } else if (data) {
        if (bytes) {
            sim_slot *context = own_slot(gpu, SLOT_CONTEXT, S->context > 0);
            if (context) context->size = S->context;
        }
        data->size = bytes;
        if (!bytes) data->state = SLOT_FREE;
        survey(); /* for the peak */
    }
    finish(0);
    return fits;
}

/* --- the next layer --- */

static PFN_vkGetInstanceProcAddr next_instance;
static PFN_vkGetDeviceProcAddr next_device;

/* Looked up while the instance is made: later the loader would answer with this layer. */
static PFN_vkGetPhysicalDeviceProperties next_properties;
static PFN_vkGetPhysicalDeviceProperties2 next_properties2;
static PFN_vkGetPhysicalDeviceMemoryProperties next_memory;
static PFN_vkGetPhysicalDeviceMemoryProperties2 next_memory2;
static PFN_vkEnumerateDeviceExtensionProperties next_extensions;
static PFN_vkAllocateMemory next_allocate;
static PFN_vkFreeMemory next_free;
static PFN_vkGetBufferMemoryRequirements next_requirements;
static PFN_vkGetBufferMemoryRequirements2 next_requirements2;

/* --- the device's properties --- */

static void describe_device(VkPhysicalDeviceProperties *properties) {
    int gpu = lock_gpu();
    if (gpu < 0) return;
    properties->deviceType = VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU;
    snprintf(properties->deviceName, sizeof properties->deviceName, "%s", S->devices[gpu].name);
    /* llvmpipe's 128 MiB would keep larger tensors on the CPU. */
    properties->limits.maxStorageBufferRange = UINT32_MAX;
    finish(0);
}

static void describe_memory(VkPhysicalDeviceMemoryProperties *properties) {
    int gpu = lock_gpu();
    if (gpu < 0) return;
    VkMemoryPropertyFlags mapped = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT |
                                   VK_MEMORY_PROPERTY_HOST_COHERENT_BIT |
                                   VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
    VkMemoryPropertyFlags local = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
    uint64_t total = S->devices[gpu].total - S->devices[gpu].reserved;
    properties->memoryTypeCount = properties->memoryHeapCount = 2;
    properties->memoryTypes[HOST] = (VkMemoryType){mapped, HOST};
    properties->memoryTypes[DEVICE] = (VkMemoryType){mapped | local, DEVICE};
    properties->memoryHeaps[HOST] = (VkMemoryHeap){HOST_HEAP_BYTES, 0};
    properties->memoryHeaps[DEVICE] = (VkMemoryHeap){total, VK_MEMORY_HEAP_DEVICE_LOCAL_BIT};
    finish(0);
}

static void describe_budget(VkPhysicalDeviceMemoryBudgetPropertiesEXT *budget) {
    int gpu = lock_gpu();
    if (gpu < 0) return;
    budget->heapBudget[HOST] = HOST_HEAP_BYTES;
    budget->heapUsage[HOST] = 0;
    budget->heapBudget[DEVICE] = usable(gpu);
    const sim_slot *data = own_slot(gpu, SLOT_DATA, false);
    uint64_t own = data ? data->size : 0;
    budget->heapUsage[DEVICE] = own < budget->heapBudget[DEVICE] ? own : budget->heapBudget[DEVICE];
    finish(0);
}

static VKAPI_ATTR void VKAPI_CALL get_properties(VkPhysicalDevice device,
                                                 VkPhysicalDeviceProperties *out) {
    next_properties(device, out);
    describe_device(out);
}

static VKAPI_ATTR void VKAPI_CALL get_properties2(VkPhysicalDevice device,
                                                  VkPhysicalDeviceProperties2 *out) {
    next_properties2(device, out);
    describe_device(&out->properties);
}

static VKAPI_ATTR void VKAPI_CALL get_memory(VkPhysicalDevice device,
                                             VkPhysicalDeviceMemoryProperties *out) {
    next_memory(device, out);
    describe_memory(out);
}

static VKAPI_ATTR void VKAPI_CALL get_memory2(VkPhysicalDevice device,
                                              VkPhysicalDeviceMemoryProperties2 *out) {
    next_memory2(device, out);
    describe_memory(&out->memoryProperties);
    for (VkBaseOutStructure *part = out->pNext; part; part = part->pNext) {
        if (part->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT) {
            describe_budget((VkPhysicalDeviceMemoryBudgetPropertiesEXT *)part);
        }
    }
}

/* What the device has, and the budget that it has through this layer. */
static VKAPI_ATTR VkResult VKAPI_CALL enumerate_extensions(VkPhysicalDevice device,
                                                           const char *layer, uint32_t *count,
                                                           VkExtensionProperties *out) {
    if (layer && !strcmp(layer, LAYER_NAME)) {
        *count = 0;
        return VK_SUCCESS;
    }
    uint32_t room = *count, known = 0;
    VkResult result = next_extensions(device, layer, &known, NULL);
    if (result) return result;
    *count = known + 1;
    if (!out) return VK_SUCCESS;
    if (room <= known) {
        *count = room;
        return next_extensions(device, layer, count, out) < 0 ? VK_ERROR_UNKNOWN : VK_INCOMPLETE;
    }
    result = next_extensions(device, layer, &known, out);
    if (result) return result;
    memset(&out[known], 0, sizeof *out);
    strcpy(out[known].extensionName, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
    out[known].specVersion = 1;
    return VK_SUCCESS;
}

/* --- the device's memory --- */

static VKAPI_ATTR VkResult VKAPI_CALL allocate(VkDevice device, const VkMemoryAllocateInfo *info,
                                               const VkAllocationCallbacks *callbacks,
                                               VkDeviceMemory *out) {
    VkMemoryAllocateInfo plain = *info;
    plain.memoryTypeIndex = 0; /* llvmpipe's only one */
    if (info->memoryTypeIndex != DEVICE) return next_allocate(device, &plain, callbacks, out);
    pthread_mutex_lock(&booking);
    VkResult result = VK_ERROR_OUT_OF_DEVICE_MEMORY;
    if (allocation_count < ALLOCATION_LIMIT && book(booked + info->allocationSize)) {
        result = next_allocate(device, &plain, callbacks, out);
        if (result == VK_SUCCESS) {
            booked += info->allocationSize;
            allocations[allocation_count].memory = *out;
            allocations[allocation_count++].size = info->allocationSize;
        } else {
            book(booked);
        }
    }
    pthread_mutex_unlock(&booking);
    return result;
}

static VKAPI_ATTR void VKAPI_CALL free_memory(VkDevice device, VkDeviceMemory memory,
                                              const VkAllocationCallbacks *callbacks) {
    next_free(device, memory, callbacks);
    pthread_mutex_lock(&booking);
    for (unsigned i = 0; i < allocation_count; i++) {
        if (allocations[i].memory != memory) continue;
        uint64_t left = booked - allocations[i].size;
        allocations[i] = allocations[--allocation_count];
        book(left);
        booked = left;
        break;
    }
    pthread_mutex_unlock(&booking);
}

static VKAPI_ATTR void VKAPI_CALL get_requirements(VkDevice device, VkBuffer buffer,
                                                   VkMemoryRequirements *out) {
    next_requirements(device, buffer, out);
    out->memoryTypeBits = 1u << HOST | 1u << DEVICE;
}

static VKAPI_ATTR void VKAPI_CALL get_requirements2(VkDevice device,
                                                    const VkBufferMemoryRequirementsInfo2 *info,
                                                    VkMemoryRequirements2 *out) {
    next_requirements2(device, info, out);
    out->memoryRequirements.memoryTypeBits = 1u << HOST | 1u << DEVICE;
}

/* --- instance, device, and the names of all functions --- */

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo *info,
                                                      const VkAllocationCallbacks *callbacks,
                                                      VkInstance *out) {
    VkLayerInstanceCreateInfo *link = (VkLayerInstanceCreateInfo *)info->pNext;
    while (link && (link->sType != VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO ||
                    link->function != VK_LAYER_LINK_INFO)) {
        link = (VkLayerInstanceCreateInfo *)link->pNext;
    }
    if (!link) return VK_ERROR_INITIALIZATION_FAILED;
    next_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    PFN_vkCreateInstance create = (PFN_vkCreateInstance)next_instance(NULL, "vkCreateInstance");
    VkResult result = create ? create(info, callbacks, out) : VK_ERROR_INITIALIZATION_FAILED;
    if (result != VK_SUCCESS) return result;
#define FIND(variable, name) variable = (PFN_##name)next_instance(*out, #name)
    FIND(next_properties, vkGetPhysicalDeviceProperties);
    FIND(next_properties2, vkGetPhysicalDeviceProperties2);
    FIND(next_memory, vkGetPhysicalDeviceMemoryProperties);
    FIND(next_memory2, vkGetPhysicalDeviceMemoryProperties2);
    FIND(next_extensions, vkEnumerateDeviceExtensionProperties);
#undef FIND
    return VK_SUCCESS;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_device(VkPhysicalDevice physical,
                                                    const VkDeviceCreateInfo *info,
                                                    const VkAllocationCallbacks *callbacks,
                                                    VkDevice *out) {
    VkLayerDeviceCreateInfo *link = (VkLayerDeviceCreateInfo *)info->pNext;
    while (link && (link->sType != VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO ||
                    link->function != VK_LAYER_LINK_INFO)) {
        link = (VkLayerDeviceCreateInfo *)link->pNext;
    }
    if (!link || info->enabledExtensionCount > 256) return VK_ERROR_INITIALIZATION_FAILED;
    PFN_vkGetInstanceProcAddr instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    next_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    /* The software device does not know the extension that is added here. */
    const char *names[256];
    VkDeviceCreateInfo plain = *info;
    plain.ppEnabledExtensionNames = names;
    plain.enabledExtensionCount = 0;
    for (uint32_t i = 0; i < info->enabledExtensionCount; i++) {
        const char *name = info->ppEnabledExtensionNames[i];
        if (strcmp(name, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME) != 0) {
            names[plain.enabledExtensionCount++] = name;
        }
    }
    PFN_vkCreateDevice create = (PFN_vkCreateDevice)instance(NULL, "vkCreateDevice");
    VkResult result =
        create ? create(physical, &plain, callbacks, out) : VK_ERROR_INITIALIZATION_FAILED;
    if (result != VK_SUCCESS) return result;
#define FIND(variable, name) variable = (PFN_##name)next_device(*out, #name)
    FIND(next_allocate, vkAllocateMemory);
    FIND(next_free, vkFreeMemory);
    FIND(next_requirements, vkGetBufferMemoryRequirements);
    FIND(next_requirements2, vkGetBufferMemoryRequirements2);
#undef FIND
    return VK_SUCCESS;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL instance_function(VkInstance instance,
                                                                  const char *name);
static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL device_function(VkDevice device, const char *name);

static const struct { const char *name; PFN_vkVoidFunction function; bool is_of_device; } own[] = {
#define OWN(name, function, is_of_device) {name, (PFN_vkVoidFunction)function, is_of_device}
    OWN("vkGetInstanceProcAddr", instance_function, false),
    OWN("vkGetDeviceProcAddr", device_function, true),
    OWN("vkCreateInstance", create_instance, false),
    OWN("vkCreateDevice", create_device, false),
    OWN("vkGetPhysicalDeviceProperties", get_properties, false),
    OWN("vkGetPhysicalDeviceProperties2", get_properties2, false),
    OWN("vkGetPhysicalDeviceProperties2KHR", get_properties2, false),
    OWN("vkGetPhysicalDeviceMemoryProperties", get_memory, false),
    OWN("vkGetPhysicalDeviceMemoryProperties2", get_memory2, false),
    OWN("vkGetPhysicalDeviceMemoryProperties2KHR", get_memory2, false),
    OWN("vkEnumerateDeviceExtensionProperties", enumerate_extensions, false),
    OWN("vkAllocateMemory", allocate, true),
    OWN("vkFreeMemory", free_memory, true),
    OWN("vkGetBufferMemoryRequirements", get_requirements, true),
    OWN("vkGetBufferMemoryRequirements2", get_requirements2, true),
    OWN("vkGetBufferMemoryRequirements2KHR", get_requirements2, true),
#undef OWN
};

static PFN_vkVoidFunction own_function(const char *name, bool of_device) {
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        if ((own[i].is_of_device || !of_device) && !strcmp(own[i].name, name)) return own[i].function;
    }
    return NULL;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL instance_function(VkInstance instance,
                                                                  const char *name) {
    PFN_vkVoidFunction function = own_function(name, false);
    if (function) return function;
    return next_instance ? next_instance(instance, name) : NULL;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL device_function(VkDevice device, const char *name) {
    PFN_vkVoidFunction function = own_function(name, true);
    return function ? function : next_device(device, name);
}

__attribute__((visibility("default"))) VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface *versions) {
    if (versions->loaderLayerInterfaceVersion < 2) return VK_ERROR_INITIALIZATION_FAILED;
    versions->loaderLayerInterfaceVersion = 2;
    versions->pfnGetInstanceProcAddr = instance_function;
    versions->pfnGetDeviceProcAddr = device_function;
    versions->pfnGetPhysicalDeviceProcAddr = NULL;
    return VK_SUCCESS;
}
