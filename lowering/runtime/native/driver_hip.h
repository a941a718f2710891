/* HIP: IREE 3.13 looks its functions up by name, so those with a hook have the driver's names here; all others the
 * loader finds in the driver's library, which this one is linked to. */

typedef int result;
typedef void *address;

enum { HOST_TO_DEVICE = 1, DEVICE_TO_DEVICE = 3 };

struct size3 {
  uint32_t x, y, z;
};

struct kernel_node {
  struct size3 block;
  void **extra;
  void *function;
  struct size3 grid;
  void **parameters;
  unsigned shared;
};

struct fill_node {
  address target;
  unsigned width;
  size_t rows, pitch;
  unsigned value;
  size_t count;
};

_Static_assert(sizeof(struct kernel_node) == 64, "hipKernelNodeParams");
_Static_assert(sizeof(struct fill_node) == 48, "hipMemsetParams");

/* What is called, and, for those that have a hook, what the hook passes on to. */
#define FUNCTIONS(X)                                                                                          \
  X(hipCtxGetCurrent, (void **))                                                                              \
  X(hipCtxPushCurrent, (void *))                                                                              \
  X(hipCtxPopCurrent, (void **))                                                                              \
  X(hipDeviceSynchronize, (void))                                                                             \
  X(hipStreamIsCapturing, (void *, int *))                                                                    \
  X(hipModuleLoadData, (void **, const void *))                                                               \
  X(hipModuleLoadDataEx, (void **, const void *, unsigned, int *, void **))                                   \
  X(hipModuleUnload, (void *))                                                                                \
  X(hipModuleGetFunction, (void **, void *, const char *))                                                    \
  X(hipModuleLaunchKernel,                                                                                    \
    (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **)) \
  X(hipLaunchKernel, (const void *, struct size3, struct size3, void **, size_t, void *))                     \
  X(hipMemcpy, (address, const void *, size_t, int))                                                          \
  X(hipMemcpyAsync, (address, const void *, size_t, int, void *))                                             \
  X(hipMemcpyHtoDAsync, (address, void *, size_t, void *))                                                    \
  X(hipMemset, (address, int, size_t))                                                                        \
  X(hipMemsetAsync, (address, int, size_t, void *))                                                           \
  X(hipMemsetD8Async, (address, unsigned char, size_t, void *))                                               \
  X(hipMemsetD16Async, (address, unsigned short, size_t, void *))                                             \
  X(hipMemsetD32Async, (address, int, size_t, void *))                                                        \
  X(hipMalloc, (address *, size_t))                                                                           \
  X(hipMallocManaged, (address *, size_t, unsigned))                                                          \
  X(hipHostMalloc, (void **, size_t, unsigned))                                                               \
  X(hipMallocAsync, (address *, size_t, void *))                                                              \
  X(hipMallocFromPoolAsync, (address *, size_t, void *, void *))                                              \
  X(hipFree, (address))                                                                                       \
  X(hipHostFree, (void *))                                                                                    \
  X(hipFreeAsync, (address, void *))                                                                          \
  X(hipMemPrefetchAsync, (const void *, size_t, int, void *))                                                 \
  X(hipLaunchHostFunc, (void *, void (*)(void *), void *))                                                    \
  X(hipGraphCreate, (void **, unsigned))                                                                      \
  X(hipGraphDestroy, (void *))                                                                                \
  X(hipGraphAddKernelNode, (void **, void *, void *const *, size_t, const struct kernel_node *))              \
  X(hipGraphAddMemsetNode, (void **, void *, void *const *, size_t, const struct fill_node *))                \
  X(hipGraphAddMemcpyNode1D, (void **, void *, void *const *, size_t, void *, const void *, size_t, int))     \
  X(hipGraphInstantiate, (void **, void *, void **, char *, size_t))                                          \
  X(hipGraphExecKernelNodeSetParams, (void *, void *, const struct kernel_node *))                            \
  X(hipGraphExecMemsetNodeSetParams, (void *, void *, const struct fill_node *))                              \
  X(hipGraphExecMemcpyNodeSetParams1D, (void *, void *, void *, const void *, size_t, int))                   \
  X(hipGraphExecDestroy, (void *))                                                                            \
  X(hipGraphLaunch, (void *, void *))

static struct {
#define POINTER(name, parameters) result(*name) parameters;
  FUNCTIONS(POINTER)
  const char *(*hipGetErrorString)(result);
} hip;

static int missing; /* functions */

__attribute__((constructor)) static void load(void) {
  void *library = dlopen(DRIVER, RTLD_NOW);
#define FIND(name, parameters)                                              \
  hip.name = library ? (result(*) parameters)dlsym(library, #name) : NULL; \
  missing += hip.name == NULL;
  FUNCTIONS(FIND)
  hip.hipGetErrorString = library ? (const char *(*)(result))dlsym(library, "hipGetErrorString") : NULL;
  missing += hip.hipGetErrorString == NULL;
}

static int driver_ready(void) { return missing == 0; }

/* -- what a kernel takes ------------------------------------------------------------------------------------------ */

#include "code_object.h"

static void read_module(void *module, const void *image) {
  pthread_mutex_lock(&lock);
  read_image(module, image);
  pthread_mutex_unlock(&lock);
}

EXPORT result hipModuleLoadData(void **module, const void *image) {
  result error = hip.hipModuleLoadData(module, image);
  if (error == 0)
    read_module(*module, image);
  return error;
}

EXPORT result hipModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values) {
  result error = hip.hipModuleLoadDataEx(module, image, count, options, values);
  if (error == 0)
    read_module(*module, image);
  return error;
}

EXPORT result hipModuleUnload(void *module) {
  pthread_mutex_lock(&lock);
  unsigned kept = 0;
  for (unsigned i = 0; i < kernel_count; i++)
    if (kernels[i].module != module)
      kernels[kept++] = kernels[i];
  kernel_count = kept;
  pthread_mutex_unlock(&lock);
  return hip.hipModuleUnload(module);
}

EXPORT result hipModuleGetFunction(void **function, void *module, const char *name) {
  result error = hip.hipModuleGetFunction(function, module, name);
  pthread_mutex_lock(&lock);
  for (unsigned i = 0; error == 0 && i < kernel_count; i++)
    if (kernels[i].module == module && strcmp(kernels[i].name, name) == 0)
      kernels[i].function = *function;
  pthread_mutex_unlock(&lock);
  return error;
}

/* Hold `lock`. */
static int parameter_bytes(void *function, unsigned number, size_t *bytes) {
  for (unsigned i = 0; i < kernel_count; i++)
    if (kernels[i].function == function && number < kernels[i].count)
      return *bytes = kernels[i].bytes[number], 0;
  return 1;
}

/* -- hooks ------------------------------------------------------------------------------------------------------- */

EXPORT result hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                    unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
  result error = hip.hipModuleLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra);
  if (error == 0 && recording())
    note_launch(function, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, stream, parameters, extra);
  return error;
}

EXPORT result hipLaunchKernel(const void *function, struct size3 grid, struct size3 block, void **parameters,
                              size_t shared, void *stream) {
  note_other("hipLaunchKernel");
  return hip.hipLaunchKernel(function, grid, block, parameters, shared, stream);
}

EXPORT result hipMemcpy(address target, const void *source, size_t size, int kind) {
  note_other("hipMemcpy");
  return hip.hipMemcpy(target, source, size, kind);
}

EXPORT result hipMemcpyAsync(address target, const void *source, size_t size, int kind, void *stream) {
  result error = hip.hipMemcpyAsync(target, source, size, kind, stream);
  if (error == 0 && kind == DEVICE_TO_DEVICE)
    note_copy((uint64_t)target, (uint64_t)source, size, stream);
  else if (error == 0 && kind == HOST_TO_DEVICE)
    note_update((uint64_t)target, source, size, stream);
  else
    note_other("a copy to the host");
  return error;
}

EXPORT result hipMemcpyHtoDAsync(address target, void *source, size_t size, void *stream) {
  result error = hip.hipMemcpyHtoDAsync(target, source, size, stream);
  if (error == 0)
    note_update((uint64_t)target, source, size, stream);
  return error;
}

EXPORT result hipMemset(address target, int value, size_t size) {
  note_other("hipMemset");
  return hip.hipMemset(target, value, size);
}

EXPORT result hipMemsetAsync(address target, int value, size_t size, void *stream) {
  note_other("hipMemsetAsync");
  return hip.hipMemsetAsync(target, value, size, stream);
}

#define FILL_HOOK(bits, type, number)                                                                          \
  EXPORT result hipMemsetD##bits##Async(address target, type value, size_t count, void *stream) {              \
    result error = hip.hipMemsetD##bits##Async(target, value, count, stream);                                  \
    if (error == 0)                                                                                            \
      note_fill((uint64_t)target, (number)value, bits / 8, count, stream);                                             \
    return error;                                                                                              \
  }
FILL_HOOK(8, unsigned char, unsigned char)
FILL_HOOK(16, unsigned short, unsigned short)
FILL_HOOK(32, int, unsigned)

#define ALLOCATE_HOOK(name, of_host, parameters, arguments) \
  EXPORT result name parameters {                           \
    result error = hip.name arguments;                      \
    if (error == 0)                                         \
      note_allocated((uint64_t)*base, size, of_host);       \
    return error;                                           \
  }
ALLOCATE_HOOK(hipMalloc, false, (address * base, size_t size), (base, size))
ALLOCATE_HOOK(hipMallocManaged, true, (address * base, size_t size, unsigned flags), (base, size, flags))
ALLOCATE_HOOK(hipHostMalloc, true, (void **base, size_t size, unsigned flags), (base, size, flags))
ALLOCATE_HOOK(hipMallocAsync, false, (address * base, size_t size, void *stream), (base, size, stream))
ALLOCATE_HOOK(hipMallocFromPoolAsync, false, (address * base, size_t size, void *pool, void *stream),
              (base, size, pool, stream))

EXPORT result hipFree(address base) {
  note_freed((uint64_t)base);
  return hip.hipFree(base);
}

EXPORT result hipHostFree(void *base) {
  note_freed((uint64_t)base);
  return hip.hipHostFree(base);
}

EXPORT result hipFreeAsync(address base, void *stream) {
  note_freed((uint64_t)base);
  return hip.hipFreeAsync(base, stream);
}

EXPORT result hipMemPrefetchAsync(const void *base, size_t size, int device, void *stream) {
  note_other("hipMemPrefetchAsync");
  return hip.hipMemPrefetchAsync(base, size, device, stream);
}

EXPORT result hipLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  note_other("a function of the host");
  return hip.hipLaunchHostFunc(stream, function, data);
}

EXPORT result hipGraphLaunch(void *executable, void *stream) {
  note_other("hipGraphLaunch");
  return hip.hipGraphLaunch(executable, stream);
}

/* -- the driver, as tape.c asks for it ---------------------------------------------------------------------------- */

static int current_context(void **context) {
  result error = hip.hipCtxGetCurrent(context);
  return error ? error : *context == NULL;
}

static int enter(void *context) { return hip.hipCtxPushCurrent(context); }

static void leave(void) {
  void *context;
  hip.hipCtxPopCurrent(&context);
}

static int wait_for_all(void) { return hip.hipDeviceSynchronize(); }

static int capturing(void *stream, int *is) { return hip.hipStreamIsCapturing(stream, is); }

static int issue(const struct operation *is, void *stream) {
  address target = (address)is->slot[0];
  if (is->kind == COPY)
    return hip.hipMemcpyAsync(target, (void *)is->slot[1], is->count, DEVICE_TO_DEVICE, stream);
  if (is->kind == LAUNCH)
    return hip.hipModuleLaunchKernel(is->function, is->grid[0], is->grid[1], is->grid[2], is->block[0],
                                     is->block[1], is->block[2], is->shared, stream, is->parameters, NULL);
  if (is->width == 1)
    return hip.hipMemsetD8Async(target, (unsigned char)is->value, is->count, stream);
  if (is->width == 2)
    return hip.hipMemsetD16Async(target, (unsigned short)is->value, is->count, stream);
  return hip.hipMemsetD32Async(target, (int)is->value, is->count, stream);
}

static int device_memory(uint64_t *base, size_t size, const void *content) {
  address made;
  result error = hip.hipMalloc(&made, size);
  *base = error ? 0 : (uint64_t)made;
  return error ? error : hip.hipMemcpy(made, content, size, HOST_TO_DEVICE);
}

static void free_device_memory(uint64_t base) { hip.hipFree((address)base); }

static int new_graph(void **graph) { return hip.hipGraphCreate(graph, 0); }

static void drop_graph(void *graph) { hip.hipGraphDestroy(graph); }

static struct kernel_node kernel_node(const struct operation *is) {
  return (struct kernel_node){.block = {is->block[0], is->block[1], is->block[2]},
                              .function = is->function,
                              .grid = {is->grid[0], is->grid[1], is->grid[2]},
                              .parameters = is->parameters,
                              .shared = is->shared};
}

static struct fill_node fill_node(const struct operation *is) {
  return (struct fill_node){
      .target = (address)is->slot[0], .width = is->width, .rows = 1, .value = is->value, .count = is->count};
}

static int add_node(void *graph, void *context, void *const *before, struct operation *is) {
  (void)context;
  size_t count = before != NULL;
  struct kernel_node kernel = kernel_node(is);
  struct fill_node fill = fill_node(is);
  if (is->kind == COPY)
    return hip.hipGraphAddMemcpyNode1D(&is->node, graph, before, count, (void *)is->slot[0], (void *)is->slot[1],
                                       is->count, DEVICE_TO_DEVICE);
  return is->kind == FILL ? hip.hipGraphAddMemsetNode(&is->node, graph, before, count, &fill)
                          : hip.hipGraphAddKernelNode(&is->node, graph, before, count, &kernel);
}

static int set_node(void *executable, void *context, const struct operation *is) {
  (void)context;
  struct kernel_node kernel = kernel_node(is);
  struct fill_node fill = fill_node(is);
  if (is->kind == COPY)
    return hip.hipGraphExecMemcpyNodeSetParams1D(executable, is->node, (void *)is->slot[0], (void *)is->slot[1],
                                                 is->count, DEVICE_TO_DEVICE);
  return is->kind == FILL ? hip.hipGraphExecMemsetNodeSetParams(executable, is->node, &fill)
                          : hip.hipGraphExecKernelNodeSetParams(executable, is->node, &kernel);
}

static int make_executable(void **executable, void *graph) {
  return hip.hipGraphInstantiate(executable, graph, NULL, NULL, 0);
}

static int play_executable(void *executable, void *stream) { return hip.hipGraphLaunch(executable, stream); }

static void drop_executable(void *executable) { hip.hipGraphExecDestroy(executable); }

static const char *describe(int code) {
  return code == NO_MEMORY ? "no host memory is left" : hip.hipGetErrorString(code);
}
