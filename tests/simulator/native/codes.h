/* NVML's return codes and structures, as in nvml.h. */
enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_UNKNOWN = 999,
};

#define NVML_VALUE_NOT_AVAILABLE UINT64_MAX
#define NVML_MEMORY_V2 0x02000028u

typedef struct { uint64_t total, free, used; } nvml_memory_v1;
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } nvml_memory_v2;
typedef struct { uint32_t pid; uint64_t used; } nvml_process_v1;
typedef struct { uint32_t pid; uint64_t used; uint32_t gpu_instance, compute_instance; } nvml_process_v3;
typedef struct { uint32_t gpu, memory; } nvml_utilization;
typedef struct {
    char bus_id_legacy[16];
    uint32_t domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} nvml_pci_info;

_Static_assert(sizeof(nvml_memory_v1) == 24, "memory v1");
_Static_assert(sizeof(nvml_memory_v2) == 40, "memory v2");
_Static_assert(sizeof(nvml_process_v1) == 16, "process v1");
_Static_assert(sizeof(nvml_process_v3) == 24, "process v3");
_Static_assert(sizeof(nvml_pci_info) == 68, "PCI info");

static const struct { int code; const char *text; } nvml_errors[] = {
    {0, "Success"}, {1, "Uninitialized"}, {2, "Invalid Argument"}, {3, "Not Supported"},
    {4, "Insufficient Permissions"}, {5, "Already Initialized"}, {6, "Not Found"},
    {7, "Insufficient Size"}, {8, "Insufficient External Power"}, {9, "Driver Not Loaded"},
    {10, "Timeout"}, {11, "Interrupt Request Issue"}, {12, "NVML Shared Library Not Found"},
    {13, "Function Not Found"}, {14, "Corrupted infoROM"}, {15, "GPU is lost"},
    {16, "GPU requires restart"}, {17, "The operating system has blocked the request."},
    {18, "RM has detected an NVML/RM version mismatch."}, {19, "In use by another client"},
    {20, "Insufficient Memory"}, {25, "Argument version mismatch"}, {999, "Unknown Error"},
};
