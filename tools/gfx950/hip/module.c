/* Modules, functions and launches, which are the executor's work: a process of its own, started with the
 * first module and asked over a socket.  It maps the arena at the same addresses, so memory is not copied.
 *
 * A request is {u32 kind, u32 0, u64 bytes} and its payload, an answer {i32 hipError_t, u32 0, u64 bytes}
 * and its payload: the result, or the sentence that says why not.  tools/gfx950/hip/worker.py has the
 * other end.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

extern char **environ;

enum { MAX_IMAGE_BYTES = 256 << 20 };

enum request { HELLO = 1, LOAD, UNLOAD, FIND, LAUNCH };
struct header {
  int32_t kind; /* of a request; of an answer its hipError_t */
  uint32_t zero;
  uint64_t bytes;
};

/* A part of a request: several are sent one behind the other. */
struct part {
  const void *data;
  size_t bytes;
};

static pthread_mutex_t executor_lock = PTHREAD_MUTEX_INITIALIZER;
static int executor = -1; /* the socket */

/* -- talking --------------------------------------------------------------------------------------- */

static bool send_all(const void *data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    ssize_t n = send(executor, (const char *)data + done, bytes - done, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return false;
    done += (size_t)n;
  }
  return true;
}

static bool receive_all(void *data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    ssize_t n = recv(executor, (char *)data + done, bytes - done, 0);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return false;
    done += (size_t)n;
  }
  return true;
}

static hipError_t lost(const char *function) {
  close(executor);
  executor = -1;
  return fail(hipErrorLaunchFailure, function, "the executor's process ended without an answer");
}

/* Send a request and wait for its answer, at most `room` bytes at `result`; hold `executor_lock`. */
static hipError_t ask(enum request kind, const struct part *parts, size_t count, void *result, size_t room,
                      size_t *bytes, const char *function) {
  struct header header = {.kind = (int32_t)kind};
  for (size_t i = 0; i < count; i++)
    header.bytes += parts[i].bytes;
  bool alive = send_all(&header, sizeof header);
  for (size_t i = 0; alive && i < count; i++)
    alive = send_all(parts[i].data, parts[i].bytes);
  if (!alive || !receive_all(&header, sizeof header))
    return lost(function);
  if (header.kind != hipSuccess) {
    char why[1024] = "";
    if (header.bytes >= sizeof why || !receive_all(why, header.bytes))
      return lost(function);
    return fail(header.kind, function, "%s", why);
  }
  if (header.bytes > room || !receive_all(result, header.bytes))
    return lost(function);
  if (bytes != NULL)
    *bytes = header.bytes;
  return hipSuccess;
}

/* -- starting the executor ------------------------------------------------------------------------- */

/* EXECUTOR_COMMAND, a list of strings, is defined where this file is compiled; two descriptors follow. */
static hipError_t spawn_executor(int child, const char *function) {
  static const char *const command[] = {EXECUTOR_COMMAND};
  enum { WORDS = sizeof command / sizeof *command };
  char *argv[WORDS + 3] = {0}, socket_number[16], file_number[16];
  pid_t process;
  int file = fcntl(arena_file(), F_DUPFD, 3); /* without FD_CLOEXEC */
  memcpy(argv, command, sizeof command);
  snprintf(argv[WORDS] = socket_number, sizeof socket_number, "%d", child);
  snprintf(argv[WORDS + 1] = file_number, sizeof file_number, "%d", file);
  int error = posix_spawn(&process, argv[0], NULL, NULL, argv, environ);
  close(file);
  return error ? fail(hipErrorNotInitialized, function, "%s cannot be started: %s", argv[0], strerror(error))
               : hipSuccess;
}

/* Hold `executor_lock`. */
static hipError_t need_executor(const char *function) {
  int ends[2];
  if (executor >= 0)
    return hipSuccess;
  if (arena_file() < 0)
    return fail(hipErrorNotInitialized, function, "there is no device memory yet");
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0)
    return fail(hipErrorNotInitialized, function, "no socket: %s", strerror(errno));
  executor = ends[0];
  fcntl(executor, F_SETFD, FD_CLOEXEC);
  hipError_t error = spawn_executor(ends[1], function);
  close(ends[1]);
  if (error != hipSuccess)
    return close(executor), executor = -1, error;
  uint64_t place[2] = {arena_base(), arena_size()};
  struct part parts[] = {{place, sizeof place}, {machine()->arch, strlen(machine()->arch)}};
  return ask(HELLO, parts, 2, NULL, 0, NULL, function);
}

/* -- modules --------------------------------------------------------------------------------------- */

struct module {
  struct object object;
  uint64_t id;
};

/* What the executor says of a kernel; worker.py packs it. */
struct kernel {
  uint64_t id;
  uint32_t argument_bytes, lds_bytes, scratch_bytes, registers, max_threads, argument_count;
  struct {
    uint32_t offset, size;
  } arguments[256];
};

struct function {
  struct object object;
  struct module *module;
  struct kernel kernel;
  char name[256];
};

/* The end of a table of an ELF header: `count` entries of `size` bytes from `start`. */
static uint64_t table_end(const unsigned char *image, size_t start_at, size_t size_at) {
  uint64_t start;
  uint16_t size, count;
  memcpy(&start, image + start_at, sizeof start);
  memcpy(&size, image + size_at, sizeof size);
  memcpy(&count, image + size_at + 2, sizeof count);
  return count ? start + (uint64_t)size * count : 0;
}

static bool readable(const void *from, uint64_t bytes) {
  unsigned char in_core[(MAX_IMAGE_BYTES >> 12) + 2];
  uintptr_t page = (uintptr_t)from & ~(uintptr_t)4095;
  return bytes <= MAX_IMAGE_BYTES && mincore((void *)page, (uintptr_t)from + bytes - page, in_core) == 0;
}

/* The length of the ELF file at `image`, which HIP does not pass: linkers write the section table last. */
static hipError_t image_bytes(size_t *bytes, const unsigned char *image, const char *function) {
  if (memcmp(image, "\177ELF\2\1", 6) != 0)
    return fail(hipErrorInvalidImage, function, "the image is no 64-bit little-endian ELF file");
  uint64_t segments = table_end(image, 32, 54), sections = table_end(image, 40, 58);
  *bytes = segments > sections ? segments : sections;
  if (readable(image, *bytes))
    return hipSuccess;
  return fail(hipErrorInvalidImage, function,
              "the image is truncated or damaged: by its header it has %zu bytes", *bytes);
}

EXPORT hipError_t hipModuleLoadData(hipModule_t *module, const void *image) {
  size_t bytes = 0;
  TRY(image_bytes(&bytes, image, __func__));
  struct module *made = new_object(MODULE, sizeof *made);
  if (made == NULL)
    return FAIL(hipErrorOutOfMemory, "no host memory is left");
  struct part part = {image, bytes};
  pthread_mutex_lock(&executor_lock);
  hipError_t error = need_executor(__func__);
  if (error == hipSuccess)
    error = ask(LOAD, &part, 1, &made->id, sizeof made->id, NULL, __func__);
  pthread_mutex_unlock(&executor_lock);
  if (error != hipSuccess)
    return delete_object(made), error;
  *module = made;
  return hipSuccess;
}

/* The buffer for an error log stays as it is: hipGetErrorString has the sentence, and IREE prints both. */
EXPORT hipError_t hipModuleLoadDataEx(hipModule_t *module, const void *image, unsigned int count,
                                      hipJitOption *options, void **values) {
  (void)values;
  for (unsigned int i = 0; i < count; i++)
    if (options[i] != hipJitOptionErrorLogBuffer && options[i] != hipJitOptionErrorLogBufferSizeBytes)
      return FAIL(hipErrorInvalidValue, "option %d is not known here", options[i]);
  return hipModuleLoadData(module, image);
}

EXPORT hipError_t hipModuleUnload(hipModule_t module) {
  TRY(check_object(module, MODULE, __func__));
  struct part part = {&module->id, sizeof module->id};
  pthread_mutex_lock(&executor_lock);
  hipError_t error = executor < 0 ? hipSuccess : ask(UNLOAD, &part, 1, NULL, 0, NULL, __func__);
  pthread_mutex_unlock(&executor_lock);
  delete_object(module);
  return error;
}

EXPORT hipError_t hipModuleGetFunction(hipFunction_t *function, hipModule_t module, const char *name) {
  size_t bytes = 0;
  *function = NULL;
  TRY(check_object(module, MODULE, __func__));
  struct function *made = new_object(FUNCTION, sizeof *made);
  if (made == NULL)
    return FAIL(hipErrorOutOfMemory, "no host memory is left");
  struct part parts[] = {{&module->id, sizeof module->id}, {name, strlen(name)}};
  pthread_mutex_lock(&executor_lock);
  hipError_t error = need_executor(__func__);
  if (error == hipSuccess)
    error = ask(FIND, parts, 2, &made->kernel, sizeof made->kernel, &bytes, __func__);
  pthread_mutex_unlock(&executor_lock);
  if (error != hipSuccess)
    return delete_object(made), error;
  made->module = module;
  snprintf(made->name, sizeof made->name, "%s", name);
  *function = made;
  return hipSuccess;
}

EXPORT hipError_t hipFuncGetAttribute(int *value, hipFuncAttribute attribute, const void *function) {
  TRY(check_object(function, FUNCTION, __func__));
  const struct kernel *kernel = &((const struct function *)function)->kernel;
  switch (attribute) {
    case hipFuncAttributeMaxThreadsPerBlock:
      return *value = (int)kernel->max_threads, hipSuccess;
    case hipFuncAttributeSharedSizeBytes:
      return *value = (int)kernel->lds_bytes, hipSuccess;
    case hipFuncAttributeLocalSizeBytes:
      return *value = (int)kernel->scratch_bytes, hipSuccess;
    case hipFuncAttributeNumRegs:
      return *value = (int)kernel->registers, hipSuccess;
    default:
      return FAIL(hipErrorNotSupported, "attribute %d is not known here", attribute);
  }
}

/* -- launches -------------------------------------------------------------------------------------- */

static hipError_t check_shape(const struct launch *launch, const char *name) {
  const struct function *function = launch->function;
  dim3 grid = launch->grid, block = launch->block;
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0)
    return fail(hipErrorInvalidConfiguration, name, "%s: grid %ux%ux%u of %ux%ux%u threads is empty",
                function->name, grid.x, grid.y, grid.z, block.x, block.y, block.z);
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    return fail(hipErrorInvalidConfiguration, name, "%s: grid %ux%ux%u exceeds 2147483647x65535x65535",
                function->name, grid.x, grid.y, grid.z);
  if (block.x > 1024 || block.y > 1024 || block.z > 1024 || threads > function->kernel.max_threads)
    return fail(hipErrorInvalidConfiguration, name,
                "%s: %ux%ux%u threads, the kernel was compiled for at most %u", function->name, block.x,
                block.y, block.z, function->kernel.max_threads);
  if (launch->shared + (uint64_t)function->kernel.lds_bytes > (uint64_t)machine()->lds_bytes)
    return fail(hipErrorInvalidConfiguration, name, "%s: %u + %u bytes of LDS, the device has %d",
                function->name, function->kernel.lds_bytes, launch->shared, machine()->lds_bytes);
  return hipSuccess;
}

hipError_t prepare_launch(struct launch *launch, struct function *function, dim3 grid, dim3 block,
                          unsigned shared, void **parameters, void **extra, const char *name) {
  TRY(check_object(function, FUNCTION, name));
  TRY(check_object(function->module, MODULE, name));
  *launch = (struct launch){function, grid, block, shared, function->kernel.argument_bytes, NULL};
  TRY(check_shape(launch, name));
  if (extra != NULL)
    return fail(hipErrorNotSupported, name, "%s: arguments must come by kernelParams", function->name);
  if (parameters == NULL && function->kernel.argument_count > 0)
    return fail(hipErrorInvalidValue, name, "%s takes %u arguments, got none", function->name,
                function->kernel.argument_count);
  launch->arguments = calloc(1, launch->argument_bytes + 1);
  if (launch->arguments == NULL)
    return fail(hipErrorOutOfMemory, name, "no host memory is left");
  for (uint32_t i = 0; i < function->kernel.argument_count; i++)
    memcpy(launch->arguments + function->kernel.arguments[i].offset, parameters[i],
           function->kernel.arguments[i].size);
  return hipSuccess;
}

void drop_launch(struct launch *launch) { free(launch->arguments); }

/* The executor is told all that is allocated and what the host wrote, so that it can tell what a kernel may
 * touch and what it finds there. */
hipError_t run_launch(const struct launch *launch, const char *name) {
  size_t blocks, writes;
  pthread_mutex_lock(&executor_lock);
  hipError_t error = need_executor(name);
  if (error != hipSuccess)
    return pthread_mutex_unlock(&executor_lock), error;
  pthread_mutex_lock(&memory_lock);
  const struct allocation *live = allocations(&blocks);
  const struct range *written = host_writes(&writes);
  uint64_t head[] = {launch->function->kernel.id, blocks, writes, launch->argument_bytes};
  uint32_t shape[] = {launch->grid.x,  launch->grid.y,  launch->grid.z, launch->block.x,
                      launch->block.y, launch->block.z, launch->shared, 0};
  struct part parts[] = {{head, sizeof head},
                         {shape, sizeof shape},
                         {live, blocks * sizeof *live},
                         {written, writes * sizeof *written},
                         {launch->arguments, launch->argument_bytes}};
  registered_to_device();
  error = ask(LAUNCH, parts, sizeof parts / sizeof *parts, NULL, 0, NULL, name);
  registered_to_host();
  forget_host_writes();
  pthread_mutex_unlock(&memory_lock);
  pthread_mutex_unlock(&executor_lock);
  return error;
}

EXPORT hipError_t hipModuleLaunchKernel(hipFunction_t function, unsigned int grid_x, unsigned int grid_y,
                                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                        unsigned int block_z, unsigned int shared, hipStream_t stream,
                                        void **parameters, void **extra) {
  struct launch launch = {0};
  TRY(check_stream(stream, __func__));
  hipError_t error = prepare_launch(&launch, function, (dim3){grid_x, grid_y, grid_z},
                                    (dim3){block_x, block_y, block_z}, shared, parameters, extra, __func__);
  if (error == hipSuccess)
    error = run_launch(&launch, __func__);
  drop_launch(&launch);
  return error;
}
