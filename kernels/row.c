// The row kernel on CPUs: what row.h does on GPUs, one row after another, in vector registers.
//
// Rows are taken in steps of 2*LANES elements held as (even, odd): a 32-bit word of two bfloat16 splits into
// floats by one shift and one mask and packs again without a shuffle, and nothing between load and store cares which
// lane an element sits in.
//
// A row is read again from the cache for each thing that depends on all of it: the statistic, the largest value.
// Outputs must not overlap inputs.  Pointers need only the alignment of their element.
//
// The macros that specialise this file come from lowering/families/row.py.

#include "cpu.h"
#include "vectors.h"

// The codes of ROUNDING, RESIDUAL, ACT and LAYOUTi.
#define ONCE 1
#define TWICE 2
#define ROUNDED 2
#define SILU 1
#define GELU 2
enum { ROW = 0, COLUMN_TMA = 1, COLUMN = 2, UE8M0_PACKED = 3 };
enum { GIVEN = 3 };       // QUOTIENTi
enum { BY_INVERSE = 2, INVERTED_TWICE = 4, SCALE_IS_INVERTED = 8 };  // RECIPROCALi

#include "given.h"
#include "norm.h"

#define STEP (2 * LANES)

#if LANES == 16
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVENS 0, 2, 4, 6
#define ODDS 1, 3, 5, 7
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif

typedef struct { Floats even, odd; } Pair;

INLINE Words to_bf16(Floats a) { return bf16_of(a, X_DTYPE == F32 || (X_DTYPE == BF16 && WEIGHT_DTYPE == F32)); }

INLINE Pair load(const void *base, i64 at, int dtype) {
  Pair p;
  if (dtype == F32) {
    const float *from = (const float *)base + at;
    Floats a = *(const LooseFloats *)from, b = *(const LooseFloats *)(from + LANES);
    p.even = SHUFFLE(a, b, EVENS);
    p.odd = SHUFFLE(a, b, ODDS);
  } else {
    Words words = *(const LooseWords *)((const u16 *)base + at);
    p.even = dtype == BF16 ? floats_of(words << 16) : f16_to_floats(words & 0xffffu);
    p.odd = dtype == BF16 ? floats_of(words & 0xffff0000u) : f16_to_floats(words >> 16);
  }
  return p;
}

INLINE void store(void *base, i64 at, int dtype, Pair p) {
  if (dtype == F32) {
    float *to = (float *)base + at;
    *(LooseFloats *)to = SHUFFLE(p.even, p.odd, ZIP_LOW);
    *(LooseFloats *)(to + LANES) = SHUFFLE(p.even, p.odd, ZIP_HIGH);
  } else {
    Words words = dtype == BF16 ? to_bf16(p.even) >> 16 | (to_bf16(p.odd) & 0xffff0000u)
                                : f16_of(p.even) | f16_of(p.odd) << 16;
    *(LooseWords *)((u16 *)base + at) = words;
  }
}

INLINE Floats rounded_to(int dtype, Floats a) {
  if (dtype == BF16) return floats_of(to_bf16(a) & 0xffff0000u);
  if (dtype == F16) return f16_to_floats(f16_of(a));
  return a;
}

INLINE Pair rounded_pair(int dtype, Pair p) {
  return (Pair){rounded_to(dtype, p.even), rounded_to(dtype, p.odd)};
}

// x, up and the residual point to their first row, or to the one that is worked on.
typedef struct {
  const void *x, *up, *residual, *weight, *bias;
  void *sum, *y, *scale[4];
  u8 *q[4];
  float given[4];  // the scales that are not made here
  i32 rows;
} Site;

#define SIZE(dtype) ((dtype) == F32 ? 4 : 2)

// The site with what is read of it at its inputs' row `row`.
INLINE Site at_row(const Site *site, i64 row) {
  Site moved = *site;
  moved.x = (const u8 *)site->x + row * ((i64)X_PITCH * SIZE(X_DTYPE));
#if ACT
  moved.up = (const u8 *)site->up + row * ((i64)OTHER_PITCH * SIZE(OTHER_DTYPE));
#elif RESIDUAL
  moved.residual = (const u8 *)site->residual + row * ((i64)OTHER_PITCH * SIZE(X_DTYPE));
#endif
  return moved;
}

#if ACT
#include "reals_cpu.h"
#endif

#if ACT
INLINE Pair gated(Pair p, Pair up) {
  p.even = activation(p.even);
  p.odd = activation(p.odd);
  if (GATE_ROUNDING == TWICE) p = rounded_pair(X_DTYPE, p);
  p.even *= up.even;
  p.odd *= up.odd;
  return GATE_ROUNDING ? rounded_pair(X_DTYPE, p) : p;
}
#endif

// float32 of what is normed, from a column on: x, with the residual added, or act(gate)*x.
INLINE Pair input(const Site *site, i64 column) {
  Pair p = load(site->x, column, X_DTYPE);
#if RESIDUAL
  Pair r = load(site->residual, column, X_DTYPE);
  p.even += r.even;
  p.odd += r.odd;
#if RESIDUAL == ROUNDED
  p = rounded_pair(X_DTYPE, p);
#endif
#elif GATE_FIRST
  p = gated(load(site->up, column, OTHER_DTYPE), p);
#endif
  return p;
}

// What a row, or a group of it, is normed by.
typedef struct { float mean, rstd; } Statistic;

INLINE Pair centred(Pair p, float mean) { return CENTRED ? (Pair){p.even - mean, p.odd - mean} : p; }

INLINE Pair normed(const Site *site, Pair p, Statistic by, i64 column) {
  p = centred(p, by.mean);
#if BIAS_DTYPE
  Pair bias = load(site->bias, column, BIAS_DTYPE);
#endif
#if BIAS_FUSED && !WEIGHT_DTYPE
  p.even = fma(p.even, all(by.rstd), bias.even);
  p.odd = fma(p.odd, all(by.rstd), bias.odd);
#else
  p.even *= by.rstd;
  p.odd *= by.rstd;
#endif
  if (ROUNDING == TWICE) p = rounded_pair(X_DTYPE, p);
#if WEIGHT_DTYPE
  Pair w = load(site->weight, column, WEIGHT_DTYPE);
#if HAS_WEIGHT_OFFSET
  w.even += WEIGHT_OFFSET;
  w.odd += WEIGHT_OFFSET;
#endif
#if BIAS_FUSED
  p.even = fma(p.even, w.even, bias.even);
  p.odd = fma(p.odd, w.odd, bias.odd);
#else
  p.even *= w.even;
  p.odd *= w.odd;
  if (ROUNDING == TWICE) p = rounded_pair(PRODUCT_DTYPE, p);
#endif
#endif
#if BIAS_DTYPE && !BIAS_FUSED
  p.even += bias.even;
  p.odd += bias.odd;
  if (ROUNDING == TWICE) p = rounded_pair(NORMED_DTYPE, p);
#endif
  return ROUNDING == ONCE ? rounded_pair(Y_DTYPE, p) : p;
}

// y of one step, from its input.
INLINE Pair produced(const Site *site, Pair p, Statistic by, i64 column) {
#if ACT && NORM && !GATE_FIRST
  return gated(load(site->up, column, X_DTYPE), normed(site, p, by, column));
#elif NORM
  return normed(site, p, by, column);
#elif ACT
  return gated(p, load(site->up, column, X_DTYPE));
#else
  return p;
#endif
}

INLINE float inverse_rms(float total) { return 1.0f / __builtin_sqrtf(total / STATISTIC_LENGTH + EPS); }

INLINE u32 lane_max(Words a) {
  u32 part[LANES];
  for (int i = 0; i < LANES; ++i) part[i] = a[i];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
  return part[0];
}

#if QUANTS
#include "quantize_cpu.h"
#endif

#define TAIL (HIDDEN % STEP)  // only where nothing is quantized

#if TAIL
INLINE void copy(void *to, const void *from, i64 bytes) {
  for (i64 i = 0; i < bytes; ++i) ((u8 *)to)[i] = ((const u8 *)from)[i];
}

// The last TAIL elements of a row in buffers of STEP elements, zero beyond the end.
typedef struct { float x[STEP], up[STEP], residual[STEP], weight[STEP], bias[STEP], sum[STEP], y[STEP]; } Tail;

INLINE Site tail_of(const Site *site, Tail *tail) {
  Site local = {0};
  const i64 at = HIDDEN - TAIL;
  for (int i = 0; i < STEP; ++i) tail->x[i] = tail->up[i] = tail->residual[i] = tail->weight[i] = tail->bias[i] = 0.0f;
  copy(tail->x, (const u8 *)site->x + at * SIZE(X_DTYPE), TAIL * SIZE(X_DTYPE));
#if ACT
  copy(tail->up, (const u8 *)site->up + at * SIZE(OTHER_DTYPE), TAIL * SIZE(OTHER_DTYPE));
#endif
#if RESIDUAL
  copy(tail->residual, (const u8 *)site->residual + at * SIZE(X_DTYPE), TAIL * SIZE(X_DTYPE));
#endif
#if WEIGHT_DTYPE
  copy(tail->weight, (const u8 *)site->weight + at * SIZE(WEIGHT_DTYPE), TAIL * SIZE(WEIGHT_DTYPE));
#endif
#if BIAS_DTYPE
  copy(tail->bias, (const u8 *)site->bias + at * SIZE(BIAS_DTYPE), TAIL * SIZE(BIAS_DTYPE));
#endif
  local.x = tail->x, local.up = tail->up, local.residual = tail->residual;
  local.weight = tail->weight, local.bias = tail->bias, local.sum = tail->sum, local.y = tail->y;
  return local;
}
#endif

#include "statistic_cpu.h"

// One step of the last pass: the sum (round(x + residual), whichever of the two `input` returns) and y.  `to` is where
// it starts in the outputs.
INLINE void step(const Site *site, i64 column, i64 to, Statistic by, Pair *y) {
  Pair p = input(site, column);
#if WRITES_SUM
  store(site->sum, to, X_DTYPE, p);
#endif
  *y = produced(site, p, by, column);
#if WRITES_Y
  store(site->y, to, Y_DTYPE, *y);
#endif
}

// Bits of max|y| over the row.
INLINE u32 row_amax(const Site *site, Statistic by) {
  u32 amax = 0;
#if WHOLE_ROW
  Words magnitude = {0};
  for (i64 column = 0; column < HIDDEN; column += STEP) {
    by = statistic_at(site, column, by);
    Pair y = produced(site, input(site, column), by, column);
    magnitude = larger(magnitude, larger(bits_of(y.even) & 0x7fffffffu, bits_of(y.odd) & 0x7fffffffu));
  }
  amax = lane_max(magnitude);
#endif
  return amax;
}

INLINE void one_row(const Site *first, i64 row) {
  const Site moved = at_row(first, row), *site = &moved;
  const i64 to = row * HIDDEN;
#if TAIL
  Tail tail;
  const Site last = tail_of(site, &tail), *rest = &last;
#else
  const Site *rest = 0;
#endif
  Statistic by = {0};
  if (!STATISTIC_GROUP) by = statistic_of(site, rest, 0);
#if QUANTS
  const u32 amax = row_amax(site, by);
  for (i64 column = 0; column < HIDDEN; column += BLOCK) {
    Pair y[PAIRS];
    for (int i = 0; i < PAIRS; ++i) {
      const i64 at = column + i * STEP;
      by = statistic_at(site, at, by);
      step(site, at, to + at, by, &y[i]);
    }
    quantize(site, 0, SCHEME(0), y, amax, row, column);
#if QUANTS > 1
    quantize(site, 1, SCHEME(1), y, amax, row, column);
#endif
#if QUANTS > 2
    quantize(site, 2, SCHEME(2), y, amax, row, column);
#endif
#if QUANTS > 3
    quantize(site, 3, SCHEME(3), y, amax, row, column);
#endif
  }
#else
  Pair y;
  for (i64 column = 0; column + STEP <= HIDDEN; column += STEP) {
    by = statistic_at(site, column, by);
    step(site, column, to + column, by, &y);
  }
#if TAIL
  step(rest, 0, 0, by, &y);
#if WRITES_SUM
  copy((u8 *)site->sum + (to + HIDDEN - TAIL) * SIZE(X_DTYPE), tail.sum, TAIL * SIZE(X_DTYPE));
#endif
#if WRITES_Y
  copy((u8 *)site->y + (to + HIDDEN - TAIL) * SIZE(Y_DTYPE), tail.y, TAIL * SIZE(Y_DTYPE));
#endif
#endif
#endif
}

#define ELEMENT(dtype) __typeof__(__builtin_choose_expr((dtype) == F32, 0.0f, (u16)0))
typedef ELEMENT(X_DTYPE) X;
typedef ELEMENT(OTHER_DTYPE) Other;
typedef ELEMENT(Y_DTYPE) Y;
typedef ELEMENT(WEIGHT_DTYPE) Weight;
typedef ELEMENT(BIAS_DTYPE) Bias;

#define SCALES(i) __typeof__(__builtin_choose_expr(LAYOUT##i == UE8M0_PACKED, (i32)0, 0.0f))

void ENTRY(BINDING(const X, x)
#if ACT && !GATE_PACKED
               , BINDING(const Other, up)
#endif
#if RESIDUAL
               , BINDING(const X, residual)
#endif
#if WEIGHT_DTYPE
               , BINDING(const Weight, weight)
#endif
#if BIAS_DTYPE
               , BINDING(const Bias, bias)
#endif
#if QUANTS > 0
               IF_GIVEN(0, , BINDING(const float, scale0))
#endif
#if QUANTS > 1
               IF_GIVEN(1, , BINDING(const float, scale1))
#endif
#if QUANTS > 2
               IF_GIVEN(2, , BINDING(const float, scale2))
#endif
#if QUANTS > 3
               IF_GIVEN(3, , BINDING(const float, scale3))
#endif
#if WRITES_SUM
               , BINDING(X, sum)
#endif
#if WRITES_Y
               , BINDING(Y, y)
#endif
#if QUANTS > 0
               , BINDING(u8, q0) IF_MADE(0, , BINDING(SCALES(0), scale0))
#endif
#if QUANTS > 1
               , BINDING(u8, q1) IF_MADE(1, , BINDING(SCALES(1), scale1))
#endif
#if QUANTS > 2
               , BINDING(u8, q2) IF_MADE(2, , BINDING(SCALES(2), scale2))
#endif
#if QUANTS > 3
               , BINDING(u8, q3) IF_MADE(3, , BINDING(SCALES(3), scale3))
#endif
               , i32 rows, i32 workgroup) {
  Site site = {0};
  site.rows = rows;
  site.x = x + x_offset + X_OFFSET;
#if ACT && GATE_PACKED
  site.up = x + x_offset + OTHER_OFFSET;
#elif ACT
  site.up = up + up_offset + OTHER_OFFSET;
#elif RESIDUAL
  site.residual = residual + residual_offset + OTHER_OFFSET;
#endif
#if WEIGHT_DTYPE
  site.weight = weight + weight_offset;
#endif
#if BIAS_DTYPE
  site.bias = bias + bias_offset;
#endif
#if WRITES_SUM
  site.sum = sum + sum_offset;
#endif
#if WRITES_Y
  site.y = y + y_offset;
#endif
#if QUANTS > 0
  site.q[0] = q0 + q0_offset;
  IF_GIVEN(0, site.given[0] = scale0[scale0_offset];) IF_MADE(0, site.scale[0] = scale0 + scale0_offset;)
#endif
#if QUANTS > 1
  site.q[1] = q1 + q1_offset;
  IF_GIVEN(1, site.given[1] = scale1[scale1_offset];) IF_MADE(1, site.scale[1] = scale1 + scale1_offset;)
#endif
#if QUANTS > 2
  site.q[2] = q2 + q2_offset;
  IF_GIVEN(2, site.given[2] = scale2[scale2_offset];) IF_MADE(2, site.scale[2] = scale2 + scale2_offset;)
#endif
#if QUANTS > 3
  site.q[3] = q3 + q3_offset;
  IF_GIVEN(3, site.given[3] = scale3[scale3_offset];) IF_MADE(3, site.scale[3] = scale3 + scale3_offset;)
#endif
  i64 first = (i64)workgroup * ROWS, end = first + ROWS < rows ? first + ROWS : rows;
  FloatMode mode = enter_ieee();
  for (i64 row = first; row < end; ++row) one_row(&site, row);
  leave_ieee(mode);
}
