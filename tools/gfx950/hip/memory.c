/* Memory: allocations, copies and fills.
 *
 * Everything lies in one arena: a sparse file that only this process and its executor map.  No address is
 * ever given out twice and every allocation is followed by a page that is never accessible, so each
 * access outside a live allocation is told from one inside: by the executor for kernels, by the checks
 * below for copies, by a fault for the host.  New device memory holds ones in every bit, which is NaN in
 * every float format; freed memory is gone.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };
static const size_t ARENA_BYTES = (size_t)1 << 40;
/* Where it may lie: far from where programs and libraries are, so that the executor has room there too. */
enum { FIRST_PLACE = 0x20, LAST_PLACE = 0x3f }; /* in units of its size */

pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;

static struct {
  int file;
  unsigned char *base; /* NULL until it is made */
  size_t used;         /* bytes from `base` that were given out at some time */
  size_t live;         /* bytes allocated now */
} arena = {.file = -1};

static struct {
  struct allocation *items; /* by address, since addresses only grow */
  size_t count, capacity;
} live;

static struct {
  struct range *items;
  size_t count, capacity;
} written;

int arena_file(void) { return arena.file; }
uint64_t arena_base(void) { return (uintptr_t)arena.base; }
uint64_t arena_size(void) { return ARENA_BYTES; }

const struct allocation *allocations(size_t *count) {
  *count = live.count;
  return live.items;
}

const struct range *host_writes(size_t *count) {
  *count = written.count;
  return written.items;
}

void forget_host_writes(void) { written.count = 0; }

/* Room for one more item; false when memory is out. */
static bool reserve(void **items, size_t count, size_t *capacity, size_t item) {
  if (count < *capacity)
    return true;
  size_t larger = *capacity ? 2 * *capacity : 64;
  void *moved = realloc(*items, larger * item);
  if (moved == NULL)
    return false;
  *items = moved;
  *capacity = larger;
  return true;
}

static void *map_arena(int file) {
  for (size_t place = FIRST_PLACE; place <= LAST_PLACE; place++) {
    void *wanted = (void *)(place * ARENA_BYTES);
    void *base =
        mmap(wanted, ARENA_BYTES, PROT_NONE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, file, 0);
    if (base == wanted)
      return base;
    if (base != MAP_FAILED)
      munmap(base, ARENA_BYTES); /* a kernel that does not know the flag */
  }
  return NULL;
}

static bool make_arena(void) {
  if (arena.base != NULL)
    return true;
  int file = memfd_create("vmfuse-emulated-hip", MFD_CLOEXEC);
  if (file < 0)
    return false;
  if (ftruncate(file, (off_t)ARENA_BYTES) == 0)
    arena.base = map_arena(file);
  if (arena.base == NULL)
    return close(file), false;
  arena.file = file;
  return true;
}

static size_t pages(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

/* What an allocation takes of the arena; registered memory is there twice, the second time as it was before a
 * launch. */
static size_t span_of(size_t size, enum memory_kind kind) {
  return pages(size) * (kind == REGISTERED_MEMORY ? 2 : 1);
}

static size_t physical_memory(void) {
  return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
}

/* -- allocating ------------------------------------------------------------------------------------ */

/* Hold `memory_lock`. */
static hipError_t allocate_locked(void **result, size_t size, enum memory_kind kind, void *host,
                                  const char *function) {
  size_t span = span_of(size, kind),
         limit = physical_memory() < machine()->memory_bytes ? physical_memory() : machine()->memory_bytes;
  if (size > limit || arena.live + span > limit)
    return fail(hipErrorOutOfMemory, function, "%zu bytes wanted, %zu of %zu in use", size, arena.live,
                limit);
  if (!make_arena() || !reserve((void **)&live.items, live.count, &live.capacity, sizeof *live.items))
    return fail(hipErrorOutOfMemory, function, "the host gives no memory for %zu bytes", size);
  if (arena.used + span + PAGE > ARENA_BYTES)
    return fail(hipErrorOutOfMemory, function, "the addresses of the arena are used up: restart the process");
  unsigned char *base = arena.base + arena.used;
  if (mprotect(base, span, PROT_READ | PROT_WRITE) != 0)
    return fail(hipErrorOutOfMemory, function, "the host maps no %zu bytes", span);
  if (kind == DEVICE_MEMORY || kind == MANAGED_MEMORY)
    memset(base, 0xff, size);
  live.items[live.count++] = (struct allocation){(uintptr_t)base, size, kind, host};
  arena.used += span + PAGE;
  arena.live += span;
  *result = base;
  return hipSuccess;
}

static hipError_t allocate(void **result, size_t size, enum memory_kind kind, void *host,
                           const char *function) {
  if (machine() == NULL)
    return fail(hipErrorNotInitialized, function, "hipInit failed or was not called");
  if (result == NULL)
    return fail(hipErrorInvalidValue, function, "the pointer to the result is NULL");
  *result = NULL;
  if (size == 0)
    return hipSuccess;
  pthread_mutex_lock(&memory_lock);
  hipError_t error = allocate_locked(result, size, kind, host, function);
  pthread_mutex_unlock(&memory_lock);
  return error;
}

/* The live allocation that holds `address`, or NULL; hold `memory_lock`. */
static struct allocation *find(uint64_t address) {
  size_t low = 0, high = live.count;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (live.items[middle].base + live.items[middle].size <= address)
      low = middle + 1;
    else
      high = middle;
  }
  return low < live.count && live.items[low].base <= address ? &live.items[low] : NULL;
}

/* Hold `memory_lock`. */
static void release(struct allocation *allocation) {
  size_t span = span_of(allocation->size, allocation->kind), offset = allocation->base - arena_base();
  fallocate(arena.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)span);
  mprotect(arena.base + offset, span, PROT_NONE);
  arena.live -= span;
  size_t index = (size_t)(allocation - live.items);
  memmove(allocation, allocation + 1, (--live.count - index) * sizeof *allocation);
}

static hipError_t deallocate(void *pointer, bool host, const char *function) {
  if (pointer == NULL)
    return hipSuccess;
  hipError_t error = hipSuccess;
  pthread_mutex_lock(&memory_lock);
  struct allocation *allocation = find((uintptr_t)pointer);
  if (allocation == NULL || allocation->base != (uintptr_t)pointer)
    error = fail(hipErrorInvalidValue, function,
                 "%p is not the beginning of an allocation, or was freed before", pointer);
  else if (host != (allocation->kind == HOST_MEMORY) || allocation->kind == REGISTERED_MEMORY)
    error = fail(hipErrorInvalidValue, function, "%p was allocated by another function", pointer);
  else
    release(allocation);
  pthread_mutex_unlock(&memory_lock);
  return error;
}

EXPORT hipError_t hipMalloc(void **pointer, size_t size) {
  return allocate(pointer, size, DEVICE_MEMORY, NULL, __func__);
}

EXPORT hipError_t hipMallocAsync(void **pointer, size_t size, hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return allocate(pointer, size, DEVICE_MEMORY, NULL, __func__);
}

EXPORT hipError_t hipMallocManaged(hipDeviceptr_t *pointer, size_t size, unsigned int flags) {
  if (flags != hipMemAttachGlobal)
    return FAIL(hipErrorInvalidValue, "flags must be hipMemAttachGlobal, got 0x%x", flags);
  return allocate(pointer, size, MANAGED_MEMORY, NULL, __func__);
}

EXPORT hipError_t hipHostMalloc(void **pointer, size_t size, unsigned int flags) {
  if (flags & ~(unsigned)hipHostMallocKnownFlags)
    return FAIL(hipErrorInvalidValue, "unknown flags 0x%x", flags);
  return allocate(pointer, size, HOST_MEMORY, NULL, __func__);
}

EXPORT hipError_t hipFree(void *pointer) { return deallocate(pointer, false, __func__); }

EXPORT hipError_t hipFreeAsync(void *pointer, hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return deallocate(pointer, false, __func__);
}

EXPORT hipError_t hipHostFree(void *pointer) { return deallocate(pointer, true, __func__); }

EXPORT hipError_t hipMemPrefetchAsync(const void *pointer, size_t size, int device, hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  pthread_mutex_lock(&memory_lock);
  const struct allocation *allocation = find((uintptr_t)pointer);
  bool managed = allocation && allocation->kind == MANAGED_MEMORY &&
                 (uintptr_t)pointer + size <= allocation->base + allocation->size;
  pthread_mutex_unlock(&memory_lock);
  return managed ? hipSuccess
                 : FAIL(hipErrorInvalidValue, "%zu bytes at %p for device %d: not managed memory", size,
                        pointer, device);
}

/* -- memory of the host that the device is to see: a copy of it in the arena ----------------------- */

/* The registration of `host`, or NULL; hold `memory_lock`. */
static struct allocation *find_registered(const void *host) {
  for (size_t i = 0; i < live.count; i++) {
    struct allocation *item = &live.items[i];
    if (item->kind == REGISTERED_MEMORY && (uintptr_t)host - (uintptr_t)item->host < item->size)
      return item;
  }
  return NULL;
}

EXPORT hipError_t hipHostRegister(void *host, size_t size, unsigned int flags) {
  void *device;
  if (flags & ~(unsigned)hipHostRegisterKnownFlags)
    return FAIL(hipErrorInvalidValue, "unknown flags 0x%x", flags);
  if (host == NULL || size == 0)
    return FAIL(hipErrorInvalidValue, "%zu bytes at %p", size, host);
  pthread_mutex_lock(&memory_lock);
  bool known = find_registered(host) != NULL;
  pthread_mutex_unlock(&memory_lock);
  if (known)
    return FAIL(hipErrorHostMemoryAlreadyRegistered, "%p is registered", host);
  return allocate(&device, size, REGISTERED_MEMORY, host, __func__);
}

EXPORT hipError_t hipHostUnregister(void *host) {
  pthread_mutex_lock(&memory_lock);
  struct allocation *found = find_registered(host);
  bool is = found != NULL && found->host == host;
  if (is)
    release(found);
  pthread_mutex_unlock(&memory_lock);
  return is ? hipSuccess : FAIL(hipErrorHostMemoryNotRegistered, "%p is not registered", host);
}

EXPORT hipError_t hipHostGetDevicePointer(void **device, void *host, unsigned int flags) {
  if (flags != 0)
    return FAIL(hipErrorInvalidValue, "flags must be 0, got %u", flags);
  *device = NULL;
  pthread_mutex_lock(&memory_lock);
  struct allocation *found = find((uintptr_t)host);
  if (found != NULL)
    *device = host;
  else if ((found = find_registered(host)) != NULL)
    *device =
        (unsigned char *)(uintptr_t)found->base + ((unsigned char *)host - (unsigned char *)found->host);
  pthread_mutex_unlock(&memory_lock);
  return *device ? hipSuccess
                 : FAIL(hipErrorInvalidValue, "%p was neither allocated here nor registered", host);
}

void registered_to_device(void) {
  for (size_t i = 0; i < live.count; i++) {
    const struct allocation *item = &live.items[i];
    if (item->kind != REGISTERED_MEMORY)
      continue;
    unsigned char *device = (unsigned char *)(uintptr_t)item->base;
    memcpy(device, item->host, item->size);
    memcpy(device + pages(item->size), device, item->size);
  }
}

/* Only what a launch changed: the rest may be read-only for this process, or be changed by it meanwhile. */
void registered_to_host(void) {
  for (size_t i = 0; i < live.count; i++) {
    const struct allocation *item = &live.items[i];
    if (item->kind != REGISTERED_MEMORY)
      continue;
    const unsigned char *now = (unsigned char *)(uintptr_t)item->base, *before = now + pages(item->size);
    if (memcmp(now, before, item->size) == 0)
      continue;
    for (size_t at = 0; at < item->size; at++)
      if (now[at] != before[at])
        ((unsigned char *)item->host)[at] = now[at];
  }
}

/* -- copying and filling --------------------------------------------------------------------------- */

/* One side of a transfer: where its bytes are for this process, and what memory that is. */
struct side {
  unsigned char *bytes;
  bool in_arena, host;
};

/* Check [pointer, pointer + size) and find its bytes; hold `memory_lock`. */
static hipError_t resolve(struct side *side, const void *pointer, size_t size, const char *which,
                          const char *function) {
  uint64_t address = (uintptr_t)pointer;
  *side = (struct side){(unsigned char *)pointer, address - arena_base() < ARENA_BYTES && arena.base, true};
  if (!side->in_arena)
    return pointer ? hipSuccess : fail(hipErrorInvalidValue, function, "the %s is NULL", which);
  const struct allocation *allocation = find(address);
  if (allocation == NULL)
    return fail(hipErrorInvalidDevicePointer, function, "the %s %p is in no allocation, or in a freed one",
                which, pointer);
  uint64_t offset = address - allocation->base;
  if (size > allocation->size - offset)
    return fail(hipErrorInvalidValue, function,
                "the %s goes on for %zu bytes at offset %" PRIu64 " of an allocation of %" PRIu64, which,
                size, offset, allocation->size);
  side->host = allocation->kind == HOST_MEMORY || allocation->kind == MANAGED_MEMORY;
  if (allocation->kind == REGISTERED_MEMORY)
    side->bytes = (unsigned char *)allocation->host + offset;
  return hipSuccess;
}

/* Note that the host wrote to memory of the device; hold `memory_lock`. */
static hipError_t note_write(const void *pointer, size_t size, const char *function) {
  if (!reserve((void **)&written.items, written.count, &written.capacity, sizeof *written.items))
    return fail(hipErrorOutOfMemory, function, "no host memory is left");
  written.items[written.count++] = (struct range){(uintptr_t)pointer, size};
  return hipSuccess;
}

static hipError_t check_side(const struct side *side, bool device, const char *which, const char *function) {
  if (device ? side->in_arena : side->host)
    return hipSuccess;
  return fail(hipErrorInvalidMemcpyDirection, function, "the %s %p is %s memory", which, (void *)side->bytes,
              device ? "plain host" : "device");
}

static hipError_t copy_locked(void *dst, const void *src, size_t size, hipMemcpyKind kind,
                              const char *function) {
  struct side to, from;
  if (kind < hipMemcpyHostToHost || kind > hipMemcpyDefault)
    return fail(hipErrorInvalidMemcpyDirection, function, "there is no direction %d", kind);
  if (size == 0)
    return hipSuccess;
  TRY(resolve(&to, dst, size, "destination", function));
  TRY(resolve(&from, src, size, "source", function));
  if (kind != hipMemcpyDefault) {
    TRY(check_side(&to, kind == hipMemcpyHostToDevice || kind == hipMemcpyDeviceToDevice, "destination",
                   function));
    TRY(check_side(&from, kind == hipMemcpyDeviceToHost || kind == hipMemcpyDeviceToDevice, "source",
                   function));
  }
  memmove(to.bytes, from.bytes, size);
  return to.in_arena ? note_write(dst, size, function) : hipSuccess;
}

hipError_t copy(void *dst, const void *src, size_t size, hipMemcpyKind kind, const char *function) {
  pthread_mutex_lock(&memory_lock);
  hipError_t error = copy_locked(dst, src, size, kind, function);
  pthread_mutex_unlock(&memory_lock);
  return error;
}

static hipError_t fill_locked(void *dst, uint32_t value, unsigned element, size_t count,
                              const char *function) {
  struct side to;
  if (element != 1 && element != 2 && element != 4)
    return fail(hipErrorInvalidValue, function, "elements have 1, 2 or 4 bytes, not %u", element);
  if (count == 0)
    return hipSuccess;
  if (count > SIZE_MAX / element || (uintptr_t)dst % element)
    return fail(hipErrorInvalidValue, function, "%zu elements of %u bytes at %p", count, element, dst);
  TRY(resolve(&to, dst, count * element, "destination", function));
  TRY(check_side(&to, true, "destination", function));
  for (size_t i = 0; i < count; i++)
    memcpy(to.bytes + i * element, &value, element); /* little endian */
  return note_write(dst, count * element, function);
}

hipError_t fill(void *dst, uint32_t value, unsigned element, size_t count, const char *function) {
  pthread_mutex_lock(&memory_lock);
  hipError_t error = fill_locked(dst, value, element, count, function);
  pthread_mutex_unlock(&memory_lock);
  return error;
}

EXPORT hipError_t hipMemcpy(void *dst, const void *src, size_t size, hipMemcpyKind kind) {
  return copy(dst, src, size, kind, __func__);
}

EXPORT hipError_t hipMemcpyAsync(void *dst, const void *src, size_t size, hipMemcpyKind kind,
                                 hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return copy(dst, src, size, kind, __func__);
}

EXPORT hipError_t hipMemcpyHtoDAsync(hipDeviceptr_t dst, void *src, size_t size, hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return copy(dst, src, size, hipMemcpyHostToDevice, __func__);
}

EXPORT hipError_t hipMemset(void *dst, int value, size_t size) {
  return fill(dst, (uint32_t)value, 1, size, __func__);
}

EXPORT hipError_t hipMemsetAsync(void *dst, int value, size_t size, hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return fill(dst, (uint32_t)value, 1, size, __func__);
}

EXPORT hipError_t hipMemsetD8Async(hipDeviceptr_t dst, unsigned char value, size_t count,
                                   hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return fill(dst, value, 1, count, __func__);
}

EXPORT hipError_t hipMemsetD16Async(hipDeviceptr_t dst, unsigned short value, size_t count,
                                    hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return fill(dst, value, 2, count, __func__);
}

EXPORT hipError_t hipMemsetD32Async(hipDeviceptr_t dst, int value, size_t count, hipStream_t stream) {
  TRY(check_stream(stream, __func__));
  return fill(dst, (uint32_t)value, 4, count, __func__);
}
