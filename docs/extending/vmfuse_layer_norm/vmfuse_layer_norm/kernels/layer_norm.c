// LayerNorm and quantization on CPUs: what layer_norm.h does on GPUs, one row after another.  The loops over a row are
// written for the compiler to turn into vectors; y is computed again rather than kept.
//
// cpu.h is vmfuse's own: integers, bits of floats, the mode of subnormals, and the check of the entry's parameters.

#include "cpu.h"

// dtype codes
#define BF16 1
#define F16 2
#define F32 3

#if X_DTYPE == F32
typedef float X;
#else
typedef u16 X;
#endif
#if WEIGHT_DTYPE == F32
typedef float Weight;
#else
typedef u16 Weight;
#endif
#if BIAS_DTYPE == F32
typedef float Bias;
#else
typedef u16 Bias;
#endif

// |a| rounded to nearest even onto the floats with DIGITS significand bits and exponents of at least LEAST (biased as in
// float32), as the code of such a float.  Adding a power of two whose last place is that of the format lets the adder
// round.
INLINE u32 encode(u32 magnitude, int digits, u32 least) {
  u32 exponent = magnitude & 0x7f800000u;
  exponent = exponent > least << 23 ? exponent : least << 23;
  u32 grid = exponent + ((u32)(24 - digits) << 23);
  u32 units = word_of(float_of(magnitude) + float_of(grid)) - grid;
  return units + (exponent >> (24 - digits)) - (least << (digits - 1));
}

INLINE float element(const void *base, i64 at, int dtype) {
  if (dtype == F32) return ((const float *)base)[at];
  u32 half = ((const u16 *)base)[at];
  if (dtype == BF16) return float_of(half << 16);
  u32 magnitude = (half & 0x7fffu) << 13;
  u32 bits = word_of(float_of(magnitude) * 0x1p112f);
  bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits;
  return float_of(bits | (half & 0x8000u) << 16);
}

INLINE u32 narrowed(float value) {
  u32 bits = word_of(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  int is_nan = magnitude > 0x7f800000u;
  if (X_DTYPE == BF16) return (is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  u32 code = encode(magnitude < 0x47800000u ? magnitude : 0x47800000u, 11, 113);
  return (is_nan ? 0x7e00u : code < 0x7c00u ? code : 0x7c00u) | sign;
}

INLINE float rounded(float value) {
  if (X_DTYPE == F32) return value;
  X half = (X)narrowed(value);
  return element(&half, 0, X_DTYPE);
}

// The float8_e4m3fn of a value of at most 448, or of a NaN, which becomes the 480 that its code would stand for.
INLINE u8 code_of(float value) {
  u32 bits = word_of(value), magnitude = bits & 0x7fffffffu;
  return encode(magnitude < 0x43f00000u ? magnitude : 0x43f00000u, 4, 121) | (bits >> 24 & 0x80u);
}

INLINE float clamped(float value) { return value > 448.0f ? 448.0f : value < -448.0f ? -448.0f : value; }

// What y is made of.
typedef struct {
  const X *x;
  const Weight *weight;
  const Bias *bias;
  float mean, rstd;
} Row;

INLINE float y_at(const Row *row, i64 i) {
  float value = (element(row->x, i, X_DTYPE) - row->mean) * row->rstd;
  if (WEIGHT_DTYPE) value *= element(row->weight, i, WEIGHT_DTYPE);
  if (BIAS_DTYPE) value += element(row->bias, i, BIAS_DTYPE);
  return rounded(value);
}

// In so many sums side by side, so that they are taken in vectors; any order will do.
#define SUMS 16

INLINE double sum_of(const X *x, float mean, int squared) {
  double sums[SUMS] = {0.0}, sum = 0.0;
  for (i64 i = 0; i < HIDDEN; i += SUMS)
    for (int k = 0; k < SUMS && i + k < HIDDEN; ++k) {
      double off = (double)element(x, i + k, X_DTYPE) - (double)mean;
      sums[k] += squared ? off * off : off;
    }
  for (int k = 0; k < SUMS; ++k) sum += sums[k];
  return sum;
}

INLINE void one_row(Row row, X *y, u8 *q, float *scales) {
  row.mean = (float)(sum_of(row.x, 0.0f, 0) * SHARE);
  row.rstd = 1.0f / __builtin_sqrtf((float)(sum_of(row.x, row.mean, 1) * SHARE) + EPS);
  // The bits of magnitudes order as they do, with NaN on top.
  u32 amax = AMAX_FLOOR;
  for (i64 i = 0; i < HIDDEN; ++i) {
    u32 magnitude = word_of(y_at(&row, i)) & 0x7fffffffu;
    amax = amax > magnitude ? amax : magnitude;
  }
  u32 bits = word_of(float_of(amax) / 448.0f);
  float scale = float_of(bits > SCALE_FLOOR ? bits : SCALE_FLOOR);
  for (i64 i = 0; i < HIDDEN; ++i) {
    float value = y_at(&row, i);
    if (WRITES_Y) y[i] = X_DTYPE == F32 ? value : narrowed(value);
    q[i] = code_of(clamped(value / scale));
  }
  *scales = scale;
}

#if WEIGHT_DTYPE
#define WEIGHT BINDING(const Weight, weight),
#else
#define WEIGHT
#define weight ((const Weight *)0)
#define weight_offset 0
#endif
#if BIAS_DTYPE
#define BIAS BINDING(const Bias, bias),
#else
#define BIAS
#define bias ((const Bias *)0)
#define bias_offset 0
#endif
#if WRITES_Y
#define Y BINDING(X, y),
#else
#define Y
#define y ((X *)0)
#define y_offset 0
#endif

void ENTRY(BINDING(const X, x), WEIGHT BIAS Y BINDING(u8, q), BINDING(float, scale), i32 rows, i32 workgroup) {
  i64 first = (i64)workgroup * ROWS, end = first + ROWS < rows ? first + ROWS : rows;
  FloatMode mode = enter_ieee();
  for (i64 row = first; row < end; ++row) {
    Row one = {x + x_offset + row * HIDDEN, weight + weight_offset, bias + bias_offset, 0.0f, 0.0f};
    one_row(one, WRITES_Y ? y + y_offset + row * HIDDEN : 0, q + q_offset + row * HIDDEN, scale + scale_offset + row);
  }
  leave_ieee(mode);
}
