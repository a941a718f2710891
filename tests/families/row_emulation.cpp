// Runs the GPU row kernel (kernels/row.h) on the host, so that its arithmetic and its lane mapping can be tested bit
// for bit without a GPU.  A wave is WAVE wide, 32 and 64 both work.  Only the machine primitives differ from row.cu and
// row.hip.

#include <standard.h>

#include "fibers.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

#define DEVICE static inline
#define SHARED static
#define UNROLL
#define ROLLED
#define KERNEL(name) static void name

#define HAS_ABSMAX16 (WAVE == 32)
constexpr bool ANY_ALIGNMENT = WAVE == 64;
constexpr bool SATURATES = WAVE == 32;
enum { E4M3FN = 0, E4M3FNUZ = 1, E5M2 = 2, INT8 = 3 };  // CODESi

struct f2 { float x, y; };

DEVICE f2 pair(float x, float y) { return {x, y}; }
DEVICE f2 negated(f2 a) { return {-a.x, -a.y}; }
DEVICE float as_float(u32 bits) { float v; memcpy(&v, &bits, 4); return v; }
DEVICE u32 as_bits(float value) { u32 v; memcpy(&v, &value, 4); return v; }
DEVICE float fma_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
#define fma fma_rn
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float reciprocal(float a) { return 1.0f / a; }
// An ulp off, up or down, and zero instead of subnormal, as the machines' own may be.
DEVICE float near_reciprocal(float a) {
  const float r = 1.0f / a;
  return std::isnormal(r) ? as_float(as_bits(r) + as_bits(a) % 3 - 1) : std::isnan(r) ? r : std::copysign(0.0f, a);
}
DEVICE float square_root(float a) { return std::sqrt(a); }
DEVICE f2 add2(f2 a, f2 b) { return {a.x + b.x, a.y + b.y}; }
DEVICE f2 mul2(f2 a, f2 b) { return {a.x * b.x, a.y * b.y}; }
DEVICE f2 fma2(f2 a, f2 b, f2 c) { return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)}; }
DEVICE float absmax(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return as_float(0x7fc00000u);
  return std::fmax(std::fabs(a), std::fabs(b));
}
DEVICE float smaller_number(float a, float b) { return std::fmin(a, b); }
// Of NaN one bound or the other, whichever is less welcome.
DEVICE float between(float a, float low, float high) {
  return std::isnan(a) ? high : std::fmin(std::fmax(a, low), high);
}

DEVICE u32 bf16(float a) {
  u32 bits = as_bits(a);
  return std::isnan(a) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pack_bf16(f2 a) { return bf16(a.x) | bf16(a.y) << 16; }
DEVICE u32 f16(float a) { _Float16 h = (_Float16)a; u16 v; memcpy(&v, &h, 2); return v; }
DEVICE float f16_value(u16 bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
DEVICE u32 pack_f16(f2 a) { return f16(a.x) | f16(a.y) << 16; }
DEVICE f2 unpack_f16(u32 word) { return {f16_value((u16)word), f16_value((u16)(word >> 16))}; }

// An 8-bit float: bits of its mantissa, exponent of its smallest normal number, largest finite value and its code.
struct Format { int mantissa, least; double largest; u32 top; };
constexpr Format FORMATS[] = {{3, -6, 448.0, 0x7e}, {3, -7, 240.0, 0x7f}, {2, -14, 57344.0, 0x7b}};

// Round to nearest even, by scaling to units of the last place.  What is too large saturates, or is a NaN.
DEVICE u32 code8(float a, int codes) {
  const Format form = FORMATS[codes];
  u32 sign = as_bits(a) >> 24 & 0x80;
  const u32 nan = codes == E4M3FNUZ ? 0x80 : sign | 0x7f;
  if (std::isnan(a)) return nan;
  double magnitude = std::fabs((double)a);
  if (std::isinf(a)) return SATURATES ? sign | form.top : nan;
  int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : form.least, form.least);
  int units = (int)std::nearbyint(std::ldexp(std::fmin(magnitude, 1e6), form.mantissa - exponent));
  u32 code = (u32)((exponent - form.least) * (1 << form.mantissa) + units);
  if (code > form.top) return SATURATES ? sign | form.top : nan;
  return codes == E4M3FNUZ && code == 0 ? 0 : sign | code;
}
template <int CODES> DEVICE u32 pack_codes(f2 low, f2 high) {
  return code8(low.x, CODES) | code8(low.y, CODES) << 8 | code8(high.x, CODES) << 16 | code8(high.y, CODES) << 24;
}
DEVICE u32 zero_of(u32) { return 0; }
DEVICE f2 kept(f2 a) { return a; }
DEVICE u32 low_up(u32 a) { return a << 16; }
DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) { return (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | d << 24; }

template <int DTYPE> DEVICE u32 absmax16(u32 a, u32 b) {  // magnitudes order as integers, NaN on top
  u32 low = std::max(a & 0x7fff, b & 0x7fff), high = std::max(a >> 16 & 0x7fff, b >> 16 & 0x7fff);
  return low | high << 16;
}

DEVICE void store16(u8 *to, const u32 *words) {
  if (!ANY_ALIGNMENT && (uintptr_t)to % 16) abort();
  memcpy(to, words, 16);
}

DEVICE void store8(u8 *to, const u32 *words) {
  if (!ANY_ALIGNMENT && (uintptr_t)to % 8) abort();
  memcpy(to, words, 8);
}

constexpr int WIDEST = 16;
template <int BYTES> DEVICE void load_wide(const u8 *from, u32 *words) {
  if (!ANY_ALIGNMENT && (uintptr_t)from % BYTES) abort();
  memcpy(words, from, BYTES);
}
template <int BYTES> DEVICE void store_wide(u8 *to, const u32 *words) { store16(to, words); }

template <int K> DEVICE u32 fold(u32 value) {
  offer(value);
  u32 other = slots[current_thread ^ K];
  meet();
  return other;
}

DEVICE u32 thread() { return current_thread; }
DEVICE u32 wave() { return current_thread / WAVE; }
DEVICE u32 block() { return current_block; }
DEVICE void barrier() { meet(); }

#include "row.h"

static void *const *arguments;
static int row_count;

static void one_thread() {
  void *const *next = arguments;
#define INPUT ((const u8 *)*next++)
#define OUTPUT ((u8 *)*next++)
  const u8 *x = INPUT;
#if ACT && !GATE_PACKED
  const u8 *up = INPUT;
#endif
#if RESIDUAL
  const u8 *residual = INPUT;
#endif
#if WEIGHT_DTYPE
  const u8 *weight = INPUT;
#endif
#if BIAS_DTYPE
  const u8 *bias = INPUT;
#endif
#if QUANTS > 0
  IF_GIVEN(0, const u8 *scale0 = INPUT;)
#endif
#if QUANTS > 1
  IF_GIVEN(1, const u8 *scale1 = INPUT;)
#endif
#if QUANTS > 2
  IF_GIVEN(2, const u8 *scale2 = INPUT;)
#endif
#if QUANTS > 3
  IF_GIVEN(3, const u8 *scale3 = INPUT;)
#endif
#if WRITES_SUM
  u8 *sum = OUTPUT;
#endif
#if WRITES_Y
  u8 *y = OUTPUT;
#endif
#if QUANTS > 0
  u8 *q0 = OUTPUT;
  IF_MADE(0, u8 *scale0 = OUTPUT;)
#endif
#if QUANTS > 1
  u8 *q1 = OUTPUT;
  IF_MADE(1, u8 *scale1 = OUTPUT;)
#endif
#if QUANTS > 2
  u8 *q2 = OUTPUT;
  IF_MADE(2, u8 *scale2 = OUTPUT;)
#endif
#if QUANTS > 3
  u8 *q3 = OUTPUT;
  IF_MADE(3, u8 *scale3 = OUTPUT;)
#endif
  ENTRY(x
#if ACT && !GATE_PACKED
        , up
#endif
#if RESIDUAL
        , residual
#endif
#if WEIGHT_DTYPE
        , weight
#endif
#if BIAS_DTYPE
        , bias
#endif
#if QUANTS > 0
        IF_GIVEN(0, , scale0)
#endif
#if QUANTS > 1
        IF_GIVEN(1, , scale1)
#endif
#if QUANTS > 2
        IF_GIVEN(2, , scale2)
#endif
#if QUANTS > 3
        IF_GIVEN(3, , scale3)
#endif
#if WRITES_SUM
        , sum
#endif
#if WRITES_Y
        , y
#endif
#define QUANT(i) , q##i IF_MADE(i, , scale##i)
#if QUANTS > 0
        QUANT(0)
#endif
#if QUANTS > 1
        QUANT(1)
#endif
#if QUANTS > 2
        QUANT(2)
#endif
#if QUANTS > 3
        QUANT(3)
#endif
        , row_count);
}

extern "C" void launch(void *const *pointers, int rows, int blocks) {
  arguments = pointers, row_count = rows;
  run_blocks(blocks, THREADS, one_thread);
}
