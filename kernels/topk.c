// Grouped top-k routing on CPUs: what topk.h does on GPUs, one token after another, in arrays that stay in the nearest
// cache.  The loops over experts are written for the compiler to turn into vectors.
//
// What is compared are ranks: unsigned integers that order as the float32 values do, NaN on top.  Rank 0 is below all
// values: what is not allowed or taken already.  Pointers need only the alignment of their element.
//
// The macros that specialise this file come from lowering/families/grouped_topk.py.

#include "cpu.h"

// dtype codes
#define BF16 1
#define F16 2
#define F32 3

#define GROUP_SIZE (EXPERTS / GROUPS)

typedef unsigned long long u64;

INLINE double fused(double a, double b, double c) {
#if HAS_FMA
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
INLINE u64 bits_of(double value) {
  union { double value; u64 bits; } both = {value};
  return both.bits;
}
INLINE double double_of(u64 bits) {
  union { u64 bits; double value; } both = {bits};
  return both.value;
}
INLINE float near_reciprocal(float a) { return 1.0f / a; }

#define SIGMOID INLINE
#include "sigmoid.h"

// All bits of a negative number are flipped, of others the sign.  There is no -0 among choices, nor among their sums.
INLINE u32 rank_of(float value) {
  u32 bits = word_of(value), rank = bits ^ ((u32)((i32)bits >> 31) | 0x80000000u);
  return value != value ? ~0u : rank;
}
INLINE float value_of(u32 rank) { return float_of(rank ^ ((u32)(~(i32)rank >> 31) | 0x80000000u)); }

INLINE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
INLINE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

INLINE float f16_value(u32 half) {
  u32 magnitude = (half & 0x7fffu) << 13;
  u32 bits = word_of(float_of(magnitude) * 0x1p112f);
  bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits;
  return float_of(bits | (half & 0x8000u) << 16);
}

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

// The rank of a group: of the sum of its two largest choices.
INLINE u32 rank_of_group(const u32 *ranks) {
  u32 first = 0, second = 0;
  for (int i = 0; i < GROUP_SIZE; ++i) {
    second = larger(second, smaller(first, ranks[i]));
    first = larger(first, ranks[i]);
  }
  return rank_of(value_of(first) + value_of(second));
}

// Ranks of 0 for all groups but the TOPK_GROUP that are worth most.
INLINE void keep_groups(u32 *ranks) {
  u32 group_ranks[GROUPS], kept[GROUPS];
  for (int group = 0; group < GROUPS; ++group) {
    group_ranks[group] = rank_of_group(ranks + group * GROUP_SIZE);
    kept[group] = 0;
  }
  for (int n = 0; n < TOPK_GROUP; ++n) {
    int group = place_of_largest(group_ranks, GROUPS);
    group_ranks[group] = 0, kept[group] = ~0u;
  }
  for (int group = 0; group < GROUPS; ++group)
    for (int i = 0; i < GROUP_SIZE; ++i) ranks[group * GROUP_SIZE + i] &= kept[group];
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

INLINE void one_token(const Gating *gating, const float *bias, float *weights, ID *ids) {
  float scores[EXPERTS], chosen[TOPK];
  u32 ranks[EXPERTS];
  for (int i = 0; i < EXPERTS; ++i) {
    scores[i] = sigmoid(element(gating, i, GATING_DTYPE));
    ranks[i] = rank_of(scores[i] + bias[i]);
  }
  if (TOPK_GROUP < GROUPS) keep_groups(ranks);
  double total = 0.0;
  for (int n = 0; n < TOPK; ++n) {
    int expert = place_of_largest(ranks, EXPERTS);
    ranks[expert] = 0;
    ids[n] = expert;
    chosen[n] = scores[expert];
    total += chosen[n];
  }
  for (int n = 0; n < TOPK; ++n) weights[n] = (RENORMALIZE ? chosen[n] / ((float)total + EPS) : chosen[n]) * FACTOR;
}

void ENTRY(BINDING(const Gating, gating), BINDING(const Bias, bias), BINDING(float, weights), BINDING(ID, ids),
           i32 rows, i32 workgroup) {
  i64 first = (i64)workgroup * ROWS, end = first + ROWS < rows ? first + ROWS : rows;
  FloatMode mode = enter_ieee();
  float added[EXPERTS];
  for (int i = 0; i < EXPERTS; ++i) added[i] = element(bias + bias_offset, i, BIAS_DTYPE);
  for (i64 row = first; row < end; ++row)
    one_token(gating + gating_offset + row * EXPERTS, added, weights + weights_offset + row * TOPK,
              ids + ids_offset + row * TOPK);
  leave_ieee(mode);
}
