/* A library between IREE and a GPU's driver: it passes everything on, keeps what one call issues, and plays that
 * again at other addresses, as one graph.
 *
 * It is built with CUDA or HIP defined, and linked to the driver's library, in which the dynamic loader finds all
 * that is not found here.  While a recording is on, what passes by is kept in IREE's order, which is the order of
 * its one stream.  A recording is given the memory that the caller passes; each address in it must lie there, or
 * in memory that was allocated when the program was loaded (weights), or the recording is refused.  So is one that
 * allocates, or uses memory that the host can read: what is issued then may depend on what was computed.
 */
#define _GNU_SOURCE
#include "tape.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VARIANTS = 4 };
enum { STALE = -1, NO_MEMORY = -2 };

struct range {
  uint64_t base, size;
};

/* Memory that the driver gave to IREE. */
struct allocation {
  struct range range;
  uint64_t number, owner; /* in the order of allocation; the program, 0 for none */
  bool of_host;           /* the host can read it, so what a program does next may depend on it */
};

/* An address that is another one in every call: `operation`'s slot is the base of the buffer plus `offset`. */
struct relocation {
  unsigned operation, slot, buffer;
  uint64_t offset;
};

/* The graph, made executable, with the addresses that it has now. */
struct variant {
  void *executable;
  uint64_t *addresses, used;
};

struct tape {
  pthread_mutex_t lock;
  void *context, *stream; /* IREE's */
  struct range *buffers;
  unsigned buffer_count, operation_count, relocation_count, fixed_count, variant_count;
  struct operation *operations;
  struct relocation *relocations;
  struct allocation *fixed; /* what addresses that stay the same lie in */
  uint64_t owner, epoch, plays;
  bool captured;
  uint64_t constants; /* device memory of what was copied from the host */
  void *graph;
  struct variant variants[VARIANTS];
  char reason[256];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct tape *_Atomic current;
static struct allocation *allocated;
static size_t allocated_count, allocated_room;
static uint64_t allocated_number, owner;
static _Atomic uint64_t freed; /* how often memory was */

/* -- keeping -------------------------------------------------------------------------------------------------- */

bool recording(void) { return atomic_load_explicit(&current, memory_order_acquire) != NULL; }

static void refuse(struct tape *tape, const char *format, ...) {
  if (tape->reason[0])
    return;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(tape->reason, sizeof tape->reason, format, arguments);
  va_end(arguments);
}

/* A larger copy of an array that has no room for one more; NULL leaves it as it is. */
static void *grown(void *array, unsigned count, size_t size) {
  bool full = (count & (count - 1)) == 0;
  return full ? realloc(array, (count ? 2 * (size_t)count : 1) * size) : array;
}

/* A new operation with `slots` slots at the end of the tape; hold `lock`. */
static struct operation *append(struct tape *tape, enum kind kind, unsigned slots, void *stream) {
  if (tape->operation_count > 0 && tape->stream != stream)
    refuse(tape, "it uses several streams");
  tape->stream = stream;
  if (tape->context == NULL && current_context(&tape->context) != 0)
    refuse(tape, "the driver does not say which context is in use");
  struct operation *operations = grown(tape->operations, tape->operation_count, sizeof *operations);
  struct operation made = {.kind = kind, .slots = slots};
  made.slot = calloc(slots + 1, sizeof *made.slot);
  made.parameters = calloc(slots + 1, sizeof *made.parameters);
  made.bytes = calloc(slots + 1, 1);
  if (operations != NULL)
    tape->operations = operations;
  if (!operations || !made.slot || !made.parameters || !made.bytes) {
    free(made.slot), free(made.parameters), free(made.bytes);
    refuse(tape, "no host memory is left");
    return NULL;
  }
  for (unsigned i = 0; i < slots; i++) {
    made.parameters[i] = &made.slot[i];
    made.bytes[i] = 8;
  }
  tape->operations[tape->operation_count] = made;
  return &tape->operations[tape->operation_count++];
}

/* The tape that is being recorded and has not been refused, with `lock` held; NULL without it. */
static struct tape *open_tape(void) {
  if (!recording())
    return NULL;
  pthread_mutex_lock(&lock);
  struct tape *tape = current;
  if (tape != NULL && !tape->reason[0])
    return tape;
  pthread_mutex_unlock(&lock);
  return NULL;
}

void note_launch(void *function, const unsigned *grid, const unsigned *block, unsigned shared, void *stream,
                 void **parameters, void **extra) {
  struct tape *tape = open_tape();
  if (tape == NULL)
    return;
  unsigned count = 0;
  size_t bytes[256];
  while (count < 256 && parameter_bytes(function, count, &bytes[count]) == 0)
    count++;
  if (extra != NULL || count == 0 || count == 256)
    refuse(tape, "the driver does not tell a kernel's parameters");
  struct operation *made = tape->reason[0] ? NULL : append(tape, LAUNCH, count, stream);
  for (unsigned i = 0; made != NULL && i < count; i++) {
    if (bytes[i] == 0 || bytes[i] > 8)
      refuse(tape, "a kernel takes a parameter of %zu bytes", bytes[i]);
    else
      memcpy(&made->slot[i], parameters[i], made->bytes[i] = (unsigned char)bytes[i]);
  }
  if (made != NULL) {
    made->function = function;
    memcpy(made->grid, grid, sizeof made->grid);
    memcpy(made->block, block, sizeof made->block);
    made->shared = shared;
  }
  pthread_mutex_unlock(&lock);
}

void note_copy(uint64_t target, uint64_t source, size_t size, void *stream) {
  struct tape *tape = open_tape();
  if (tape == NULL)
    return;
  struct operation *made = size ? append(tape, COPY, 2, stream) : NULL;
  if (made != NULL)
    made->slot[0] = target, made->slot[1] = source, made->count = size;
  pthread_mutex_unlock(&lock);
}

void note_update(uint64_t target, const void *source, size_t size, void *stream) {
  struct tape *tape = open_tape();
  if (tape == NULL)
    return;
  struct operation *made = size ? append(tape, COPY, 2, stream) : NULL;
  if (made != NULL && (made->host = malloc(size)) == NULL)
    refuse(tape, "no host memory is left");
  else if (made != NULL)
    memcpy(made->host, source, size), made->slot[0] = target, made->count = size;
  pthread_mutex_unlock(&lock);
}

void note_fill(uint64_t target, unsigned value, unsigned width, size_t count, void *stream) {
  struct tape *tape = open_tape();
  if (tape == NULL)
    return;
  struct operation *made = count ? append(tape, FILL, 1, stream) : NULL;
  if (made != NULL)
    made->slot[0] = target, made->value = value, made->width = width, made->count = count;
  pthread_mutex_unlock(&lock);
}

void note_other(const char *what) {
  struct tape *tape = open_tape();
  if (tape == NULL)
    return;
  refuse(tape, "it calls %s", what);
  pthread_mutex_unlock(&lock);
}

void note_allocated(uint64_t base, size_t size, bool of_host) {
  pthread_mutex_lock(&lock);
  if (current != NULL)
    refuse(current, "it allocates memory");
  if (allocated_count == allocated_room) {
    size_t room = allocated_room ? 2 * allocated_room : 64;
    void *larger = realloc(allocated, room * sizeof *allocated);
    if (larger != NULL)
      allocated = larger, allocated_room = room;
  }
  /* Without room it is not known, and what uses it is not recorded. */
  if (allocated_count < allocated_room)
    allocated[allocated_count++] = (struct allocation){{base, size}, ++allocated_number, owner, of_host};
  pthread_mutex_unlock(&lock);
}

void note_freed(uint64_t base) {
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < allocated_count; i++)
    if (allocated[i].range.base == base) {
      allocated[i] = allocated[--allocated_count];
      atomic_fetch_add(&freed, 1);
      break;
    }
  pthread_mutex_unlock(&lock);
}

/* -- from a recording to a graph -------------------------------------------------------------------------------- */

static bool holds(struct range range, uint64_t address) {
  return address >= range.base && address - range.base < range.size;
}

/* Note what memory of the program's `address` lies in; false if it lies in none of it, or the host can read it. */
static bool is_fixed(struct tape *tape, uint64_t address) {
  for (unsigned i = 0; i < tape->fixed_count; i++)
    if (holds(tape->fixed[i].range, address))
      return true;
  for (size_t i = 0; i < allocated_count; i++) {
    if (!holds(allocated[i].range, address) || allocated[i].owner != tape->owner || allocated[i].of_host)
      continue;
    struct allocation *fixed = grown(tape->fixed, tape->fixed_count, sizeof *fixed);
    if (fixed == NULL)
      return false;
    tape->fixed = fixed;
    tape->fixed[tape->fixed_count++] = allocated[i];
    return true;
  }
  return false;
}

/* Say what the address in a slot is of. */
static bool locate(struct tape *tape, unsigned number, unsigned slot) {
  struct operation *operation = &tape->operations[number];
  uint64_t address = operation->slot[slot];
  if (address == 0)
    return true;
  for (unsigned i = 0; i < tape->buffer_count; i++) {
    if (!holds(tape->buffers[i], address))
      continue;
    struct relocation *made = grown(tape->relocations, tape->relocation_count, sizeof *made);
    if (made == NULL)
      return false;
    tape->relocations = made;
    made[tape->relocation_count++] =
        (struct relocation){number, slot, i, address - tape->buffers[i].base};
    operation->relocations++;
    return true;
  }
  return is_fixed(tape, address);
}

static void locate_all(struct tape *tape) {
  for (unsigned i = 0; i < tape->operation_count; i++) {
    struct operation *operation = &tape->operations[i];
    operation->first = tape->relocation_count;
    for (unsigned slot = 0; slot < operation->slots; slot++)
      if (operation->bytes[slot] == 8 && !(operation->host && slot == 1) && !locate(tape, i, slot))
        return refuse(tape, "it uses memory that is neither the caller's nor the program's own on the device");
  }
}

/* Give what was copied from the host a place on the device. */
static int place_constants(struct tape *tape) {
  size_t size = 0;
  for (unsigned i = 0; i < tape->operation_count; i++)
    size += tape->operations[i].host ? (tape->operations[i].count + 255) / 256 * 256 : 0;
  if (size == 0)
    return 0;
  unsigned char *all = calloc(1, size);
  if (all == NULL)
    return NO_MEMORY;
  size = 0;
  for (unsigned i = 0; i < tape->operation_count; i++)
    if (tape->operations[i].host != NULL) {
      memcpy(all + size, tape->operations[i].host, tape->operations[i].count);
      size += (tape->operations[i].count + 255) / 256 * 256;
    }
  int error = device_memory(&tape->constants, size, all);
  free(all);
  uint64_t place = tape->constants;
  for (unsigned i = 0; i < tape->operation_count; i++)
    if (tape->operations[i].host != NULL) {
      tape->operations[i].slot[1] = place;
      place += (tape->operations[i].count + 255) / 256 * 256;
    }
  return error;
}

/* The graph: a chain, in IREE's order. */
static int make_graph(struct tape *tape) {
  int error = new_graph(&tape->graph);
  void *const *before = NULL;
  for (unsigned i = 0; error == 0 && i < tape->operation_count; i++) {
    error = add_node(tape->graph, tape->context, before, &tape->operations[i]);
    before = &tape->operations[i].node;
  }
  return error;
}

/* What is allocated from now on is the memory of the program `number`; 0 for none. */
EXPORT void tape_load(uint64_t number) {
  pthread_mutex_lock(&lock);
  owner = number;
  pthread_mutex_unlock(&lock);
}

/* Begin to record a call of the program `number`, which is passed memory at `bases`; NULL if something else is
 * being recorded, or no memory is left. */
EXPORT struct tape *tape_begin(uint64_t number, const uint64_t *bases, const uint64_t *sizes, unsigned count) {
  struct tape *tape = calloc(1, sizeof *tape);
  if (tape == NULL || (tape->buffers = calloc(count + 1, sizeof *tape->buffers)) == NULL)
    return free(tape), NULL;
  pthread_mutex_init(&tape->lock, NULL);
  tape->owner = number;
  tape->buffer_count = count;
  for (unsigned i = 0; i < count; i++)
    tape->buffers[i] = (struct range){bases[i], sizes[i]};
  pthread_mutex_lock(&lock);
  bool alone = current == NULL;
  if (alone)
    current = tape;
  pthread_mutex_unlock(&lock);
  if (alone)
    return tape;
  free(tape->buffers), free(tape);
  return NULL;
}

/* End the recording and make its graph; `tape_reason` says why that cannot be, if it says anything. */
EXPORT void tape_end(struct tape *tape) {
  pthread_mutex_lock(&lock);
  current = NULL;
  tape->epoch = freed;
  if (!tape->reason[0] && tape->operation_count == 0)
    refuse(tape, "nothing of it passes by the library");
  if (!tape->reason[0])
    locate_all(tape);
  pthread_mutex_unlock(&lock);
  if (tape->reason[0])
    return;
  int error = enter(tape->context);
  if (error == 0) {
    error = place_constants(tape);
    error = error ? error : make_graph(tape);
    leave();
  }
  if (error != 0)
    refuse(tape, "its graph cannot be made: %s", describe(error));
}

EXPORT const char *tape_reason(const struct tape *tape) { return tape->reason; }

EXPORT unsigned tape_operations(const struct tape *tape) { return tape->operation_count; }

/* Whether it was played on a stream that was being captured: a graph of the caller's has its operations then. */
EXPORT int tape_captured(const struct tape *tape) { return tape->captured; }

#include "play.h"

EXPORT const char *tape_error(int code) {
  return code == STALE ? "the program's memory has been freed" : describe(code);
}

/* Let a tape go, once the device has done all that was asked of it; one that was being recorded is so no more. */
EXPORT void tape_drop(struct tape *tape) {
  pthread_mutex_lock(&lock);
  if (current == tape)
    current = NULL;
  pthread_mutex_unlock(&lock);
  if (tape->context != NULL && enter(tape->context) == 0) {
    if (tape->plays > 0)
      wait_for_all();
    for (unsigned i = 0; i < tape->variant_count; i++)
      drop_variant(&tape->variants[i]);
    if (tape->graph != NULL)
      drop_graph(tape->graph);
    if (tape->constants != 0)
      free_device_memory(tape->constants);
    leave();
  }
  for (unsigned i = 0; i < tape->operation_count; i++) {
    struct operation *operation = &tape->operations[i];
    free(operation->slot), free(operation->parameters), free(operation->bytes), free(operation->host);
  }
  free(tape->operations), free(tape->relocations), free(tape->fixed), free(tape->buffers);
  pthread_mutex_destroy(&tape->lock);
  free(tape);
}

EXPORT int tape_ready(void) { return driver_ready(); }

#if defined(FOR_CUDA)
#include "driver_cuda.h"
#elif defined(FOR_HIP)
#include "driver_hip.h"
#endif
