// Runs layer_norm.h on the host: only the machine primitives differ from layer_norm.cu.  A wave is WAVE wide.

#include "fibers.h"

#include <cmath>
#include <cstring>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

#define DEVICE static inline
#define SHARED static
#define UNROLL
#define KERNEL(name) static void name

enum { BF16 = 1, F16 = 2, F32 = 3 };

template <typename To, typename From> static To cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

DEVICE float as_float(u32 bits) { return cast<float>(bits); }
DEVICE u32 as_bits(float value) { return cast<u32>(value); }
DEVICE double double_of(u64 bits) { return cast<double>(bits); }
DEVICE u64 bits_of(double value) { return cast<u64>(value); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float square_root(float a) { return std::sqrt(a); }

template <int DTYPE> DEVICE float widened(u16 half) {
  return DTYPE == BF16 ? as_float((u32)half << 16) : (float)cast<_Float16>(half);
}
template <int DTYPE> DEVICE u16 narrowed(float value) {
  const u32 bits = as_bits(value);
  if (DTYPE == BF16) return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return cast<u16>((_Float16)value);
}

// Of a value of at most 448: the nearest multiple of the last place, at least 2^-9, whose code has the next exponent
// where it rounds up to a power of two.
DEVICE u8 code_of(float value) {
  if (value != value) return 0x7f;
  const float magnitude = std::fabs(value);
  const int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
  const int units = (int)std::nearbyint(std::ldexp(magnitude, 3 - exponent));
  return (units + (exponent + 6) * 8) | (std::signbit(value) ? 0x80 : 0);
}

DEVICE u32 thread() { return current_thread; }
DEVICE u32 block() { return current_block; }
DEVICE void barrier() { meet(); }

// What is exchanged is read before the others go on.
DEVICE u32 neighbour(u32 value, int k) {
  offer(value);
  const u32 other = slots[current_thread ^ k];
  meet();
  return other;
}

#include "layer_norm.h"

static void *const *arguments;
static int row_count;

// Where the parameters are that not every kernel has.
enum { AT_WEIGHT = 1, AT_BIAS = AT_WEIGHT + !!WEIGHT_DTYPE, AT_Y = AT_BIAS + !!BIAS_DTYPE, AT_Q = AT_Y + WRITES_Y };

static void one_thread() {
  ENTRY((const u8 *)arguments[0],
#if WEIGHT_DTYPE
        (const u8 *)arguments[AT_WEIGHT],
#endif
#if BIAS_DTYPE
        (const u8 *)arguments[AT_BIAS],
#endif
#if WRITES_Y
        (u8 *)arguments[AT_Y],
#endif
        (u8 *)arguments[AT_Q], (float *)arguments[AT_Q + 1], row_count);
}

extern "C" void launch(void *const *pointers, int rows, int blocks) {
  arguments = pointers, row_count = rows;
  run_blocks(blocks, THREADS, one_thread);
}
