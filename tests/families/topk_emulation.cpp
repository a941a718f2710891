// Runs the GPU routing kernel (kernels/topk.h) on the host, so that its arithmetic and its lane mapping can be tested
// without a GPU.  A wave is WAVE wide, 32 and 64 both work.  Only the machine primitives differ from topk.cu, topk.hip.

#include <standard.h>

#include "fibers.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

#define DEVICE static inline
#define UNROLL
#define ROLLED
#define KERNEL(name) static void name

constexpr bool ANY_ALIGNMENT = WAVE == 64;

DEVICE float as_float(u32 bits) { float v; memcpy(&v, &bits, 4); return v; }
DEVICE u32 as_bits(float value) { u32 v; memcpy(&v, &value, 4); return v; }
DEVICE double double_of(u64 bits) { double v; memcpy(&v, &bits, 8); return v; }
DEVICE u64 bits_of(double value) { u64 v; memcpy(&v, &value, 8); return v; }
DEVICE double fused(double a, double b, double c) { return std::fma(a, b, c); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float square_root(float a) { return std::sqrt(a); }
// Up to an ulp off, as the machines' own may be.
DEVICE float near_reciprocal(float a) { return as_float(as_bits(1.0f / a) + as_bits(a) % 3 - 1); }
DEVICE float f16_value(u32 bits) { _Float16 h; u16 b = (u16)bits; memcpy(&h, &b, 2); return (float)h; }

template <int BYTES> DEVICE void load_words(const u8 *from, u32 *words) {
  if (!ANY_ALIGNMENT && (uintptr_t)from % BYTES) abort();
  memcpy(words, from, BYTES);
}

DEVICE u32 thread() { return current_thread; }
DEVICE u32 block() { return current_block; }

// What an exchange returns is read before the others go on.
template <int K> DEVICE u32 fold(u32 value) {
  offer(value);
  const u32 other = slots[current_thread ^ K];
  meet();
  return other;
}

template <int LANES> DEVICE u32 largest(u32 value) {
  offer(value);
  const u32 first = current_thread / LANES * LANES;
  for (u32 i = first; i < first + LANES; ++i) value = value > slots[i] ? value : slots[i];
  meet();
  return value;
}

template <int LANES> DEVICE u32 first_lane(bool holds) {
  offer(holds);
  const u32 first = current_thread / LANES * LANES;
  u32 lane = 0;
  while (!slots[first + lane])
    if (++lane == LANES) abort();
  meet();
  return lane;
}

template <int LANES> DEVICE u32 from_lane(u32 value, u32 lane) {
  offer(value);
  const u32 other = slots[current_thread / LANES * LANES + lane];
  meet();
  return other;
}

#include "topk.h"

static void *const *arguments;
static int row_count;

static void one_thread() {
#if HAS_BIAS
  ENTRY((const u8 *)arguments[0], (const u8 *)arguments[1], (u8 *)arguments[2], (u8 *)arguments[3], row_count);
#else
  ENTRY((const u8 *)arguments[0], (u8 *)arguments[1], (u8 *)arguments[2], row_count);
#endif
}

extern "C" void launch(void *const *pointers, int rows, int blocks) {
  arguments = pointers, row_count = rows;
  run_blocks(blocks, THREADS, one_thread);
}
