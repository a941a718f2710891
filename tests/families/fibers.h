// The threads of a workgroup on the host: every one is a fiber; fibers run in turn and meet at every exchange between
// lanes.  For running GPU sources without a GPU, bit for bit.

#include <cstdint>
#include <ucontext.h>
#include <vector>

#ifndef STACK_BYTES
#define STACK_BYTES (256 * 1024)
#endif

static uint32_t current_block, current_thread;
static std::vector<ucontext_t> fibers;
static std::vector<uint32_t> slots;
static std::vector<char> done;
static ucontext_t home;
static void (*thread_body)();

// Hand over to the scheduler; it comes back once every other fiber has got this far (or ended).
static void meet() { swapcontext(&fibers[current_thread], &home); }

// Every thread gives a value; the caller then asks for those of any threads, before it meets the others again.
static void offer(uint32_t value) {
  slots[current_thread] = value;
  meet();
}

static void fiber() {
  thread_body();
  done[current_thread] = 1;
}

static void run_blocks(uint32_t blocks, uint32_t threads, void (*body)()) {
  const size_t stack = STACK_BYTES;
  std::vector<char> stacks(stack * threads);
  thread_body = body;
  fibers.resize(threads), slots.resize(threads);
  for (current_block = 0; current_block < blocks; ++current_block) {
    done.assign(threads, 0);
    for (uint32_t t = 0; t < threads; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = &stacks[t * stack];
      fibers[t].uc_stack.ss_size = stack;
      fibers[t].uc_link = &home;
      makecontext(&fibers[t], fiber, 0);
    }
    for (uint32_t left = threads; left;)
      for (current_thread = 0, left = 0; current_thread < threads; ++current_thread)
        if (!done[current_thread]) {
          swapcontext(&home, &fibers[current_thread]);
          left += !done[current_thread];
        }
  }
}
