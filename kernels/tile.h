// How the lanes of a block, laid over rows in one way, do the work of row.h.  Included inside a namespace, once for each
// way, with the macros that say which:
//
// ROW_LANES lanes work on one row.  A lane owns VECTORS vectors of VECTOR contiguous elements; vector v of lane l starts
// at column (v*ROW_LANES + l)*VECTOR.  With a VECTOR of 8 or 16 a lane's q is one store of as many bytes and a group of
// 32, 64 or 128 elements is a power of two of neighbouring lanes, whatever the wave width.  ROW_LANES is either a power
// of two not above the wave (several rows share a wave, no barrier) or whole waves (one row per block, and a barrier for
// each thing that depends on the whole row).  Where nothing does, a long row is taken in BATCHES.
//
// A block takes ROWS rows; with MOST_BLOCKS, no more blocks than that go through the rows in steps of all of them.  With
// SLICES several blocks read the same row and each writes a part of it.

static_assert(VECTOR == 8 || VECTOR == 16, "a vector is one store of codes");
constexpr int PAIRS = VECTOR / 2;
constexpr int ROW_WAVES = ROW_LANES > WAVE ? ROW_LANES / WAVE : 1;
constexpr bool WHOLE = HIDDEN % VECTOR == 0;               // no vector crosses the end of a row
constexpr bool COVERED = HIDDEN == VECTOR * ROW_LANES * VECTORS * BATCHES;  // no lane is idle
constexpr bool LOOPS = MOST_BLOCKS > 0;

// Whole waves end where a row ends: then which lanes are idle is one scalar comparison.
constexpr bool EVEN_WAVES = ROW_WAVES > 1 && HIDDEN % (VECTOR * WAVE) == 0;
// y ends up rounded to x's dtype before it is quantized.
enum { NORM_ROUNDS = ROUNDING == ONCE || (ROUNDING == TWICE && NORMED_DTYPE == X_DTYPE) };
constexpr bool ROUNDS = ACT && !GATE_FIRST ? GATE_ROUNDING != UNROUNDED : NORM && NORM_ROUNDS;
// What is quantized has at most 11 significant bits.
constexpr bool NARROW = Y_DTYPE != F32 && ((!NORM && !ACT) || ROUNDS);

// The bits of one vector as they lie in memory; two 16-bit elements share a word, the first in the low half.
template <int DTYPE> struct Packed { u32 word[VECTOR * SIZE<DTYPE> / 4]; };

struct Vector { f2 pair[PAIRS]; };

// The value as it is quantized, and rounded to x's dtype as it is written.
struct Y {
  Vector value;
  Packed<Y_DTYPE> bits;
};

// A vector of the weight: as read, or where it serves many rows as the factors; and of the bias, which takes half the
// registers as it is read.
constexpr int WEIGHT_AS = WEIGHT_DTYPE == NONE || LOOPS ? F32 : WEIGHT_DTYPE;
enum { BIAS_AS = BIAS_DTYPE == NONE ? F32 : BIAS_DTYPE };
using Weight = Packed<WEIGHT_AS>;
using Bias = Packed<BIAS_AS>;

// A statistic for each STATISTIC_GROUP elements, in which every vector lies whole: a lane has one for each vector.
enum { GROUPED = STATISTIC_GROUP != 0, STATISTICS = GROUPED ? VECTORS : 1 };
struct Statistics { f2 of[STATISTICS]; };

// Which outputs of a row a block writes: vector v of wave w where (v*ROW_WAVES + w) % (mask + 1) is `number`.
struct Slice { u32 mask, number; };

// A row has as many blocks as a power of two up to SLICES, and the machine, allow.
DEVICE u32 slices_of_row(int rows) {
  u32 slices = SLICES;
  while (slices > 1 && rows * slices > SPREAD) slices /= 2;
  return slices;
}

template <int DTYPE> DEVICE f2 unpack(const Packed<DTYPE> &packed, int i) {
  if constexpr (DTYPE == F32) return pair(as_float(packed.word[2 * i]), as_float(packed.word[2 * i + 1]));
  else if constexpr (DTYPE == F16) return unpack_f16(packed.word[i]);
  else return pair(as_float(low_up(packed.word[i])), as_float(packed.word[i] & 0xffff0000u));
}

template <int DTYPE> DEVICE void pack(Packed<DTYPE> &packed, int i, f2 value) {
  if constexpr (DTYPE == F32) packed.word[2 * i] = as_bits(value.x), packed.word[2 * i + 1] = as_bits(value.y);
  else if constexpr (DTYPE == F16) packed.word[i] = pack_f16(value);
  else packed.word[i] = pack_bf16(value);
}

template <int DTYPE> DEVICE f2 round_to(f2 value) {
  if constexpr (DTYPE == F32) return value;
  Packed<DTYPE> packed;
  pack<DTYPE>(packed, 0, value);
  return unpack<DTYPE>(packed, 0);
}

// A vector in accesses of ALIGNED bytes, which every row is aligned to (or the machine does not mind), as far as a vector
// has so many.  Otherwise element by element, which also serves the last, partial vector of a row whose length is no
// multiple of VECTOR.
template <int DTYPE, int ALIGNED> DEVICE Packed<DTYPE> load(const u8 *row, u32 column) {
  Packed<DTYPE> packed;
  const u8 *from = row + column * SIZE<DTYPE>;
  constexpr int bytes = VECTOR * SIZE<DTYPE>, each = bytes < ALIGNED ? bytes : ALIGNED;
  if constexpr (each >= 4) {
    UNROLL for (int i = 0; i < bytes; i += each) load_wide<each>(from + i, &packed.word[i / 4]);
  } else if constexpr (DTYPE == F32) {
    UNROLL for (int i = 0; i < VECTOR; ++i)
      packed.word[i] = WHOLE || column + i < HIDDEN ? ((const u32 *)from)[i] : 0;
  } else {
    UNROLL for (int i = 0; i < PAIRS; ++i) {
      u32 low = WHOLE || column + 2 * i < HIDDEN ? ((const u16 *)from)[2 * i] : 0;
      u32 high = WHOLE || column + 2 * i + 1 < HIDDEN ? ((const u16 *)from)[2 * i + 1] : 0;
      packed.word[i] = low | high << 16;
    }
  }
  return packed;
}

// WIDE: rows are multiples of WIDE_BYTES, and every pointer is aligned to them or the machine does not mind.
template <int DTYPE, bool WIDE> DEVICE void store(u8 *row, u32 column, const Packed<DTYPE> &packed) {
  u8 *to = row + column * SIZE<DTYPE>;
  constexpr int bytes = VECTOR * SIZE<DTYPE>;
  if constexpr (WIDE && bytes % WIDE_BYTES == 0) {
    UNROLL for (int i = 0; i < bytes; i += WIDE_BYTES) store_wide<WIDE_BYTES>(to + i, &packed.word[i / 4]);
  } else if constexpr (WIDE) {
    UNROLL for (int i = 0; i < bytes; i += 16) store16(to + i, &packed.word[i / 4]);
  } else if constexpr (DTYPE == F32) {
    UNROLL for (int i = 0; i < VECTOR; ++i)
      if (WHOLE || column + i < HIDDEN) ((u32 *)to)[i] = packed.word[i];
  } else {
    UNROLL for (int i = 0; i < VECTOR; ++i)
      if (WHOLE || column + i < HIDDEN) ((u16 *)to)[i] = (u16)(packed.word[i / 2] >> 16 * (i % 2));
  }
}

// n / D correctly rounded, for n that is finite and so large that a 2^-24th of it is still a normal number, or n inf
// or NaN: one Markstein step from the correctly rounded 1/D.
template <int D> DEVICE float divide_by(float n) {
  constexpr float inverse = 1.0f / D;
  float near = n * inverse;
  if constexpr ((D & (D - 1)) == 0) return near;
  float exact = fma(-fma(near, (float)D, -n), inverse, near);
  return n < INFINITE ? exact : n;
}

// 1/sqrt(total/length + eps) with every operation rounded to nearest, as torch computes it.  Where eps is not tiny a
// total below divide_by's range vanishes beside it whatever its last bit.
DEVICE float inverse_rms(float total) {
  float mean = EPS >= 0x1p-50f ? divide_by<STATISTIC_LENGTH>(total) : divide(total, (float)STATISTIC_LENGTH);
  return reciprocal(square_root(mean + EPS));
}

#if ACT
// What activation.h is written in.
#define ACTIVATION DEVICE
typedef f2 Reals;
DEVICE Reals all(float a) { return pair(a, a); }
DEVICE Reals plus(Reals a, Reals b) { return add2(a, b); }
DEVICE Reals times(Reals a, Reals b) { return mul2(a, b); }
DEVICE Reals fused(Reals a, Reals b, Reals c) { return fma2(a, b, c); }
// a/b for b >= 1, all but correctly rounded: a*r, r near 1/b, improved once.  A sixteenth of b is inverted, since the
// machine's own inverse is never subnormal.  Where a or b is infinite a*r is the result already: the error, NaN then,
// is replaced by a number that changes nothing.  Written so that the sign of a zero survives.
DEVICE Reals over(Reals a, Reals b) {
  const f2 part = mul2(b, all(0x1p-4f));
  const f2 r = mul2(pair(near_reciprocal(part.x), near_reciprocal(part.y)), all(0x1p-4f)), near = mul2(a, r);
  f2 error = fma2(near, b, negated(a));
  error = pair(smaller_number(error.x, 0x1p127f), smaller_number(error.y, 0x1p127f));
  return fma2(negated(error), r, near);
}
using ::between;
DEVICE Reals between(Reals a, float low, float high) { return pair(between(a.x, low, high), between(a.y, low, high)); }
DEVICE float magnitude(float a) { return as_float(as_bits(a) & 0x7fffffffu); }
DEVICE Reals magnitude(Reals a) { return pair(magnitude(a.x), magnitude(a.y)); }
DEVICE float with_sign(float a, float b) { return as_float(as_bits(magnitude(a)) | (as_bits(b) & 0x80000000u)); }
DEVICE Reals with_sign(Reals a, Reals b) { return pair(with_sign(a.x, b.x), with_sign(a.y, b.y)); }
DEVICE Reals where_above(Reals a, float bound, Reals yes, Reals no) {
  return pair(a.x > bound ? yes.x : no.x, a.y > bound ? yes.y : no.y);
}
DEVICE Reals exponent_from(Reals a) { return pair(as_float(as_bits(a.x) << 23), as_float(as_bits(a.y) << 23)); }
#include "activation.h"
#endif

DEVICE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
DEVICE u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }

#include "reduce.h"

#if QUANTS > 0
#include "quantize.h"
#endif

DEVICE f2 with_offset(f2 w) { return HAS_WEIGHT_OFFSET ? add2(w, pair(WEIGHT_OFFSET, WEIGHT_OFFSET)) : w; }

DEVICE f2 factor(const Weight &weight, int i) {
  const f2 w = unpack<WEIGHT_AS>(weight, i);
  return LOOPS ? w : with_offset(w);
}

// act(x)*up, but for the last rounding.
DEVICE f2 gated(f2 x, f2 up) {
#if ACT
  x = activation(x);
#endif
  return mul2(GATE_ROUNDING == TWICE ? round_to<X_DTYPE>(x) : x, up);
}

// x*rstd*w + b, but for the last rounding; x is centred already where a mean is subtracted.
DEVICE f2 normed(f2 x, f2 rstd, const Weight &weight, const Bias &bias, int i) {
  if constexpr (BIAS_FUSED && WEIGHT_DTYPE == NONE) return fma2(x, rstd, unpack<BIAS_AS>(bias, i));
  f2 value = mul2(x, rstd);
  if constexpr (WEIGHT_DTYPE != NONE) {
    if constexpr (ROUNDING == TWICE) value = round_to<X_DTYPE>(value);
    if constexpr (BIAS_FUSED) return fma2(value, factor(weight, i), unpack<BIAS_AS>(bias, i));
    value = mul2(value, factor(weight, i));
  }
  if constexpr (BIAS_DTYPE != NONE) {
    if constexpr (ROUNDING == TWICE) value = round_to<PRODUCT_DTYPE>(value);
    value = add2(value, unpack<BIAS_AS>(bias, i));
  }
  return value;
}

// act(gate) * norm(x), but for the last rounding.
DEVICE f2 gated_norm(f2 x, f2 gate, f2 rstd, const Weight &weight, const Bias &bias, int i) {
  const f2 value = normed(x, rstd, weight, bias, i);
  return gated(gate, NORM_ROUNDS ? round_to<X_DTYPE>(value) : value);
}

DEVICE Y produced(const Vector &x, const Packed<X_DTYPE> &x_bits, const Packed<OTHER_DTYPE> &other_bits, f2 rstd,
                  const Weight &weight, const Bias &bias) {
#if !NORM && !ACT
  return {x, x_bits};
#endif
  Y y;
  UNROLL for (int i = 0; i < PAIRS; ++i) {
    f2 value = ACT && NORM && !GATE_FIRST ? gated_norm(x.pair[i], unpack(other_bits, i), rstd, weight, bias, i)
               : NORM                     ? normed(x.pair[i], rstd, weight, bias, i)
                                          : gated(x.pair[i], unpack(other_bits, i));
    pack(y.bits, i, value);
    y.value.pair[i] = ROUNDS ? unpack(y.bits, i) : value;
  }
  return y;
}

DEVICE u32 lane_in_row() { return ROW_WAVES > 1 ? thread() : thread() % ROW_LANES; }

// Of vector v of the batch that starts at column `first`.
DEVICE u32 column_of(u32 first, int v) { return first + (v * ROW_LANES + lane_in_row()) * VECTOR; }

// Whether vector v of this wave's first lane lies in the row, a scalar; and of this lane.
DEVICE bool wave_has(u32 first, int v) {
  return COVERED || first + (v * ROW_LANES + (ROW_WAVES > 1 ? wave() * WAVE : 0)) * VECTOR < HIDDEN;
}

DEVICE bool lane_has(u32 first, int v) {
  return COVERED || (EVEN_WAVES ? wave_has(first, v) : column_of(first, v) < HIDDEN);
}

DEVICE bool slice_has(Slice slice, int v) {
  return SLICES == 1 || (v * ROW_WAVES + wave() & slice.mask) == slice.number;
}

// What is read of one part of a row.
struct Part {
  Packed<X_DTYPE> x[VECTORS];
  Packed<OTHER_DTYPE> other[VECTORS];
};

template <bool WIDE> DEVICE Part load_part(const Site &site, u32 row, u32 first) {
  const u8 *x = site.x + (u64)row * (X_PITCH * SIZE<X_DTYPE>);
  const u8 *other = site.other + (u64)row * (OTHER_PITCH * SIZE<OTHER_DTYPE>);
  Part part;
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    if constexpr (!COVERED && !EVEN_WAVES) part.other[v] = {}, part.x[v] = {};  // an idle lane adds zeros
    if (lane_has(first, v)) {
      part.x[v] = load<X_DTYPE, WIDE ? X_BYTES : 0>(x, column_of(first, v));
      if constexpr (RESIDUAL || ACT)
        part.other[v] = load<OTHER_DTYPE, WIDE ? OTHER_BYTES : 0>(other, column_of(first, v));
    }
  }
  return part;
}

// Bytes from the first row of sum or y, of that dtype, to `row`.
template <int DTYPE> DEVICE u64 row_start(u32 row) { return (u64)row * (HIDDEN * SIZE<DTYPE>); }

template <int DTYPE> DEVICE Weight weight_of(const Packed<DTYPE> &read) {
  if constexpr (!LOOPS) {
    return read;
  } else {
    Weight weight;
    UNROLL for (int i = 0; i < PAIRS; ++i) pack<F32>(weight, i, kept(with_offset(unpack<DTYPE>(read, i))));
    return weight;
  }
}

struct Weights {
  Weight vector[VECTORS];
  Bias bias[VECTORS];
};

template <bool WIDE> DEVICE Weights load_weights(const Site &site, u32 first) {
  Weights weights;
  if constexpr (WEIGHT_DTYPE != NONE)
    UNROLL for (int v = 0; v < VECTORS; ++v)
      if (lane_has(first, v))
        weights.vector[v] =
            weight_of<WEIGHT_DTYPE>(load<WEIGHT_DTYPE, WIDE ? WIDE_BYTES : 0>(site.weight, column_of(first, v)));
  if constexpr (BIAS_DTYPE != NONE)
    UNROLL for (int v = 0; v < VECTORS; ++v)
      if (lane_has(first, v))
        weights.bias[v] = load<BIAS_DTYPE, WIDE ? WIDE_BYTES : 0>(site.bias, column_of(first, v));
  return weights;
}

// A zero that is known once the weight is there.  x waits for it: a compiler that may begin with x reads the weight only
// when x has arrived, and then waits a second time.
DEVICE u32 zero_after(const Weights &weights) {
  u32 zero = 0;
  if constexpr (WEIGHT_DTYPE != NONE && !LOOPS)
    UNROLL for (int v = 0; v < VECTORS; ++v)
      UNROLL for (int i = 0; i < VECTOR * SIZE<WEIGHT_AS> / 4; i += 4)
        if (wave_has(0, v)) zero |= zero_of(weights.vector[v].word[i]);
  return zero;
}

template <int DTYPE> DEVICE f2 unpack_after(const Packed<DTYPE> &packed, int i, u32 zero) {
  if constexpr (DTYPE != BF16 || LOOPS) return unpack(packed, i);
  else return pair(as_float(packed.word[i] << (16 | zero)), as_float(packed.word[i] & (0xffff0000u | zero)));
}

DEVICE Statistics zeros() {
  Statistics none;
  UNROLL for (int v = 0; v < STATISTICS; ++v) none.of[v] = pair(0.0f, 0.0f);
  return none;
}

// Adds a value, or its square, to a sum.
DEVICE void add_to(f2 &sum, f2 value, bool itself) { sum = itself ? add2(sum, value) : fma2(value, value, sum); }

// A pair of elements from `column` on, zeros beyond the end of the row.
DEVICE f2 within_row(f2 value, u32 column) {
  return pair(column < HIDDEN ? value.x : 0.0f, column + 1 < HIDDEN ? value.y : 0.0f);
}

// What is normed: x plus the residual, which is written where it is wanted, or act(gate)*x; and of that the parts of the
// sums of its squares, or where it is centred later of itself, NORM.
template <bool WIDE>
DEVICE Statistics summed(const Site &site, const Part &part, u32 zero, Slice slice, u32 row, bool present, u32 first,
                         Vector *x) {
  Statistics parts = zeros();
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    if (!wave_has(first, v)) continue;
    Packed<X_DTYPE> sum;
    UNROLL for (int i = 0; i < PAIRS; ++i) {
      f2 value = unpack_after(part.x[v], i, zero);
      if constexpr (RESIDUAL) {
        value = add2(value, unpack(part.other[v], i));
        pack(sum, i, value);
        if constexpr (RESIDUAL == ROUNDED) value = unpack(sum, i);
      }
      if constexpr (GATE_FIRST) {
        value = gated(unpack(part.other[v], i), value);
        if constexpr (GATE_ROUNDING != UNROUNDED) value = round_to<X_DTYPE>(value);
      }
      x[v].pair[i] = LOOPS ? kept(value) : value;
      if constexpr (NORM) add_to(parts.of[GROUPED ? v : 0], value, CENTRED);
    }
    if constexpr (WRITES_SUM)
      if (present && lane_has(first, v) && slice_has(slice, v))
        store<X_DTYPE, WIDE>(site.sum + row_start<X_DTYPE>(row), column_of(first, v), sum);
  }
  return parts;
}

// Subtracts the mean from x, of whose sums these are parts; gives the parts of the sums of squares of what is left.
DEVICE Statistics centre(Vector *x, const Statistics &parts, u32 first, u32 turn) {
  Statistics mean = sums_of_row<SumForMean>(parts, turn), squares = zeros();
  UNROLL for (int v = 0; v < STATISTICS; ++v) {
    const float of_sum = divide(mean.of[v].x, (float)STATISTIC_LENGTH);
    mean.of[v] = pair(of_sum, of_sum);
  }
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    if (!lane_has(first, v)) continue;
    UNROLL for (int i = 0; i < PAIRS; ++i) {
      f2 value = add2(x[v].pair[i], negated(mean.of[GROUPED ? v : 0]));
      if constexpr (!WHOLE) value = within_row(value, column_of(first, v) + 2 * i);
      x[v].pair[i] = value;
      add_to(squares.of[GROUPED ? v : 0], value, false);
    }
  }
  return squares;
}

// 1/rms of the row, or of the group of each vector, whose sums of squares these are parts of; one barrier where they are
// of several waves.
DEVICE Statistics inverse_rms_of_row(const Statistics &squares, u32 turn) {
  Statistics rstd = sums_of_row<Sum>(squares, turn);
  UNROLL for (int v = 0; v < STATISTICS; ++v) {
    const float factor = inverse_rms(rstd.of[v].x);
    rstd.of[v] = pair(factor, factor);
  }
  return rstd;
}

// What is written of the part of `row` that starts at column `first`, but for the sum.
template <bool WIDE>
DEVICE void finish_part(const Site &site, const Part &part, const Vector *x, const Statistics &rstd,
                        const Weights &weights, Slice slice, u32 row, bool present, u32 first, u32 turn) {
  Y y[VECTORS];
  u32 of_row = 0;
#if WHOLE_ROW
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    if (!lane_has(first, v)) continue;
    y[v] = produced(x[v], part.x[v], part.other[v], rstd.of[GROUPED ? v : 0], weights.vector[v], weights.bias[v]);
    of_row = max_u32(of_row, amax_bits(y[v]));
  }
  of_row = over_row<Largest>(of_row, turn);
#endif

  UNROLL for (int v = 0; v < VECTORS; ++v) {
    // A lane beyond the end of the row still takes part in its wave's folds.
    if (!wave_has(first, v) || !slice_has(slice, v)) continue;
    const bool stores = present && lane_has(first, v);
    if constexpr (!WHOLE_ROW)
      y[v] = produced(x[v], part.x[v], part.other[v], rstd.of[GROUPED ? v : 0], weights.vector[v], weights.bias[v]);
    if constexpr (WRITES_Y)
      if (stores) store<Y_DTYPE, WIDE>(site.y + row_start<Y_DTYPE>(row), column_of(first, v), y[v].bits);
#if QUANTS > 0
    const Amax amax = group_amax(y[v], of_row);
    if (stores) quantize_all<WIDE>(site, y[v], amax, row, column_of(first, v));
#endif
  }
}

// Everything from what was read to what is written, for all of a row unless there are BATCHES.
template <bool WIDE>
DEVICE void work_on_part(const Site &site, const Part &part, const Weights &weights, Slice slice, u32 row,
                         bool present, u32 first, u32 turn) {
  Vector x[VECTORS];
  const Statistics sums = summed<WIDE>(site, part, zero_after(weights), slice, row, present, first, x);
  const Statistics squares = CENTRED ? centre(x, sums, first, turn) : sums;
  const Statistics rstd = NORM ? inverse_rms_of_row(squares, turn) : zeros();
  finish_part<WIDE>(site, part, x, rstd, weights, slice, row, present, first, turn);
}

// A row that is taken in BATCHES.
template <bool WIDE> DEVICE void row_in_batches(const Site &site, u32 row) {
  ROLLED for (u32 first = 0; first < HIDDEN; first += VECTOR * ROW_LANES * VECTORS) {
    const Part part = load_part<WIDE>(site, row, first);
    const Weights weights = load_weights<WIDE>(site, first);
    work_on_part<WIDE>(site, part, weights, {}, row, true, first, 0);
  }
}

// The rows of this block.  With MOST_BLOCKS the next row is read before this one is worked on, and the weight once.
template <bool WIDE> DEVICE void rows_of_block(const Site &site) {
  constexpr u32 step = MOST_BLOCKS * ROWS;
  const u32 slices = WIDE && SLICES > 1 ? slices_of_row(site.rows) : 1;
  const Slice slice = {slices - 1, block() & (slices - 1)};
  u32 row = block() / slices * ROWS + (ROW_WAVES > 1 ? 0 : wave() * (WAVE / ROW_LANES));
  if (row >= site.rows) return;  // the whole wave; where a barrier follows, the whole block
  if constexpr (BATCHES > 1) return row_in_batches<WIDE>(site, row);
  const u32 lane_row = ROW_LANES >= WAVE ? 0 : thread() % WAVE / ROW_LANES;
  bool present = ROW_LANES >= WAVE || row + lane_row < site.rows;
  Part part = load_part<WIDE>(site, present ? row + lane_row : 0, 0);
  const Weights weights = load_weights<WIDE>(site, 0);
  ROLLED for (u32 turn = 0;; ++turn) {
    const u32 next_row = row + step;
    const bool more = LOOPS && next_row < site.rows;
    const bool next_present = ROW_LANES >= WAVE || next_row + lane_row < site.rows;
    Part next;
    if (WIDE && more) next = load_part<WIDE>(site, next_present ? next_row + lane_row : 0, 0);
    work_on_part<WIDE>(site, part, weights, slice, row + lane_row, present, 0, turn);
    if (!more) return;
    part = WIDE ? next : load_part<WIDE>(site, next_present ? next_row + lane_row : 0, 0);
    row = next_row, present = next_present;
  }
}
