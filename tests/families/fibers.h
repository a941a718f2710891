// The threads of a workgroup on the host: every one is a fiber; fibers run in turn and meet at every exchange between
// lanes.  For running GPU sources without a GPU, bit for bit.

#include <standard.h>

#ifndef STACK_BYTES
#define STACK_BYTES (256 * 1024)
#endif

struct Place { jmp_buf at; };

static uint32_t current_block, current_thread;
static std::vector<ucontext_t> fibers;  // where each begins
static std::vector<Place> places;       // where each stopped: a jump needs no system call, unlike swapcontext
static std::vector<uint32_t> slots;
static std::vector<char> begun, done;
static jmp_buf home;
static void (*thread_body)();

// Hand over to the scheduler; it comes back once every other fiber has got this far (or ended).
static void meet() {
  if (!_setjmp(places[current_thread].at)) _longjmp(home, 1);
}

// Every thread gives a value; the caller then asks for those of any threads, before it meets the others again.
static void offer(uint32_t value) {
  slots[current_thread] = value;
  meet();
}

static void fiber() {
  thread_body();
  done[current_thread] = 1;
  _longjmp(home, 1);
}

// Run the current fiber until it meets the others or ends.
static void resume() {
  if (_setjmp(home)) return;
  if (begun[current_thread]) _longjmp(places[current_thread].at, 1);
  begun[current_thread] = 1;
  setcontext(&fibers[current_thread]);
}

static void run_blocks(uint32_t blocks, uint32_t threads, void (*body)()) {
  const size_t stack = STACK_BYTES;
  char *stacks = (char *)malloc(stack * threads);  // not cleared: few of its pages are touched
  thread_body = body;
  fibers.resize(threads), places.resize(threads), slots.resize(threads);
  for (current_block = 0; current_block < blocks; ++current_block) {
    begun.assign(threads, 0), done.assign(threads, 0);
    for (uint32_t t = 0; t < threads; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = &stacks[t * stack];
      fibers[t].uc_stack.ss_size = stack;
      makecontext(&fibers[t], fiber, 0);
    }
    for (uint32_t left = threads; left;)
      for (current_thread = 0, left = 0; current_thread < threads; ++current_thread)
        if (!done[current_thread]) {
          resume();
          left += !done[current_thread];
        }
  }
  free(stacks);
}
