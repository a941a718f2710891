/* What the files of the stand-in share: how a function fails, what a handle is, and where memory is. */
#ifndef VMFUSE_HIP_INTERNAL_H
#define VMFUSE_HIP_INTERNAL_H

#include "abi.h"

#include <pthread.h>
#include <stdbool.h>

#define EXPORT __attribute__((visibility("default")))

/* Print why `function` fails and keep the sentence for hipGetErrorString; returns `code`. */
hipError_t fail(hipError_t code, const char *function, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
#define FAIL(code, ...) fail(code, __func__, __VA_ARGS__)

/* Leave the enclosing function with the error of `call`, which has been reported. */
#define TRY(call)              \
  do {                         \
    hipError_t tried = (call); \
    if (tried != hipSuccess)   \
      return tried;            \
  } while (0)

/* Handles: every object given out is on one list, so a stale or foreign pointer is never dereferenced. */
enum object_kind { CONTEXT, STREAM, EVENT, MODULE, FUNCTION, GRAPH, GRAPH_PROGRAM };
struct object {
  enum object_kind kind;
  struct object *next;
};
void *new_object(enum object_kind kind, size_t size); /* zeroed; NULL when memory is out */
void delete_object(void *object);
hipError_t check_object(const void *object, enum object_kind kind, const char *function);
/* A stream may be NULL, which is the default stream. */
hipError_t check_stream(hipStream_t stream, const char *function);

/* The machine that is emulated. */
struct machine {
  const char *arch;
  int compute_units, lds_bytes, clock_khz, l2_bytes;
  size_t memory_bytes;
};
const struct machine *machine(void); /* NULL if VMFUSE_EMULATED_ARCH names none */

/* Memory: allocations lie in one arena, a file that the executor maps as well. */
enum memory_kind { DEVICE_MEMORY, MANAGED_MEMORY, HOST_MEMORY, REGISTERED_MEMORY };
struct allocation {
  uint64_t base, size; /* as the device sees it */
  enum memory_kind kind;
  void *host; /* REGISTERED_MEMORY: the memory that `base` is the copy of */
};
struct range {
  uint64_t base, size;
};
int arena_file(void);
uint64_t arena_base(void);
uint64_t arena_size(void);
/* The live allocations, by address, and what the host wrote since this was last asked; hold `memory_lock`. */
extern pthread_mutex_t memory_lock;
const struct allocation *allocations(size_t *count);
const struct range *host_writes(size_t *count);
void forget_host_writes(void);
/* Registered memory is copied to where the device sees it before a launch, and back after it. */
void registered_to_device(void);
void registered_to_host(void);

EXPORT const char *hipGetErrorString(hipError_t code);
EXPORT hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream);

/* The work itself, for a stream and for a graph's nodes alike. */
hipError_t copy(void *dst, const void *src, size_t size, hipMemcpyKind kind, const char *function);
hipError_t fill(void *dst, uint32_t value, unsigned element, size_t count, const char *function);

struct launch {
  struct function *function;
  dim3 grid, block;
  unsigned shared;
  size_t argument_bytes;
  unsigned char *arguments; /* the kernarg segment up to the hidden arguments; owned */
};
hipError_t prepare_launch(struct launch *launch, struct function *function, dim3 grid, dim3 block,
                          unsigned shared, void **parameters, void **extra, const char *name);
hipError_t run_launch(const struct launch *launch, const char *name);
void drop_launch(struct launch *launch);

#endif
