// Grouped top-k routing on CPUs: what topk.h does on GPUs, one token after another, in arrays that stay in the nearest
// cache.  The loops over experts are written for the compiler to turn into vectors.
//
// SCORES of gating, perhaps with a bias, are choices; the experts of the TOPK_GROUP groups that are worth most stay, the
// others' choices are DROPPED; the TOPK of largest choice are chosen, and WEIGHTS are made of them.
//
// What is compared are ranks: unsigned integers that order as the float32 values do, NaN on top.  Rank 0 is below all
// values: what is not allowed or taken already.  Pointers need only the alignment of their element.
//
// The macros that specialise this file come from lowering/families/grouped_topk.py.

#include "cpu.h"

#define GROUP_SIZE (EXPERTS / GROUPS)

typedef unsigned long long u64;

INLINE double fused(double a, double b, double c) {
#if HAS_FMA
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
INLINE u32 as_bits(float value) { return word_of(value); }
INLINE float as_float(u32 bits) { return float_of(bits); }
INLINE u64 bits_of(double value) {
  union { double value; u64 bits; } both = {value};
  return both.bits;
}
INLINE double double_of(u64 bits) {
  union { u64 bits; double value; } both = {bits};
  return both.value;
}
INLINE float near_reciprocal(float a) { return 1.0f / a; }
INLINE float square_root(float a) { return __builtin_sqrtf(a); }
INLINE float divide(float a, float b) { return a / b; }
INLINE float f16_value(u32 half) {
  u32 magnitude = (half & 0x7fffu) << 13;
  u32 bits = word_of(float_of(magnitude) * 0x1p112f);
  bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits;
  return float_of(bits | (half & 0x8000u) << 16);
}

#define SHARED INLINE
#include "scores.h"

// All bits of a negative number are flipped, of others the sign.  There is no -0 among choices, nor among their sums.
INLINE u32 rank_of(float value) {
  u32 bits = word_of(value), rank = bits ^ ((u32)((i32)bits >> 31) | 0x80000000u);
  return value != value ? ~0u : rank;
}
INLINE float value_of(u32 rank) { return float_of(rank ^ ((u32)(~(i32)rank >> 31) | 0x80000000u)); }

INLINE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
INLINE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

INLINE float element(const void *base, i64 at, int dtype) {
  if (dtype == F32) return ((const float *)base)[at];
  u32 bits = ((const u16 *)base)[at];
  return dtype == F16 ? f16_value(bits) : float_of(bits << 16);
}

// The first place of the largest of `count` ranks.
INLINE int place_of_largest(const u32 *ranks, int count) {
  u32 largest = 0;
  for (int i = 0; i < count; ++i) largest = larger(largest, ranks[i]);
  int place = 0;
  while (ranks[place] != largest) ++place;
  return place;
}

// Where a rank stands among those that torch.topk compares: the smallest key comes first.
typedef struct {
  u32 key;
  i32 place;
} Entry;
#include "order.h"

// The places of the `count` largest ranks; what is taken becomes 0 where of equals the first are taken.
INLINE void take_largest(u32 *ranks, int elements, int count, int order, i32 *places) {
  if (order == FIRST) {
    for (int n = 0; n < count; ++n) {
      places[n] = place_of_largest(ranks, elements);
      ranks[places[n]] = 0;
    }
    return;
  }
  Entry entries[EXPERTS];
  for (int i = 0; i < elements; ++i) entries[i] = (Entry){~ranks[i], i};
  bring_first(entries, count, elements, order == TORCH_SORTED);
  for (int n = 0; n < count; ++n) places[n] = entries[n].place;
}

// The rank of a group: of its largest choice, or of the sum of its two largest.
INLINE u32 rank_of_group(const u32 *ranks) {
  u32 first = 0, second = 0;
  for (int i = 0; i < GROUP_SIZE; ++i) {
    second = larger(second, smaller(first, ranks[i]));
    first = larger(first, ranks[i]);
  }
  return LARGEST_OF_GROUP ? first : rank_of(sum_of_two(value_of(first), value_of(second)));
}

// The rank DROPPED for the experts of all groups but the TOPK_GROUP that are worth most.
INLINE void keep_groups(u32 *ranks) {
  u32 group_ranks[GROUPS], kept[GROUPS];
  i32 places[TOPK_GROUP];
  for (int group = 0; group < GROUPS; ++group) {
    group_ranks[group] = rank_of_group(ranks + group * GROUP_SIZE);
    kept[group] = 0;
  }
  take_largest(group_ranks, GROUPS, TOPK_GROUP, ORDER, places);
  for (int n = 0; n < TOPK_GROUP; ++n) kept[places[n]] = ~0u;
  for (int group = 0; group < GROUPS; ++group)
    for (int i = 0; i < GROUP_SIZE; ++i) {
      u32 *rank = ranks + group * GROUP_SIZE + i;
      *rank = (*rank & kept[group]) | (DROPPED & ~kept[group]);
    }
}

#if GATING_DTYPE == F32
typedef float Gating;
#else
typedef u16 Gating;
#endif
#if BIAS_DTYPE == F32
typedef float Bias;
#else
typedef u16 Bias;
#endif
#if WEIGHT_DTYPE == F32
typedef float Weight;
#else
typedef u16 Weight;
#endif

// The largest of some values, given their ranks: NaN if one is.
INLINE float largest_value(const float *values, int count) {
  u32 largest = 0;
  for (int i = 0; i < count; ++i) largest = larger(largest, rank_of(values[i] + 0.0f));
  return value_of(largest);
}

INLINE void softmax(const float *values, int count, float *made) {
  double e[EXPERTS], most = largest_value(values, count), total = 0.0;
  for (int i = 0; i < count; ++i) e[i] = exponential((double)values[i] - most);
  for (int i = 0; i < count; ++i) total += e[i];
  const double scale = reciprocal_of(total);
  for (int i = 0; i < count; ++i) made[i] = (float)(e[i] * scale);
}

INLINE void score_all(const Gating *gating, float *scores) {
  for (int i = 0; i < EXPERTS; ++i) {
    const float gate = element(gating, i, GATING_DTYPE);
    scores[i] = SCORES == SIGMOID ? sigmoid(gate) : SCORES == ROOT_OF_SOFTPLUS ? root_of_softplus(gate) : gate;
  }
  if (SCORES == SOFTMAX) softmax(scores, EXPERTS, scores);
  for (int i = 0; i < EXPERTS; ++i) scores[i] = rounded(scores[i], SCORE_DTYPE);
}

// The weights of the chosen, given what they are made of.
INLINE void weigh(float *chosen) {
  double total = 0.0;
  if (WEIGHTS == SOFTMAX_OF_CHOICES) softmax(chosen, TOPK, chosen);
  for (int n = 0; n < TOPK; ++n) {
    if (WEIGHTS == SIGMOID_OF_CHOICES) chosen[n] = sigmoid(chosen[n]);
    chosen[n] = rounded(chosen[n], STEP_DTYPE);
    total += chosen[n];
  }
  for (int n = 0; n < TOPK; ++n) chosen[n] = weight_of_total(chosen[n], total);
}

INLINE Weight stored(float weight) {
#if WEIGHT_DTYPE == F32
  return weight;
#else
  return WEIGHT_DTYPE == BF16 ? bf16_bits(weight) : f16_bits(weight);
#endif
}

INLINE void one_token(const Gating *gating, const float *bias, Weight *weights, ID *ids) {
  float scores[EXPERTS], chosen[TOPK];
  u32 ranks[EXPERTS], left[EXPERTS];
  i32 places[TOPK];
  score_all(gating, scores);
  for (int i = 0; i < EXPERTS; ++i) ranks[i] = rank_of(choice_of(scores[i], HAS_BIAS ? bias[i] : 0.0f));
  if (TOPK_GROUP < GROUPS) keep_groups(ranks);
  for (int i = 0; i < EXPERTS; ++i) left[i] = ranks[i];
  take_largest(left, EXPERTS, TOPK, ORDER, places);
  for (int n = 0; n < TOPK; ++n) {
    ids[n] = places[n];
    chosen[n] = WEIGHTS == OF_SCORES ? scores[places[n]] : value_of(ranks[places[n]]);
  }
  weigh(chosen);
  for (int n = 0; n < TOPK; ++n) weights[n] = stored(chosen[n]);
}

#if HAS_BIAS
#define BIAS BINDING(const Bias, bias),
#else
#define BIAS
#endif

void ENTRY(BINDING(const Gating, gating), BIAS BINDING(Weight, weights), BINDING(ID, ids), i32 rows, i32 workgroup) {
  i64 first = (i64)workgroup * ROWS, end = first + ROWS < rows ? first + ROWS : rows;
  FloatMode mode = enter_ieee();
#if HAS_BIAS
  float added[EXPERTS];
  for (int i = 0; i < EXPERTS; ++i) added[i] = element(bias + bias_offset, i, BIAS_DTYPE);
#else
  const float *added = 0;
#endif
  for (i64 row = first; row < end; ++row)
    one_token(gating + gating_offset + row * EXPERTS, added, weights + weights_offset + row * TOPK,
              ids + ids_offset + row * TOPK);
  leave_ieee(mode);
}
