/* Errors, handles, the device and its properties, contexts, streams and events.
 *
 * Streams are synchronous: an operation has happened when its call returns, so an event that was
 * recorded is complete and waiting for one takes no time.
 */
#include "internal.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* -- errors ---------------------------------------------------------------------------------------- */

static __thread struct {
  hipError_t code; /* the last failure of this thread, until it is asked for */
  hipError_t described;
  char text[2048];
} last;

hipError_t fail(hipError_t code, const char *function, const char *format, ...) {
  char why[1536];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(why, sizeof why, format, arguments);
  va_end(arguments);
  last.code = last.described = code;
  snprintf(last.text, sizeof last.text, "%s: %s", function, why);
  fprintf(stderr, "emulated HIP: %s\n", last.text);
  return code;
}

EXPORT const char *hipGetErrorName(hipError_t code) {
#define HIP_NAME(name, number, text) \
  case number:                       \
    return #name;
  switch (code) { HIP_ERRORS(HIP_NAME) }
  return "hipErrorUnknown";
}

/* The sentence of the failure, where `code` is this thread's latest: a caller passes it on as it is. */
EXPORT const char *hipGetErrorString(hipError_t code) {
  if (code != hipSuccess && code == last.described)
    return last.text;
#define HIP_TEXT(name, number, text) \
  case number:                       \
    return text;
  switch (code) { HIP_ERRORS(HIP_TEXT) }
  return "unknown error";
}

EXPORT hipError_t hipGetLastError(void) {
  hipError_t code = last.code;
  last.code = hipSuccess;
  return code;
}

/* -- handles --------------------------------------------------------------------------------------- */

static pthread_mutex_t object_lock = PTHREAD_MUTEX_INITIALIZER;
static struct object *objects;

void *new_object(enum object_kind kind, size_t size) {
  struct object *object = calloc(1, size);
  if (object == NULL)
    return NULL;
  object->kind = kind;
  pthread_mutex_lock(&object_lock);
  object->next = objects;
  objects = object;
  pthread_mutex_unlock(&object_lock);
  return object;
}

void delete_object(void *object) {
  pthread_mutex_lock(&object_lock);
  struct object **link = &objects;
  while (*link != NULL && *link != object)
    link = &(*link)->next;
  if (*link != NULL)
    *link = (*link)->next;
  pthread_mutex_unlock(&object_lock);
  free(object);
}

hipError_t check_object(const void *object, enum object_kind kind, const char *function) {
  static const char *const names[] = {"context",  "stream", "event",        "module",
                                      "function", "graph",  "graph program"};
  pthread_mutex_lock(&object_lock);
  const struct object *found = objects;
  while (found != NULL && !(found == object && found->kind == kind))
    found = found->next;
  pthread_mutex_unlock(&object_lock);
  if (found != NULL)
    return hipSuccess;
  return fail(hipErrorInvalidHandle, function, "%p is no %s, or it was destroyed", object, names[kind]);
}

hipError_t check_stream(hipStream_t stream, const char *function) {
  return stream == NULL ? hipSuccess : check_object(stream, STREAM, function);
}

/* -- the device ------------------------------------------------------------------------------------ */

static const struct machine machines[] = {
    {"gfx950", 256, 160 << 10, 2400000, 4 << 20, (size_t)288 << 30},
    {"gfx942", 304, 64 << 10, 2100000, 4 << 20, (size_t)192 << 30},
};

const struct machine *machine(void) {
  const char *wanted = getenv("VMFUSE_EMULATED_ARCH");
  for (size_t i = 0; i < sizeof machines / sizeof *machines; i++)
    if (strcmp(wanted ? wanted : "gfx950", machines[i].arch) == 0)
      return &machines[i];
  return NULL;
}

static void announce(void) {
  fprintf(
      stderr,
      "*** emulated HIP: this is no GPU. Kernels for %s are executed instruction by instruction on the CPU; "
      "their results count, their times do not. ***\n",
      machine()->arch);
}

EXPORT hipError_t hipInit(unsigned int flags) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (flags != 0)
    return FAIL(hipErrorInvalidValue, "flags must be 0, got %u", flags);
  if (machine() == NULL)
    return FAIL(hipErrorNotInitialized, "VMFUSE_EMULATED_ARCH is %s; known: gfx950, gfx942",
                getenv("VMFUSE_EMULATED_ARCH"));
  pthread_once(&once, announce);
  return hipSuccess;
}

static hipError_t check_device(int device, const char *function) {
  if (machine() == NULL)
    return fail(hipErrorNotInitialized, function, "hipInit failed or was not called");
  if (device == 0)
    return hipSuccess;
  return fail(hipErrorInvalidDevice, function, "there is one device, number 0, not %d", device);
}

EXPORT hipError_t hipGetDeviceCount(int *count) {
  *count = 1;
  return hipSuccess;
}

EXPORT hipError_t hipDeviceGet(hipDevice_t *device, int ordinal) {
  TRY(check_device(ordinal, __func__));
  *device = 0;
  return hipSuccess;
}

EXPORT hipError_t hipSetDevice(unsigned int device) { return check_device((int)device, __func__); }

/* "emulated <arch>": what lowering.runtime tells an emulated device by. */
EXPORT hipError_t hipDeviceGetName(char *name, int capacity, hipDevice_t device) {
  TRY(check_device(device, __func__));
  if (snprintf(name, (size_t)capacity, "emulated %s", machine()->arch) >= capacity)
    return FAIL(hipErrorInvalidValue, "the name does not fit %d bytes", capacity);
  return hipSuccess;
}

EXPORT hipError_t hipDeviceGetUuid(hipUUID *uuid, hipDevice_t device) {
  TRY(check_device(device, __func__));
  memcpy(uuid->bytes, "vmfuse-emulated\0", sizeof uuid->bytes);
  return hipSuccess;
}

static const struct limit {
  hipDeviceAttribute_t attribute;
  int value;
} limits[] = {
    {hipDeviceAttributeMaxBlockDimX, 1024},     {hipDeviceAttributeMaxBlockDimY, 1024},
    {hipDeviceAttributeMaxBlockDimZ, 1024},     {hipDeviceAttributeMaxThreadsPerBlock, 1024},
    {hipDeviceAttributeMaxGridDimX, INT32_MAX}, {hipDeviceAttributeMaxGridDimY, 65535},
    {hipDeviceAttributeMaxGridDimZ, 65535},     {hipDeviceAttributeWarpSize, 64},
    {hipDeviceAttributeManagedMemory, 1},       {hipDeviceAttributeConcurrentManagedAccess, 1},
    {hipDeviceAttributeIntegrated, 0},          {hipDeviceAttributeMemoryPoolsSupported, 0},
};

EXPORT hipError_t hipDeviceGetAttribute(int *value, hipDeviceAttribute_t attribute, int device) {
  TRY(check_device(device, __func__));
  if (attribute == hipDeviceAttributeMultiprocessorCount)
    return *value = machine()->compute_units, hipSuccess;
  if (attribute == hipDeviceAttributeMaxSharedMemoryPerBlock)
    return *value = machine()->lds_bytes, hipSuccess;
  for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
    if (limits[i].attribute == attribute)
      return *value = limits[i].value, hipSuccess;
  return FAIL(hipErrorNotSupported, "attribute %d is not known here", attribute);
}

EXPORT hipError_t hipGetDeviceProperties(hipDeviceProp_tR0000 *properties, int device) {
  TRY(check_device(device, __func__));
  const struct machine *is = machine();
  *properties = (hipDeviceProp_tR0000){
      .totalGlobalMem = is->memory_bytes,
      .sharedMemPerBlock = (size_t)is->lds_bytes,
      .maxSharedMemoryPerMultiProcessor = (size_t)is->lds_bytes,
      .regsPerBlock = 65536,
      .warpSize = 64,
      .maxThreadsPerBlock = 1024,
      .maxThreadsDim = {1024, 1024, 1024},
      .maxGridSize = {INT32_MAX, 65535, 65535},
      .clockRate = is->clock_khz,
      .totalConstMem = INT32_MAX,
      .major = 9,
      .minor = is->arch[4] - '0',
      .multiProcessorCount = is->compute_units,
      .l2CacheSize = is->l2_bytes,
      .maxThreadsPerMultiProcessor = 2048,
      .canMapHostMemory = 1,
      .managedMemory = 1,
      .concurrentManagedAccess = 1,
  };
  snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "%s:sramecc+:xnack-", is->arch);
  return hipDeviceGetName(properties->name, sizeof properties->name, device);
}

EXPORT hipError_t hipDeviceCanAccessPeer(int *can, int device, int peer) {
  TRY(check_device(device, __func__));
  TRY(check_device(peer, __func__));
  *can = 0;
  return hipSuccess;
}

EXPORT hipError_t hipDeviceEnablePeerAccess(int peer, unsigned int flags) {
  return FAIL(hipErrorPeerAccessUnsupported, "there is no device but 0 (peer %d, flags %u)", peer, flags);
}

/* -- contexts: one device has one ------------------------------------------------------------------ */

struct context {
  struct object object;
};

static struct context *primary_context;
static __thread struct {
  hipCtx_t contexts[64];
  size_t depth;
} stack;

static void make_primary_context(void) { primary_context = new_object(CONTEXT, sizeof *primary_context); }

EXPORT hipError_t hipDevicePrimaryCtxRetain(hipCtx_t *context, hipDevice_t device) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  TRY(check_device(device, __func__));
  pthread_once(&once, make_primary_context);
  *context = primary_context;
  return primary_context ? hipSuccess : FAIL(hipErrorOutOfMemory, "no host memory is left");
}

EXPORT hipError_t hipDevicePrimaryCtxRelease(hipDevice_t device) { return check_device(device, __func__); }

EXPORT hipError_t hipCtxPushCurrent(hipCtx_t context) {
  TRY(check_object(context, CONTEXT, __func__));
  if (stack.depth == sizeof stack.contexts / sizeof *stack.contexts)
    return FAIL(hipErrorInvalidContext, "%zu contexts were pushed and not popped", stack.depth);
  stack.contexts[stack.depth++] = context;
  return hipSuccess;
}

EXPORT hipError_t hipCtxPopCurrent(hipCtx_t *context) {
  if (stack.depth == 0)
    return FAIL(hipErrorInvalidContext, "no context was pushed in this thread");
  stack.depth--;
  if (context != NULL)
    *context = stack.contexts[stack.depth];
  return hipSuccess;
}

EXPORT hipError_t hipCtxSetCurrent(hipCtx_t context) {
  if (stack.depth > 0)
    stack.depth--;
  return context == NULL ? hipSuccess : hipCtxPushCurrent(context);
}

EXPORT hipError_t hipCtxGetCurrent(hipCtx_t *context) {
  *context = stack.depth ? stack.contexts[stack.depth - 1] : NULL;
  return hipSuccess;
}

/* -- streams --------------------------------------------------------------------------------------- */

struct stream {
  struct object object;
};

EXPORT hipError_t hipStreamCreateWithFlags(hipStream_t *stream, unsigned int flags) {
  if (flags & ~(unsigned)hipStreamNonBlocking)
    return FAIL(hipErrorInvalidValue, "unknown flags 0x%x", flags);
  *stream = new_object(STREAM, sizeof **stream);
  return *stream ? hipSuccess : FAIL(hipErrorOutOfMemory, "no host memory is left");
}

EXPORT hipError_t hipStreamDestroy(hipStream_t stream) {
  TRY(check_object(stream, STREAM, __func__));
  delete_object(stream);
  return hipSuccess;
}

EXPORT hipError_t hipStreamSynchronize(hipStream_t stream) { return check_stream(stream, __func__); }

EXPORT hipError_t hipStreamIsCapturing(hipStream_t stream, hipStreamCaptureStatus *status) {
  *status = hipStreamCaptureStatusNone;
  return check_stream(stream, __func__);
}

/* Each operation has ended when its call returns. */
EXPORT hipError_t hipDeviceSynchronize(void) { return hipSuccess; }

EXPORT hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned int flags) {
  if (flags != 0)
    return FAIL(hipErrorInvalidValue, "flags must be 0, got %u", flags);
  TRY(check_object(event, EVENT, __func__));
  return check_stream(stream, __func__);
}

EXPORT hipError_t hipLaunchHostFunc(hipStream_t stream, hipHostFn_t function, void *argument) {
  TRY(check_stream(stream, __func__));
  if (function == NULL)
    return FAIL(hipErrorInvalidValue, "the function is NULL");
  function(argument);
  return hipSuccess;
}

/* -- events ---------------------------------------------------------------------------------------- */

struct event {
  struct object object;
  bool timed, recorded;
  struct timespec when;
};

EXPORT hipError_t hipEventCreateWithFlags(hipEvent_t *event, unsigned int flags) {
  if (flags & ~(unsigned)hipEventKnownFlags)
    return FAIL(hipErrorInvalidValue, "unknown flags 0x%x", flags);
  *event = new_object(EVENT, sizeof **event);
  if (*event == NULL)
    return FAIL(hipErrorOutOfMemory, "no host memory is left");
  (*event)->timed = !(flags & hipEventDisableTiming);
  return hipSuccess;
}

EXPORT hipError_t hipEventCreate(hipEvent_t *event) { return hipEventCreateWithFlags(event, 0); }

EXPORT hipError_t hipEventDestroy(hipEvent_t event) {
  TRY(check_object(event, EVENT, __func__));
  delete_object(event);
  return hipSuccess;
}

EXPORT hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) {
  TRY(check_object(event, EVENT, __func__));
  TRY(check_stream(stream, __func__));
  event->recorded = true;
  clock_gettime(CLOCK_MONOTONIC, &event->when);
  return hipSuccess;
}

EXPORT hipError_t hipEventQuery(hipEvent_t event) { return check_object(event, EVENT, __func__); }

EXPORT hipError_t hipEventSynchronize(hipEvent_t event) { return check_object(event, EVENT, __func__); }

EXPORT hipError_t hipEventElapsedTime(float *milliseconds, hipEvent_t start, hipEvent_t stop) {
  TRY(check_object(start, EVENT, __func__));
  TRY(check_object(stop, EVENT, __func__));
  if (!start->timed || !stop->timed || !start->recorded || !stop->recorded)
    return FAIL(hipErrorInvalidHandle, "both events must have been recorded, and with timing");
  double seconds = difftime(stop->when.tv_sec, start->when.tv_sec);
  *milliseconds = (float)(seconds * 1e3 + (double)(stop->when.tv_nsec - start->when.tv_nsec) * 1e-6);
  return hipSuccess;
}

/* -- what IREE resolves and does not need for a program -------------------------------------------- */

#define NOT_HERE(function)                                                           \
  EXPORT hipError_t function(void) {                                                 \
    return FAIL(hipErrorNotSupported, "this function is not part of the emulation"); \
  }
NOT_HERE(hipFuncSetAttribute)
NOT_HERE(hipLaunchKernel)
NOT_HERE(hipMallocFromPoolAsync)
NOT_HERE(hipMemPoolCreate)
NOT_HERE(hipMemPoolDestroy)
NOT_HERE(hipMemPoolGetAttribute)
NOT_HERE(hipMemPoolSetAttribute)
NOT_HERE(hipMemPoolTrimTo)
NOT_HERE(hipModuleGetGlobal)
