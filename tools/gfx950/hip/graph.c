/* Graphs: operations recorded now and run later.
 *
 * A node depends only on nodes that were added before it, so the order of adding is an order in which
 * everything can run, and that is how a graph is run.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

enum node_kind { NOTHING, KERNEL, FILL, COPY, RECORD };

/* A node of a graph, or of a program made of one: then `origin` is the graph's. */
struct node {
  enum node_kind kind;
  struct node *next;
  const struct node *origin;
  struct launch launch;
  struct {
    void *dst;
    const void *src;
    size_t size;
    hipMemcpyKind direction;
    uint32_t value;
    unsigned element;
  } transfer;
  hipEvent_t event;
};

struct node_list {
  struct node *first, **end;
};

struct graph {
  struct object object;
  struct node_list *nodes;
};

struct graph_program {
  struct object object;
  struct node_list *nodes;
};

static void drop_nodes(struct node_list *nodes) {
  for (struct node *node = nodes->first, *next; node != NULL; node = next) {
    next = node->next;
    drop_launch(&node->launch);
    free(node);
  }
  free(nodes);
}

EXPORT hipError_t hipGraphCreate(hipGraph_t *graph, unsigned int flags) {
  if (flags != 0)
    return FAIL(hipErrorInvalidValue, "flags must be 0, got %u", flags);
  struct node_list *nodes = calloc(1, sizeof *nodes);
  *graph = nodes ? new_object(GRAPH, sizeof **graph) : NULL;
  if (*graph == NULL)
    return free(nodes), FAIL(hipErrorOutOfMemory, "no host memory is left");
  *nodes = (struct node_list){.end = &nodes->first};
  (*graph)->nodes = nodes;
  return hipSuccess;
}

EXPORT hipError_t hipGraphDestroy(hipGraph_t graph) {
  TRY(check_object(graph, GRAPH, __func__));
  drop_nodes(graph->nodes);
  delete_object(graph);
  return hipSuccess;
}

/* A copy of `node`, with arguments of its own; NULL when memory is out. */
static struct node *copy_of(const struct node *node) {
  struct node *made = malloc(sizeof *made);
  if (made == NULL)
    return NULL;
  *made = *node;
  made->next = NULL;
  made->origin = node;
  if (node->kind != KERNEL)
    return made;
  made->launch.arguments = malloc(node->launch.argument_bytes + 1);
  if (made->launch.arguments == NULL)
    return free(made), NULL;
  memcpy(made->launch.arguments, node->launch.arguments, node->launch.argument_bytes);
  return made;
}

/* The nodes of `list` again, for a program; NULL when memory is out. */
static struct node_list *copy_nodes(const struct node_list *list) {
  struct node_list *nodes = calloc(1, sizeof *nodes);
  if (nodes == NULL)
    return NULL;
  nodes->end = &nodes->first;
  for (const struct node *node = list->first; node != NULL; node = node->next) {
    struct node *made = copy_of(node);
    if (made == NULL)
      return drop_nodes(nodes), NULL;
    *nodes->end = made;
    nodes->end = &made->next;
  }
  return nodes;
}

EXPORT hipError_t hipGraphInstantiate(hipGraphExec_t *program, hipGraph_t graph, hipGraphNode_t *error_node,
                                      char *log, size_t room) {
  if (error_node != NULL)
    *error_node = NULL;
  if (log != NULL && room > 0)
    *log = '\0';
  TRY(check_object(graph, GRAPH, __func__));
  struct node_list *nodes = copy_nodes(graph->nodes);
  *program = nodes ? new_object(GRAPH_PROGRAM, sizeof **program) : NULL;
  if (*program == NULL) {
    if (nodes != NULL)
      drop_nodes(nodes);
    return FAIL(hipErrorOutOfMemory, "no host memory is left");
  }
  (*program)->nodes = nodes;
  return hipSuccess;
}

EXPORT hipError_t hipGraphExecDestroy(hipGraphExec_t program) {
  TRY(check_object(program, GRAPH_PROGRAM, __func__));
  drop_nodes(program->nodes);
  delete_object(program);
  return hipSuccess;
}

static hipError_t run_node(const struct node *node, hipStream_t stream, const char *function) {
  switch (node->kind) {
    case KERNEL:
      return run_launch(&node->launch, function);
    case FILL:
      return fill(node->transfer.dst, node->transfer.value, node->transfer.element, node->transfer.size,
                  function);
    case COPY:
      return copy(node->transfer.dst, node->transfer.src, node->transfer.size, node->transfer.direction,
                  function);
    case RECORD:
      return hipEventRecord(node->event, stream);
    default:
      return hipSuccess;
  }
}

EXPORT hipError_t hipGraphLaunch(hipGraphExec_t program, hipStream_t stream) {
  TRY(check_object(program, GRAPH_PROGRAM, __func__));
  TRY(check_stream(stream, __func__));
  for (const struct node *node = program->nodes->first; node != NULL; node = node->next)
    TRY(run_node(node, stream, __func__));
  return hipSuccess;
}

/* -- adding nodes ---------------------------------------------------------------------------------- */

static bool in_graph(const struct graph *graph, const struct node *node) {
  const struct node *known = graph->nodes->first;
  while (known != NULL && known != node)
    known = known->next;
  return known != NULL;
}

/* An empty node at the end of `graph`, for the caller to fill in. */
static hipError_t add(hipGraphNode_t *node, hipGraph_t graph, const hipGraphNode_t *before, size_t count,
                      const char *function) {
  TRY(check_object(graph, GRAPH, function));
  for (size_t i = 0; i < count; i++)
    if (!in_graph(graph, before[i]))
      return fail(hipErrorInvalidValue, function, "dependency %zu is no node of this graph", i);
  struct node *made = calloc(1, sizeof *made);
  if (made == NULL)
    return fail(hipErrorOutOfMemory, function, "no host memory is left");
  *graph->nodes->end = made;
  graph->nodes->end = &made->next;
  *node = made;
  return hipSuccess;
}

EXPORT hipError_t hipGraphAddEmptyNode(hipGraphNode_t *node, hipGraph_t graph, const hipGraphNode_t *before,
                                       size_t count) {
  return add(node, graph, before, count, __func__);
}

EXPORT hipError_t hipGraphAddEventRecordNode(hipGraphNode_t *node, hipGraph_t graph,
                                             const hipGraphNode_t *before, size_t count, hipEvent_t event) {
  TRY(check_object(event, EVENT, __func__));
  TRY(add(node, graph, before, count, __func__));
  (*node)->kind = RECORD;
  (*node)->event = event;
  return hipSuccess;
}

EXPORT hipError_t hipGraphAddKernelNode(hipGraphNode_t *node, hipGraph_t graph, const hipGraphNode_t *before,
                                        size_t count, const hipKernelNodeParams *is) {
  struct launch launch = {0};
  hipError_t error = prepare_launch(&launch, is->func, is->gridDim, is->blockDim, is->sharedMemBytes,
                                    is->kernelParams, is->extra, __func__);
  if (error == hipSuccess)
    error = add(node, graph, before, count, __func__);
  if (error != hipSuccess)
    return drop_launch(&launch), error;
  (*node)->kind = KERNEL;
  (*node)->launch = launch;
  return hipSuccess;
}

EXPORT hipError_t hipGraphAddMemsetNode(hipGraphNode_t *node, hipGraph_t graph, const hipGraphNode_t *before,
                                        size_t count, const hipMemsetParams *is) {
  if (is->height != 1)
    return FAIL(hipErrorNotSupported, "%zu rows; one is supported", is->height);
  TRY(add(node, graph, before, count, __func__));
  (*node)->kind = FILL;
  (*node)->transfer.dst = is->dst;
  (*node)->transfer.value = is->value;
  (*node)->transfer.element = is->elementSize;
  (*node)->transfer.size = is->width;
  return hipSuccess;
}

/* The first byte of one side of a copy, or NULL if it is not plain memory from its beginning. */
static unsigned char *first_byte(const hipMemcpySide *side) {
  void *base = side->memoryType == hipMemoryTypeHost     ? side->host
               : side->memoryType == hipMemoryTypeDevice ? side->device
                                                         : NULL;
  return base == NULL || side->y || side->z || side->lod ? NULL : (unsigned char *)base + side->xInBytes;
}

EXPORT hipError_t hipDrvGraphAddMemcpyNode(hipGraphNode_t *node, hipGraph_t graph,
                                           const hipGraphNode_t *before, size_t count, const HIP_MEMCPY3D *is,
                                           hipCtx_t context) {
  const void *src = first_byte(&is->src);
  void *dst = first_byte(&is->dst);
  if (is->height != 1 || is->depth != 1 || src == NULL || dst == NULL)
    return FAIL(hipErrorNotSupported, "only one row of plain memory is supported");
  TRY(check_object(context, CONTEXT, __func__));
  TRY(add(node, graph, before, count, __func__));
  bool to_host = is->dst.memoryType == hipMemoryTypeHost, from_host = is->src.memoryType == hipMemoryTypeHost;
  (*node)->kind = COPY;
  (*node)->transfer.dst = dst;
  (*node)->transfer.src = src;
  (*node)->transfer.size = is->widthInBytes;
  (*node)->transfer.direction = from_host ? (to_host ? hipMemcpyHostToHost : hipMemcpyHostToDevice)
                                          : (to_host ? hipMemcpyDeviceToHost : hipMemcpyDeviceToDevice);
  return hipSuccess;
}

EXPORT hipError_t hipGraphAddMemcpyNode1D(hipGraphNode_t *node, hipGraph_t graph, const hipGraphNode_t *before,
                                          size_t count, void *dst, const void *src, size_t size,
                                          hipMemcpyKind direction) {
  TRY(add(node, graph, before, count, __func__));
  (*node)->kind = COPY;
  (*node)->transfer.dst = dst;
  (*node)->transfer.src = src;
  (*node)->transfer.size = size;
  (*node)->transfer.direction = direction;
  return hipSuccess;
}

/* -- changing the nodes of a program ------------------------------------------------------------------ */

/* The node of `program` that was made of `origin`, which is of this kind. */
static hipError_t find(struct node **node, hipGraphExec_t program, hipGraphNode_t origin, enum node_kind kind,
                       const char *function) {
  TRY(check_object(program, GRAPH_PROGRAM, function));
  for (*node = program->nodes->first; *node != NULL && (*node)->origin != origin; *node = (*node)->next)
    ;
  if (*node == NULL)
    return fail(hipErrorInvalidValue, function, "the node is none of the graph that the program was made of");
  return (*node)->kind == kind ? hipSuccess
                               : fail(hipErrorInvalidValue, function, "the node is of another kind");
}

EXPORT hipError_t hipGraphExecKernelNodeSetParams(hipGraphExec_t program, hipGraphNode_t origin,
                                                  const hipKernelNodeParams *is) {
  struct node *node;
  struct launch launch = {0};
  TRY(find(&node, program, origin, KERNEL, __func__));
  hipError_t error = prepare_launch(&launch, is->func, is->gridDim, is->blockDim, is->sharedMemBytes,
                                    is->kernelParams, is->extra, __func__);
  if (error != hipSuccess)
    return drop_launch(&launch), error;
  drop_launch(&node->launch);
  node->launch = launch;
  return hipSuccess;
}

EXPORT hipError_t hipGraphExecMemsetNodeSetParams(hipGraphExec_t program, hipGraphNode_t origin,
                                                  const hipMemsetParams *is) {
  struct node *node;
  if (is->height != 1)
    return FAIL(hipErrorNotSupported, "%zu rows; one is supported", is->height);
  TRY(find(&node, program, origin, FILL, __func__));
  node->transfer.dst = is->dst;
  node->transfer.value = is->value;
  node->transfer.element = is->elementSize;
  node->transfer.size = is->width;
  return hipSuccess;
}

EXPORT hipError_t hipGraphExecMemcpyNodeSetParams1D(hipGraphExec_t program, hipGraphNode_t origin, void *dst,
                                                    const void *src, size_t size, hipMemcpyKind direction) {
  struct node *node;
  TRY(find(&node, program, origin, COPY, __func__));
  if (direction != node->transfer.direction)
    return FAIL(hipErrorInvalidValue, "a copy keeps its direction");
  node->transfer.dst = dst;
  node->transfer.src = src;
  node->transfer.size = size;
  return hipSuccess;
}
