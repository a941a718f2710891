/* CUDA: the driver's functions as IREE 3.13 asks for them (by cuGetProcAddress, as of CUDA 11.3), and hooks in
 * their place. */

typedef int result;
typedef uint64_t address;

enum { VERSION = 11030, NEWER = 12040, MEMORY_ON_DEVICE = 2 };

struct kernel_node {
  void *function;
  unsigned grid[3], block[3], shared;
  void **parameters, **extra;
};

struct fill_node {
  address target;
  size_t pitch;
  unsigned value, width;
  size_t count, rows;
};

struct side {
  size_t x, y, z, level;
  unsigned kind;
  void *host;
  address device;
  void *array, *reserved;
  size_t pitch, height;
};

struct copy_node {
  struct side source, target;
  size_t bytes, height, depth;
};

_Static_assert(sizeof(struct kernel_node) == 56, "CUDA_KERNEL_NODE_PARAMS_v1");
_Static_assert(sizeof(struct fill_node) == 40, "CUDA_MEMSET_NODE_PARAMS_v1");
_Static_assert(sizeof(struct copy_node) == 200, "CUDA_MEMCPY3D");

/* What is called, and, for those that have a hook, what the hook passes on to. */
#define FUNCTIONS(X)                                                                                          \
  X(cuCtxGetCurrent, VERSION, (void **))                                                                      \
  X(cuCtxPushCurrent, VERSION, (void *))                                                                      \
  X(cuCtxPopCurrent, VERSION, (void **))                                                                      \
  X(cuCtxSynchronize, VERSION, (void))                                                                        \
  X(cuStreamIsCapturing, VERSION, (void *, int *))                                                            \
  X(cuFuncGetParamInfo, NEWER, (void *, size_t, size_t *, size_t *))                                          \
  X(cuLaunchKernel, VERSION,                                                                                  \
    (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **)) \
  X(cuMemcpyAsync, VERSION, (address, address, size_t, void *))                                               \
  X(cuMemcpyHtoDAsync, VERSION, (address, const void *, size_t, void *))                                      \
  X(cuMemcpyHtoD, VERSION, (address, const void *, size_t))                                                   \
  X(cuMemsetD8Async, VERSION, (address, unsigned char, size_t, void *))                                       \
  X(cuMemsetD16Async, VERSION, (address, unsigned short, size_t, void *))                                     \
  X(cuMemsetD32Async, VERSION, (address, unsigned, size_t, void *))                                           \
  X(cuMemAlloc, VERSION, (address *, size_t))                                                                 \
  X(cuMemAllocManaged, VERSION, (address *, size_t, unsigned))                                                \
  X(cuMemHostAlloc, VERSION, (void **, size_t, unsigned))                                                     \
  X(cuMemAllocFromPoolAsync, VERSION, (address *, size_t, void *, void *))                                    \
  X(cuMemFree, VERSION, (address))                                                                            \
  X(cuMemFreeHost, VERSION, (void *))                                                                         \
  X(cuMemFreeAsync, VERSION, (address, void *))                                                               \
  X(cuMemPrefetchAsync, VERSION, (address, size_t, int, void *))                                              \
  X(cuLaunchHostFunc, VERSION, (void *, void (*)(void *), void *))                                            \
  X(cuGraphCreate, VERSION, (void **, unsigned))                                                              \
  X(cuGraphDestroy, VERSION, (void *))                                                                        \
  X(cuGraphAddKernelNode, VERSION, (void **, void *, void *const *, size_t, const struct kernel_node *))      \
  X(cuGraphAddMemsetNode, VERSION,                                                                            \
    (void **, void *, void *const *, size_t, const struct fill_node *, void *))                               \
  X(cuGraphAddMemcpyNode, VERSION,                                                                            \
    (void **, void *, void *const *, size_t, const struct copy_node *, void *))                               \
  X(cuGraphInstantiate, VERSION, (void **, void *, void **, char *, size_t))                                  \
  X(cuGraphExecKernelNodeSetParams, VERSION, (void *, void *, const struct kernel_node *))                    \
  X(cuGraphExecMemsetNodeSetParams, VERSION, (void *, void *, const struct fill_node *, void *))              \
  X(cuGraphExecMemcpyNodeSetParams, VERSION, (void *, void *, const struct copy_node *, void *))              \
  X(cuGraphExecDestroy, VERSION, (void *))                                                                    \
  X(cuGraphLaunch, VERSION, (void *, void *))                                                                 \
  X(cuGetErrorString, VERSION, (result, const char **))

static struct {
#define POINTER(name, version, parameters) result(*name) parameters;
  FUNCTIONS(POINTER)
} cuda;

EXPORT result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags);

static result (*real(void))(const char *, void **, int, uint64_t) {
  static void *library;
  if (library == NULL)
    library = dlopen(DRIVER, RTLD_NOW);
  return library ? (result(*)(const char *, void **, int, uint64_t))dlsym(library, "cuGetProcAddress") : NULL;
}

static int load(void) {
  static bool done;
  static int missing;
  pthread_mutex_lock(&lock);
  if (!done) {
    result (*find)(const char *, void **, int, uint64_t) = real();
    missing = find == NULL;
#define FIND(name, version, parameters) \
  missing |= !find || find(#name, (void **)&cuda.name, version, 0) != 0 || cuda.name == NULL;
    FUNCTIONS(FIND)
    done = true;
  }
  pthread_mutex_unlock(&lock);
  return missing;
}

static int driver_ready(void) { return load() == 0; }

/* -- hooks ------------------------------------------------------------------------------------------------------- */

static result launch_hook(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
  result error = cuda.cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra);
  if (error == 0 && recording())
    note_launch(function, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, stream, parameters, extra);
  return error;
}

static result copy_hook(address target, address source, size_t size, void *stream) {
  result error = cuda.cuMemcpyAsync(target, source, size, stream);
  if (error == 0)
    note_copy(target, source, size, stream);
  return error;
}

static result update_hook(address target, const void *source, size_t size, void *stream) {
  result error = cuda.cuMemcpyHtoDAsync(target, source, size, stream);
  if (error == 0)
    note_update(target, source, size, stream);
  return error;
}

#define FILL_HOOK(bits, type)                                                                       \
  static result fill##bits##_hook(address target, type value, size_t count, void *stream) {         \
    result error = cuda.cuMemsetD##bits##Async(target, value, count, stream);                       \
    if (error == 0)                                                                                 \
      note_fill(target, value, bits / 8, count, stream);                                             \
    return error;                                                                                   \
  }
FILL_HOOK(8, unsigned char)
FILL_HOOK(16, unsigned short)
FILL_HOOK(32, unsigned)

static result allocate_hook(address *base, size_t size) {
  result error = cuda.cuMemAlloc(base, size);
  if (error == 0)
    note_allocated(*base, size, false);
  return error;
}

static result managed_hook(address *base, size_t size, unsigned flags) {
  result error = cuda.cuMemAllocManaged(base, size, flags);
  if (error == 0)
    note_allocated(*base, size, true);
  return error;
}

static result host_hook(void **base, size_t size, unsigned flags) {
  result error = cuda.cuMemHostAlloc(base, size, flags);
  if (error == 0)
    note_allocated((address)*base, size, true);
  return error;
}

static result pool_hook(address *base, size_t size, void *pool, void *stream) {
  result error = cuda.cuMemAllocFromPoolAsync(base, size, pool, stream);
  if (error == 0)
    note_allocated(*base, size, false);
  return error;
}

static result free_hook(address base) {
  note_freed(base);
  return cuda.cuMemFree(base);
}

static result free_host_hook(void *base) {
  note_freed((address)base);
  return cuda.cuMemFreeHost(base);
}

static result free_async_hook(address base, void *stream) {
  note_freed(base);
  return cuda.cuMemFreeAsync(base, stream);
}

static result prefetch_hook(address base, size_t size, int device, void *stream) {
  note_other("cuMemPrefetchAsync");
  return cuda.cuMemPrefetchAsync(base, size, device, stream);
}

static result callback_hook(void *stream, void (*function)(void *), void *data) {
  note_other("a function of the host");
  return cuda.cuLaunchHostFunc(stream, function, data);
}

static result graph_hook(void *executable, void *stream) {
  note_other("cuGraphLaunch");
  return cuda.cuGraphLaunch(executable, stream);
}

static const struct {
  const char *name;
  void *hook;
} hooks[] = {
    {"cuGetProcAddress", cuGetProcAddress},
    {"cuLaunchKernel", launch_hook},
    {"cuMemcpyAsync", copy_hook},
    {"cuMemcpyHtoDAsync", update_hook},
    {"cuMemsetD8Async", fill8_hook},
    {"cuMemsetD16Async", fill16_hook},
    {"cuMemsetD32Async", fill32_hook},
    {"cuMemAlloc", allocate_hook},
    {"cuMemAllocManaged", managed_hook},
    {"cuMemHostAlloc", host_hook},
    {"cuMemAllocFromPoolAsync", pool_hook},
    {"cuMemFree", free_hook},
    {"cuMemFreeHost", free_host_hook},
    {"cuMemFreeAsync", free_async_hook},
    {"cuMemPrefetchAsync", prefetch_hook},
    {"cuLaunchHostFunc", callback_hook},
    {"cuGraphLaunch", graph_hook},
};

/* Only who asks as IREE does is given hooks: others, such as numba, ask for functions of other versions. */
EXPORT result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  result (*find)(const char *, void **, int, uint64_t) = real();
  result error = find ? find(name, function, version, flags) : 3; /* CUDA_ERROR_NOT_INITIALIZED */
  if (error != 0 || version != VERSION || *function == NULL || !driver_ready())
    return error;
  for (size_t i = 0; i < sizeof hooks / sizeof *hooks; i++)
    if (strcmp(name, hooks[i].name) == 0)
      *function = hooks[i].hook;
  return error;
}

/* -- the driver, as tape.c asks for it ---------------------------------------------------------------------------- */

static int parameter_bytes(void *function, unsigned number, size_t *bytes) {
  size_t offset;
  return cuda.cuFuncGetParamInfo(function, number, &offset, bytes);
}

static int current_context(void **context) {
  result error = cuda.cuCtxGetCurrent(context);
  return error ? error : *context == NULL;
}

static int enter(void *context) { return cuda.cuCtxPushCurrent(context); }

static void leave(void) {
  void *context;
  cuda.cuCtxPopCurrent(&context);
}

static int wait_for_all(void) { return cuda.cuCtxSynchronize(); }

static int capturing(void *stream, int *is) { return cuda.cuStreamIsCapturing(stream, is); }

static int issue(const struct operation *is, void *stream) {
  if (is->kind == COPY)
    return cuda.cuMemcpyAsync(is->slot[0], is->slot[1], is->count, stream);
  if (is->kind == LAUNCH)
    return cuda.cuLaunchKernel(is->function, is->grid[0], is->grid[1], is->grid[2], is->block[0], is->block[1],
                               is->block[2], is->shared, stream, is->parameters, NULL);
  if (is->width == 1)
    return cuda.cuMemsetD8Async(is->slot[0], (unsigned char)is->value, is->count, stream);
  if (is->width == 2)
    return cuda.cuMemsetD16Async(is->slot[0], (unsigned short)is->value, is->count, stream);
  return cuda.cuMemsetD32Async(is->slot[0], is->value, is->count, stream);
}

static int device_memory(uint64_t *base, size_t size, const void *content) {
  result error = cuda.cuMemAlloc(base, size);
  return error ? error : cuda.cuMemcpyHtoD(*base, content, size);
}

static void free_device_memory(uint64_t base) { cuda.cuMemFree(base); }

static int new_graph(void **graph) { return cuda.cuGraphCreate(graph, 0); }

static void drop_graph(void *graph) { cuda.cuGraphDestroy(graph); }

static struct kernel_node kernel_node(const struct operation *is) {
  return (struct kernel_node){.function = is->function,
                              .grid = {is->grid[0], is->grid[1], is->grid[2]},
                              .block = {is->block[0], is->block[1], is->block[2]},
                              .shared = is->shared,
                              .parameters = is->parameters};
}

static struct fill_node fill_node(const struct operation *is) {
  return (struct fill_node){
      .target = is->slot[0], .value = is->value, .width = is->width, .count = is->count, .rows = 1};
}

static struct copy_node copy_node(const struct operation *is) {
  return (struct copy_node){.source = {.kind = MEMORY_ON_DEVICE, .device = is->slot[1]},
                            .target = {.kind = MEMORY_ON_DEVICE, .device = is->slot[0]},
                            .bytes = is->count,
                            .height = 1,
                            .depth = 1};
}

static int add_node(void *graph, void *context, void *const *before, struct operation *is) {
  size_t count = before != NULL;
  struct kernel_node kernel = kernel_node(is);
  struct fill_node fill = fill_node(is);
  struct copy_node copy = copy_node(is);
  return is->kind == COPY   ? cuda.cuGraphAddMemcpyNode(&is->node, graph, before, count, &copy, context)
         : is->kind == FILL ? cuda.cuGraphAddMemsetNode(&is->node, graph, before, count, &fill, context)
                            : cuda.cuGraphAddKernelNode(&is->node, graph, before, count, &kernel);
}

static int set_node(void *executable, void *context, const struct operation *is) {
  struct kernel_node kernel = kernel_node(is);
  struct fill_node fill = fill_node(is);
  struct copy_node copy = copy_node(is);
  return is->kind == COPY   ? cuda.cuGraphExecMemcpyNodeSetParams(executable, is->node, &copy, context)
         : is->kind == FILL ? cuda.cuGraphExecMemsetNodeSetParams(executable, is->node, &fill, context)
                            : cuda.cuGraphExecKernelNodeSetParams(executable, is->node, &kernel);
}

static int make_executable(void **executable, void *graph) {
  return cuda.cuGraphInstantiate(executable, graph, NULL, NULL, 0);
}

static int play_executable(void *executable, void *stream) { return cuda.cuGraphLaunch(executable, stream); }

static void drop_executable(void *executable) { cuda.cuGraphExecDestroy(executable); }

static const char *describe(int code) {
  const char *text = NULL;
  if (code == NO_MEMORY)
    return "no host memory is left";
  return cuda.cuGetErrorString(code, &text) == 0 && text ? text : "unknown error";
}
