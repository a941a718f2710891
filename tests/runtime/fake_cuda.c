/* A CUDA driver on the host, for tests of the library that stands before one: what is asked of it is done at once,
 * and counted.  It has the functions that library uses, and one kernel. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t address;
enum { INVALID = 1 };

int launches, copies, fills, graph_launches, changes, executables, contexts, is_capturing, allocations;

/* out[i] = scale * in[i] + out[i] */
struct function {
  unsigned count;
  size_t bytes[4];
};
static struct function scaled = {4, {8, 8, 4, 4}};
struct function *kernel(void) { return &scaled; }

static void run(void *const *parameters) {
  float *in = *(float **)parameters[0], *out = *(float **)parameters[1];
  int scale = *(int *)parameters[2], count = *(int *)parameters[3];
  for (int i = 0; i < count; i++)
    out[i] += (float)scale * in[i];
}

static _Thread_local void *stack[16];
static _Thread_local int depth;
int cuCtxGetCurrent(void **context) { return *context = depth ? stack[depth - 1] : NULL, 0; }
int cuCtxPushCurrent(void *context) { return stack[depth++] = context, contexts++, 0; }
int cuCtxPopCurrent(void **context) { return *context = stack[--depth], contexts--, 0; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamIsCapturing(void *stream, int *is) { return (void)stream, *is = is_capturing, 0; }
int cuGetErrorString(int error, const char **text) { return *text = error ? "a fake error" : "none", 0; }

int cuFuncGetParamInfo(const struct function *function, size_t number, size_t *offset, size_t *bytes) {
  if (number >= function->count)
    return INVALID;
  return *offset = 8 * number, *bytes = function->bytes[number], 0;
}

int cuLaunchKernel(const struct function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
  (void)shared, (void)stream, (void)extra;
  if (function != &scaled || gx * gy * gz * bx * by * bz == 0)
    return INVALID;
  return launches++, run(parameters), 0;
}

static void set(address target, unsigned value, unsigned width, size_t count) {
  for (size_t i = 0; i < count; i++)
    memcpy((char *)target + i * width, &value, width);
}
int cuMemcpyAsync(address to, address from, size_t size, void *stream) {
  return (void)stream, copies++, memcpy((void *)to, (void *)from, size), 0;
}
int cuMemcpyHtoD(address to, const void *from, size_t size) { return memcpy((void *)to, from, size), 0; }
int cuMemcpyHtoDAsync(address to, const void *from, size_t size, void *stream) {
  return (void)stream, copies++, memcpy((void *)to, from, size), 0;
}
int cuMemsetD8Async(address to, unsigned char value, size_t count, void *stream) {
  return (void)stream, fills++, set(to, value, 1, count), 0;
}
int cuMemsetD16Async(address to, unsigned short value, size_t count, void *stream) {
  return (void)stream, fills++, set(to, value, 2, count), 0;
}
int cuMemsetD32Async(address to, unsigned value, size_t count, void *stream) {
  return (void)stream, fills++, set(to, value, 4, count), 0;
}

int cuMemAlloc(address *base, size_t size) { return allocations++, *base = (address)malloc(size), 0; }
int cuMemFree(address base) { return allocations--, free((void *)base), 0; }
int cuMemHostAlloc(void **base, size_t size, unsigned flags) { return (void)flags, *base = malloc(size), 0; }
int cuMemFreeHost(void *base) { return free(base), 0; }
int cuMemAllocManaged(address *base, size_t size, unsigned flags) { return (void)flags, cuMemAlloc(base, size); }
int cuMemAllocFromPoolAsync(address *base, size_t size, void *pool, void *stream) {
  return (void)pool, (void)stream, cuMemAlloc(base, size);
}
int cuMemFreeAsync(address base, void *stream) { return (void)stream, cuMemFree(base); }
int cuMemPrefetchAsync(address base, size_t size, int device, void *stream) {
  return (void)base, (void)size, (void)device, (void)stream, 0;
}
int cuEventRecord(void *event, void *stream) { return (void)event, (void)stream, 0; }
int cuEventSynchronize(void *event) { return (void)event, 0; }
int cuEventQuery(void *event) { return (void)event, 0; }
int cuStreamSynchronize(void *stream) { return (void)stream, 0; }
int cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) { return (void)stream, function(data), 0; }

/* -- graphs -- */

struct kernel_node {
  struct function *function;
  unsigned grid[3], block[3], shared;
  void **parameters, **extra;
};
struct fill_node {
  address target;
  size_t pitch;
  unsigned value, width;
  size_t count, rows;
};
struct copy_node {
  size_t from[4];
  unsigned from_kind;
  void *from_host;
  address from_device;
  void *from_array, *from_reserved;
  size_t from_pitch, from_height, to[4];
  unsigned to_kind;
  void *to_host;
  address to_device;
  void *to_array, *to_reserved;
  size_t to_pitch, to_height, bytes, height, depth;
};
_Static_assert(sizeof(struct copy_node) == 200, "CUDA_MEMCPY3D");

struct node {
  int kind, number;
  struct function *function;
  uint64_t slot[4];
  struct fill_node fill;
  struct copy_node copy;
};
struct graph {
  int count;
  struct node *nodes[64];
};

static void set_kernel(struct node *node, const struct kernel_node *is) {
  node->function = is->function;
  for (unsigned i = 0; i < is->function->count; i++)
    memcpy(&node->slot[i], is->parameters[i], is->function->bytes[i]);
}

static int add(struct node **made, struct graph *graph, struct node *const *before, size_t count, int kind) {
  /* A chain: behind the last one. */
  if (count != (graph->count > 0) || (count && before[0] != graph->nodes[graph->count - 1]))
    return INVALID;
  *made = graph->nodes[graph->count] = calloc(1, sizeof **made);
  return (*made)->kind = kind, (*made)->number = graph->count++, 0;
}

int cuGraphCreate(struct graph **graph, unsigned flags) { return *graph = calloc(1, sizeof **graph), (int)flags; }
int cuGraphAddKernelNode(struct node **made, struct graph *graph, struct node *const *before, size_t count,
                         const struct kernel_node *is) {
  int error = add(made, graph, before, count, 0);
  return error ? error : (set_kernel(*made, is), 0);
}
int cuGraphAddMemsetNode(struct node **made, struct graph *graph, struct node *const *before, size_t count,
                         const struct fill_node *is, void *context) {
  int error = context ? add(made, graph, before, count, 1) : INVALID;
  return error ? error : ((*made)->fill = *is, 0);
}
int cuGraphAddMemcpyNode(struct node **made, struct graph *graph, struct node *const *before, size_t count,
                         const struct copy_node *is, void *context) {
  int error = context ? add(made, graph, before, count, 2) : INVALID;
  return error ? error : ((*made)->copy = *is, 0);
}
int cuGraphInstantiate(struct graph **made, const struct graph *graph, void **node, char *log, size_t room) {
  (void)node, (void)log, (void)room;
  *made = calloc(1, sizeof **made), executables++;
  for (int i = 0; i < graph->count; i++)
    memcpy((*made)->nodes[(*made)->count++] = malloc(sizeof(struct node)), graph->nodes[i], sizeof(struct node));
  return 0;
}
int cuGraphDestroy(struct graph *graph) {
  for (int i = 0; i < graph->count; i++)
    free(graph->nodes[i]);
  return free(graph), 0;
}
int cuGraphExecDestroy(struct graph *graph) { return executables--, cuGraphDestroy(graph); }
int cuGraphExecKernelNodeSetParams(struct graph *graph, const struct node *node, const struct kernel_node *is) {
  return changes++, set_kernel(graph->nodes[node->number], is), 0;
}
int cuGraphExecMemsetNodeSetParams(struct graph *graph, const struct node *node, const struct fill_node *is,
                                   void *context) {
  return changes++, graph->nodes[node->number]->fill = *is, context == NULL;
}
int cuGraphExecMemcpyNodeSetParams(struct graph *graph, const struct node *node, const struct copy_node *is,
                                   void *context) {
  return changes++, graph->nodes[node->number]->copy = *is, context == NULL;
}
int cuGraphLaunch(struct graph *graph, void *stream) {
  (void)stream, graph_launches++;
  for (int i = 0; i < graph->count; i++) {
    struct node *node = graph->nodes[i];
    if (node->kind == 0)
      run((void *[]){&node->slot[0], &node->slot[1], &node->slot[2], &node->slot[3]});
    else if (node->kind == 1)
      set(node->fill.target, node->fill.value, node->fill.width, node->fill.count);
    else
      memcpy((void *)node->copy.to_device, (void *)node->copy.from_device, node->copy.bytes);
  }
  return 0;
}

int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  static void *self;
  Dl_info info;
  (void)version, (void)flags;
  if (self == NULL && dladdr((void *)cuGetProcAddress, &info))
    self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  return *function = dlsym(self, name), *function == NULL;
}
