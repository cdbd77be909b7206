/* The shared state as the NVML functions see it: mapped once, locked for each call.
 *
 * The lock is flock on a descriptor opened for that one call: it excludes threads as
 * well as processes, and is released by the operating system when its holder dies.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "layout.h"
#include "codes.h"

static sim_state *S;                 /* the mapped file */
static char state_path[4096];
static int references;               /* nvmlInit calls minus nvmlShutdown calls */
static int lock_descriptor = -1;     /* valid while the lock is held */
static uint64_t held[DEVICE_LIMIT];  /* bytes allocated per record, while locked */

static uint64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void pause_for(double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t ns = (uint64_t)until.tv_nsec + (uint64_t)(seconds * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000u);
    until.tv_nsec = (long)(ns % 1000000000u);
    /* A signal does not end a hang in the real driver either. */
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
    }
}

static int map_state(void) {
    if (S) return NVML_SUCCESS;
    const char *path = getenv("GPUSHARE_SIM_STATE");
    if (!path || !*path || strlen(path) >= sizeof state_path) return NVML_ERROR_DRIVER_NOT_LOADED;
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0) {
        return errno == EACCES ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_DRIVER_NOT_LOADED;
    }
    struct stat info;
    void *map = MAP_FAILED;
    if (fstat(descriptor, &info) == 0 && info.st_size == (off_t)sizeof(sim_state)) {
        map = mmap(NULL, sizeof(sim_state), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    }
    close(descriptor);
    if (map == MAP_FAILED) return NVML_ERROR_UNKNOWN;
    sim_state *state = map;
    if (state->magic != MAGIC || state->version != VERSION) {
        munmap(map, sizeof(sim_state));
        return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    }
    strcpy(state_path, path);
    S = state;
    return NVML_SUCCESS;
}

static bool lock(void) {
    int descriptor = open(state_path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0) return false;
    while (flock(descriptor, LOCK_EX) != 0) {
        if (errno != EINTR) {
            close(descriptor);
            return false;
        }
    }
    lock_descriptor = descriptor;
    return true;
}

static int finish(int code) {
    int descriptor = lock_descriptor;
    lock_descriptor = -1;
    /* Not by close alone: a child forked meanwhile has a copy that keeps the lock. */
    flock(descriptor, LOCK_UN);
    close(descriptor);
    return code;
}

static bool is_alive(uint32_t pid, uint64_t started) {
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) return false;
    ssize_t length = read(descriptor, text, sizeof text - 1);
    close(descriptor);
    if (length <= 0) return false;
    text[length] = 0;
    /* The command in parentheses may itself hold spaces and parentheses. */
    const char *rest = strrchr(text, ')');
    char state;
    unsigned long long ticks;
    if (!rest || sscanf(rest + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d"
                        " %*d %*d %*d %*d %llu", &state, &ticks) != 2) {
        return false;
    }
    /* A zombie has closed its files, the GPU's among them. */
    return state != 'Z' && state != 'X' && ticks == started;
}

static uint64_t used(uint32_t record) {
    if (!S->devices[record].mig_enabled) return S->devices[record].foreign + held[record];
    uint64_t sum = 0;
    for (uint32_t i = S->gpu_count; i < S->device_count; i++) {
        if (S->devices[i].parent == (int32_t)record) sum += S->devices[i].foreign + held[i];
    }
    return sum;
}

/* Take from the dead what they held, and sum up what the living hold. */
static void survey(void) {
    static struct { uint32_t pid; uint64_t started; bool alive; } known[64];
    unsigned known_count = 0;
    uint64_t now = monotonic_ns();
    uint32_t end = 0;
    memset(held, 0, sizeof held);
    for (uint32_t i = 0; i < S->slot_count && i < SLOT_LIMIT; i++) {
        sim_slot *slot = &S->slots[i];
        if (slot->state == SLOT_FREE || slot->device >= S->device_count) continue;
        unsigned k = 0;
        while (k < known_count && (known[k].pid != slot->pid || known[k].started != slot->started)) k++;
        bool alive = k < known_count ? known[k].alive : is_alive(slot->pid, slot->started);
        if (k == known_count && k < 64) {
            known[k].pid = slot->pid;
            known[k].started = slot->started;
            known[k].alive = alive;
            known_count++;
        }
        if (!alive) {
            if (!slot->dead_at) slot->dead_at = now;
            if (now - slot->dead_at >= S->late_free) {
                slot->state = SLOT_FREE;
                continue;
            }
        }
        held[slot->device] += slot->size;
        end = i + 1;
    }
    S->slot_count = end;
    for (uint32_t i = 0; i < S->device_count; i++) {
        if (used(i) > S->devices[i].peak_used) S->devices[i].peak_used = used(i);
    }
}

static bool applies(const sim_injection *injection, const char *function, int record) {
    size_t length = strnlen(injection->function, sizeof injection->function);
    bool prefix = length && injection->function[length - 1] == '*';
    if (prefix ? strncmp(injection->function, function, length - 1) != 0
               : strncmp(injection->function, function, sizeof injection->function) != 0) {
        return false;
    }
    return injection->device == ANY_DEVICE || injection->device == record;
}

/* Lock the state and bring it up to date, or return the code to answer with.
 *
 * `record` is the device that the call is about, or ANY_DEVICE. After NVML_SUCCESS the
 * caller must end with finish().
 */
static int begin(const char *function, int record) {
    int code = NVML_SUCCESS;
    double delay = 0;
    if (!lock()) return NVML_ERROR_UNKNOWN; /* the file is gone: as if the device were */
    for (uint32_t i = 0; i < S->injection_count && i < INJECTION_LIMIT; i++) {
        sim_injection *injection = &S->injections[i];
        if (!applies(injection, function, record)) continue;
        uint32_t call = injection->calls++;
        if (call < injection->first) continue;
        if (injection->count && call - injection->first >= injection->count) continue;
        if (injection->delay > delay) delay = injection->delay;
        if (!code) code = injection->code;
    }
    if (delay > 0) {
        finish(0); /* others must not wait for this one */
        pause_for(delay);
        if (!lock()) return NVML_ERROR_UNKNOWN;
    }
    if (code) return finish(code);
    survey();
    return NVML_SUCCESS;
}
