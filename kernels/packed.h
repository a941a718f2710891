// Operands of a product of floats a with packed integers b: a as kernels/plain.h has it; of b the codes, BITS each, the
// lowest bits of a byte first, decoded to what that multiplies.
//
// A weight is (code - zero) * scale, rounded to the dtype of the scales and then to PLAIN.  Scales, and zero points if
// HAS_ZERO, are [K / SCALED, N]; else the zero is 2^(BITS - 1).

#define CODE_BYTES(count) ((count) * BITS / 8)
#define B_CHUNK_BYTES CODE_BYTES(CHUNK)
#include "plain.h"

#if SCALE_DTYPE == F32
typedef float Scale;
INLINE u32 scale_bits(Scale scale) { return word_of(scale); }
#else
typedef u16 Scale;
INLINE u32 scale_bits(Scale scale) { return scale; }
#endif

typedef struct {
  const Scale *scale;
  const u8 *zero;
} Weights;

// What the columns of some lanes have in common along a group.
typedef struct {
  Floats scale, zero;
} Grid;

INLINE Floats scales_of(Words bits) {
  return SCALE_DTYPE == F32 ? floats_of(bits) : SCALE_DTYPE == BF16 ? floats_of(bits << 16) : f16_to_floats(bits);
}

// The grid of `count` columns from n on in a group, the last one's in the lanes after them.
INLINE Grid grid_of(const Weights *weights, i64 group, i64 n, int count) {
  const i64 at = group * N + n;
  Words scale, zero = (Words){0} + (1u << (BITS - 1));
  for (int i = 0; i < LANES; ++i) {
    const int lane = MIN2(i, count - 1);
    scale[i] = scale_bits(weights->scale[at + lane]);
    if (HAS_ZERO) zero[i] = weights->zero[at + lane];
  }
  return (Grid){scales_of(scale), __builtin_convertvector((Signed)zero, Floats)};
}

INLINE Floats rounded(Floats a, int dtype) {
  if (dtype == BF16) return floats_of(bf16_of(a, 1) & 0xffff0000u);
#if defined(__AVX512F__) || (LANES == 8 && defined(__F16C__))
  if (dtype == F16) {
    Halves half;
    __asm__("vcvtps2ph $0, %1, %0" : "=v"(half) : "v"(a));
    __asm__("vcvtph2ps %1, %0" : "=v"(a) : "v"(half));
  }
#else
  if (dtype == F16) return f16_to_floats(f16_of(a));
#endif
  return a;
}

// What the codes in the words stand for, before it is rounded to PLAIN.
INLINE Floats weights_of(Words codes, Floats zero, Floats scale) {
  const Floats value = (__builtin_convertvector((Signed)codes, Floats) - zero) * scale;
  return SCALE_DTYPE == PLAIN ? value : rounded(value, SCALE_DTYPE);
}

// Decoded words of DEPTH codes each: those of `low`, and between them those of `high`.
INLINE Words decoded(Words low, Words high, Floats zero, Floats scale) {
#if DEPTH == 2
  const Words first = bf16_of(weights_of(low, zero, scale), 1), second = bf16_of(weights_of(high, zero, scale), 1);
  return first >> 16 | (second & 0xffff0000u);
#else
  return bits_of(rounded(weights_of(low, zero, scale), PLAIN));
#endif
}

#define MASK ((1u << BITS) - 1)
#define IN_WORD (32 / BITS)

// A chunk of LANES rows of b, of which `count` are columns from n on: every `width`th vector from `right` on.
INLINE void decode_columns(const u8 *const *rows, i64 k, const Weights *weights, i64 n, int count, Words *right,
                           int width) {
#pragma GCC unroll 4
  for (int unit = 0; unit < CHUNK; unit += 4 * IN_WORD * SPAN) {
    Words quads[SPAN][4];
    load_quads(rows, CODE_BYTES(k + unit), quads);
#pragma GCC unroll 4
    for (int span = 0; span < SPAN; ++span) {
      const int first = unit + span * 4 * IN_WORD;
      const Grid grid = grid_of(weights, (k + first) / SCALED, n, count);
      Words words[4];
      transposed_quads(quads[span], words);
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word)
#pragma GCC unroll 8
        for (int i = 0; i < IN_WORD; i += DEPTH) {
          const Words low = words[word] >> (BITS * i), high = words[word] >> (BITS * (i + DEPTH - 1));
          right[(first + word * IN_WORD + i) / DEPTH * width] = decoded(low & MASK, high & MASK, grid.zero, grid.scale);
        }
    }
  }
}

typedef u8 LanesOfCodes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef u32 LooseWord __attribute__((aligned(1), may_alias));
typedef u16 LooseHalf __attribute__((aligned(1), may_alias));

// LOAD codes of a row: in DEPTH of them those of even places are low, the others high.
INLINE void row_codes(const u8 *from, Words *low, Words *high) {
#if DEPTH == 2 && BITS == 4
  const Words bytes = __builtin_convertvector(*(const LanesOfCodes *)from, Words);
  *low = bytes & MASK, *high = bytes >> BITS;
#elif DEPTH == 2
  const Words halves = __builtin_convertvector(*(const LooseHalves *)from, Words);
  *low = halves & MASK, *high = halves >> BITS;
#elif BITS == 8
  *low = *high = __builtin_convertvector(*(const LanesOfCodes *)from, Words);
#else
  Words words, shifts;
  for (int i = 0; i < LANES; ++i) shifts[i] = i % 8 * 4;
#if LANES == 16
  words = join((HalfWords){0} + ((const LooseWord *)from)[0], (HalfWords){0} + ((const LooseWord *)from)[1]);
#elif LANES == 8
  words = (Words){0} + *(const LooseWord *)from;
#else
  words = (Words){0} + *(const LooseHalf *)from;
#endif
  *low = *high = words >> shifts & MASK;
#endif
}

// results[i] = row a times row rows[i] of b, which is column n + i, or the last of `count`.
INLINE void multiply_row(const u8 *a, const u8 *const *rows, const Weights *weights, i64 n, int count,
                         const Decoder *decoder, float *results) {
  Floats sums[BATCH] = {{0}};
  for (i64 group = 0; group < K / SCALED; ++group) {
    const Grid grid = grid_of(weights, group, n, count);
    for (int step = 0; step < SCALED; step += LOAD) {
      const i64 k = group * SCALED + step;
      Parts left;
      row_words(a + k * BYTES, 0, decoder, left);
#pragma GCC unroll 8
      for (int i = 0; i < BATCH; ++i) {
        Words low, high;
        row_codes(rows[i] + CODE_BYTES(k), &low, &high);
        sums[i] = multiply_add(sums[i], left[0], decoded(low, high, all(grid.zero[i]), all(grid.scale[i])));
      }
    }
  }
  for (int i = 0; i < BATCH; ++i) results[i] = lane_sum(sums[i]);
}
