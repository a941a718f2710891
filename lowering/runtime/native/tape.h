/* What the halves of the library share: tape.c keeps what a call issues and plays it again, a driver_*.h says
 * how that is said to one driver and where IREE's calls of it pass by. */
#ifndef VMFUSE_TAPE_H
#define VMFUSE_TAPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum kind { LAUNCH, COPY, FILL };

/* One thing that a call issues.  Its slots are a kernel's parameters, a copy's target and source, or a fill's
 * target: 8 bytes each, of which a 4-byte parameter has the first. */
struct operation {
  enum kind kind;
  void *function;
  unsigned grid[3], block[3], shared;
  size_t count;          /* of a copy its bytes, of a fill its elements */
  unsigned value, width; /* of a fill: the element, and its bytes */
  unsigned slots;
  uint64_t *slot;
  void **parameters;    /* to the slots */
  unsigned char *bytes; /* of a slot: 8 for an address, else the size of a constant */
  unsigned char *host;  /* of a copy from the host: what is copied; owned */
  unsigned first, relocations;
  void *node;
};

/* What passes by, as a driver's hooks tell it; all are no-ops while nothing is recorded. */
bool recording(void);
void note_launch(void *function, const unsigned *grid, const unsigned *block, unsigned shared, void *stream,
                 void **parameters, void **extra);
void note_copy(uint64_t target, uint64_t source, size_t size, void *stream);
void note_update(uint64_t target, const void *source, size_t size, void *stream);
void note_fill(uint64_t target, unsigned value, unsigned width, size_t count, void *stream);
void note_other(const char *what);
void note_allocated(uint64_t base, size_t size, bool of_host);
void note_freed(uint64_t base);

/* How a driver is told; results are its error codes, 0 for success. */
static int parameter_bytes(void *function, unsigned number, size_t *bytes); /* not 0: there is none */
static int driver_ready(void);
static int current_context(void **context);
static int enter(void *context);
static void leave(void);
static int wait_for_all(void);
static int capturing(void *stream, int *is);
static int issue(const struct operation *operation, void *stream);
static int device_memory(uint64_t *base, size_t size, const void *content);
static void free_device_memory(uint64_t base);
static int new_graph(void **graph);
static void drop_graph(void *graph);
static int add_node(void *graph, void *context, void *const *before, struct operation *operation);
static int make_executable(void **executable, void *graph);
static int set_node(void *executable, void *context, const struct operation *operation);
static int play_executable(void *executable, void *stream);
static void drop_executable(void *executable);
static const char *describe(int code);

#endif
