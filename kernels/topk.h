// Grouped top-k routing on GPUs: for each token of gating [T, EXPERTS] the TOPK experts of largest choice, a score with
// perhaps a bias, the choices outside of the TOPK_GROUP groups that are worth most being DROPPED, and their weights.  Of
// equals the first is chosen, whatever ORDER says.  One wave, or part of one, has a token; everything is in registers.
//
// What belongs here is the arithmetic and the order of things.  What differs between machines (wave width, lane
// exchange) is in the .cu and .hip files that include this; the numbers that specialise it (macros) come from
// lowering/families/grouped_topk.py.
//
// Mapping: GROUP_LANES neighbouring lanes have a group, each PER_LANE neighbouring experts of it, the last lanes
// perhaps fewer; TOKEN_LANES lanes have a token, the last perhaps no group.  Both are powers of two, TOKEN_LANES at
// most the wave.  So a lower lane has lower experts, and the first lane among equals is the right one.
//
// What is compared are ranks: unsigned integers that order as the float32 values do, NaN on top.  Rank 0 is below all
// values: what is not there, not allowed or taken already.

#define SHARED DEVICE
#include "scores.h"

constexpr int GROUP_SIZE = EXPERTS / GROUPS;
constexpr bool FULL = GROUP_SIZE == GROUP_LANES * PER_LANE;  // no lane of a group has fewer experts
constexpr int TOKENS = THREADS / TOKEN_LANES;                // of a workgroup
constexpr int SLOTS = (TOPK + TOKEN_LANES - 1) / TOKEN_LANES;  // results that a lane writes
template <int DTYPE> constexpr int SIZE = DTYPE == F32 ? 4 : 2;  // bytes

// The experts of a lane.
struct Experts {
  float score[PER_LANE];
  u32 rank[PER_LANE];
};

DEVICE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// All bits of a negative number are flipped, of others the sign.  There is no -0 among choices, nor among their sums.
DEVICE u32 rank_of(float value) {
  const u32 bits = as_bits(value);
  return value != value ? ~0u : bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}
DEVICE float value_of(u32 rank) { return as_float(rank ^ ((u32)(~(int)rank >> 31) | 0x80000000u)); }

DEVICE u32 lane() { return thread() % TOKEN_LANES; }
DEVICE u32 group_of(u32 lane) { return lane / GROUP_LANES; }
DEVICE u32 place_in_group() { return lane() % GROUP_LANES * PER_LANE; }
DEVICE u32 first_expert() { return group_of(lane()) * GROUP_SIZE + place_in_group(); }
DEVICE bool has_group() { return TOKEN_LANES == GROUPS * GROUP_LANES || group_of(lane()) < GROUPS; }
DEVICE bool has_expert(int i) { return has_group() && (FULL || place_in_group() + i < GROUP_SIZE); }

// Bytes that a lane can load at once, where a row is aligned to as many: 16, 8 or 4; 0 if it cannot.
template <int DTYPE> DEVICE constexpr int chunk() {
  constexpr int bytes = PER_LANE * SIZE<DTYPE>;
  return !FULL || bytes % 4 ? 0 : bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4;
}

template <int DTYPE> DEVICE float element_of(const u32 *words, int i) {
  if constexpr (DTYPE == F32) return as_float(words[i]);
  const u32 half = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
  return DTYPE == F16 ? f16_value(half) : as_float(half << 16);
}

// The lane's part of a row, or of the bias; what is not there is not read.
template <int DTYPE, bool WIDE> DEVICE void load(const u8 *row, float *values) {
  constexpr int bytes = chunk<DTYPE>();
  const u8 *from = row + first_expert() * SIZE<DTYPE>;
  if constexpr (WIDE && bytes != 0) {
    u32 words[PER_LANE * SIZE<DTYPE> / 4];
    if (has_group())
      UNROLL for (int at = 0; at < PER_LANE * SIZE<DTYPE>; at += bytes) load_words<bytes>(from + at, &words[at / 4]);
    UNROLL for (int i = 0; i < PER_LANE; ++i) values[i] = element_of<DTYPE>(words, i);
  } else {
    UNROLL for (int i = 0; i < PER_LANE; ++i) {
      u32 word = 0;
      if (has_expert(i)) word = DTYPE == F32 ? ((const u32 *)from)[i] : ((const u16 *)from)[i];
      values[i] = element_of<DTYPE>(&word, 0);
    }
  }
}

template <bool WIDE> DEVICE void load_both(const u8 *row, const u8 *bias, float *gating, float *added) {
  load<GATING_DTYPE, WIDE>(row, gating);
  if constexpr (HAS_BIAS) load<BIAS_DTYPE, WIDE>(bias, added);
}

// Pointers are only sure to be aligned to their element: a view may start anywhere.
DEVICE bool is_aligned(const u8 *gating, const u8 *bias) {
  constexpr u64 below_gating = chunk<GATING_DTYPE>() - 1, below_bias = chunk<BIAS_DTYPE>() - 1;
  return ANY_ALIGNMENT || (((u64)gating & below_gating) | ((u64)bias & below_bias)) == 0;
}

// fold<K>(v) is v in the neighbouring block of K lanes, where all lanes of a block agree already.
template <int K> DEVICE double over_token(double sum) {
  if constexpr (K >= TOKEN_LANES) return sum;
  else {
    const u64 bits = bits_of(sum);
    return over_token<2 * K>(sum + double_of((u64)fold<K>(bits >> 32) << 32 | fold<K>((u32)bits)));
  }
}

// e^(x - m), m the largest x, over the sum of all.  A NaN, or no finite largest one, makes all NaN.
DEVICE void softmax(const float *gating, float *score) {
  u32 largest_rank = 0;
  UNROLL for (int i = 0; i < PER_LANE; ++i)
    largest_rank = larger(largest_rank, has_expert(i) ? rank_of(gating[i] + 0.0f) : 0);
  const double most = value_of(largest<TOKEN_LANES>(largest_rank));
  double e[PER_LANE], total = 0.0;
  UNROLL for (int i = 0; i < PER_LANE; ++i) {
    e[i] = has_expert(i) ? exponential(gating[i] - most) : 0.0;
    total += e[i];
  }
  const double scale = reciprocal_of(over_token<1>(total));
  UNROLL for (int i = 0; i < PER_LANE; ++i) score[i] = (float)(e[i] * scale);
}

DEVICE float score_of(float gating) {
  return SCORES == SIGMOID ? sigmoid(gating) : SCORES == ROOT_OF_SOFTPLUS ? root_of_softplus(gating) : gating;
}

DEVICE Experts scored(const float *gating, const float *added) {
  Experts experts;
  if constexpr (SCORES == SOFTMAX) softmax(gating, experts.score);
  UNROLL for (int i = 0; i < PER_LANE; ++i) {
    if constexpr (SCORES != SOFTMAX) experts.score[i] = score_of(gating[i]);
    experts.score[i] = rounded(experts.score[i], SCORE_DTYPE);
    experts.rank[i] = has_expert(i) ? rank_of(choice_of(experts.score[i], added[i])) : 0;
  }
  return experts;
}

// The lane that has the largest rank of its token, the first of several.
DEVICE u32 winner(u32 rank) { return first_lane<TOKEN_LANES>(rank == largest<TOKEN_LANES>(rank)); }

struct Pair { u32 first, second; };

// The two largest of four.
DEVICE Pair two_largest(Pair a, Pair b) {
  return {larger(a.first, b.first), larger(smaller(a.first, b.first), larger(a.second, b.second))};
}

template <int K> DEVICE Pair over_group(Pair pair) {
  if constexpr (K >= GROUP_LANES) return pair;
  else return over_group<2 * K>(two_largest(pair, {fold<K>(pair.first), fold<K>(pair.second)}));
}

// Whether the lane's group is one of the TOPK_GROUP that are worth most.
DEVICE bool is_kept(const Experts &experts) {
  Pair pair = {0, 0};
  UNROLL for (int i = 0; i < PER_LANE; ++i) pair = two_largest(pair, {experts.rank[i], 0});
  pair = over_group<1>(pair);
  u32 rank = LARGEST_OF_GROUP ? pair.first : rank_of(sum_of_two(value_of(pair.first), value_of(pair.second)));
  if (!has_group()) rank = 0;
  bool kept = false;
  ROLLED for (int n = 0; n < TOPK_GROUP; ++n) {
    if (group_of(winner(rank)) == group_of(lane())) kept = true, rank = 0;
  }
  return kept;
}

// The expert of largest rank of a lane, the first of several, and what its weight is made of.
struct Best {
  u32 rank, expert;
  float value;
};

DEVICE Best best_of(const Experts &experts) {
  Best best = {0, 0, 0.0f};
  UNROLL for (int i = PER_LANE - 1; i >= 0; --i) {
    const float value = WEIGHTS == OF_SCORES ? experts.score[i] : value_of(experts.rank[i]);
    if (experts.rank[i] >= best.rank) best = {experts.rank[i], first_expert() + i, value};
  }
  return best;
}

DEVICE void take(Experts &experts, const Best &best) {
  UNROLL for (int i = 0; i < PER_LANE; ++i)
    if (first_expert() + i == best.expert) experts.rank[i] = 0;
}

// What a weight begins as, of a score or choice.  A softmax is made once all are chosen.
DEVICE float made_of(float value) {
  if (WEIGHTS == SOFTMAX_OF_CHOICES) return value;
  return rounded(WEIGHTS == SIGMOID_OF_CHOICES ? sigmoid(value) : value, STEP_DTYPE);
}

// The results of a lane: those of number lane(), lane() + TOKEN_LANES, ...; the sum of all, for a softmax of e^(v - most).
struct Chosen {
  u32 expert[SLOTS];
  float value[SLOTS];
  double most, total;
};

DEVICE Chosen choose(Experts &experts) {
  Chosen chosen;
  chosen.most = chosen.total = 0.0;
  Best best = best_of(experts);
  UNROLL for (int slot = 0; slot < SLOTS; ++slot) {
    const u32 left = TOPK - slot * TOKEN_LANES;
    ROLLED for (u32 n = 0; n < smaller(left, TOKEN_LANES); ++n) {
      const u32 from = winner(best.rank);
      const u32 expert = from_lane<TOKEN_LANES>(best.expert, from);
      const float value = made_of(as_float(from_lane<TOKEN_LANES>(as_bits(best.value), from)));
      if (slot == 0 && n == 0) chosen.most = value;
      chosen.total += WEIGHTS == SOFTMAX_OF_CHOICES ? exponential(value - chosen.most) : value;
      if (n == lane()) chosen.expert[slot] = expert, chosen.value[slot] = value;
      if (from == lane()) take(experts, best), best = best_of(experts);
    }
  }
  return chosen;
}

DEVICE float weight_of(float value, const Chosen &chosen) {
  if (WEIGHTS == SOFTMAX_OF_CHOICES)
    value = rounded((float)(exponential(value - chosen.most) * reciprocal_of(chosen.total)), STEP_DTYPE);
  return weight_of_total(value, chosen.total);
}

DEVICE void store_weight(u8 *weights, long long at, float weight) {
  if constexpr (WEIGHT_DTYPE == F32) ((float *)weights)[at] = weight;
  else ((u16 *)weights)[at] = WEIGHT_DTYPE == BF16 ? bf16_bits(weight) : f16_bits(weight);
}

#if HAS_BIAS
#define BIAS const u8 *bias,
#else
#define BIAS
constexpr const u8 *bias = nullptr;
#endif

KERNEL(ENTRY)(const u8 *gating, BIAS u8 *weights, u8 *ids, int rows) {
  const long long wave_token = (long long)block() * TOKENS + thread() / WAVE * (WAVE / TOKEN_LANES);
  if (wave_token >= rows) return;  // the whole wave
  const long long token = (long long)block() * TOKENS + thread() / TOKEN_LANES;
  const bool present = token < rows;
  const u8 *row = gating + (present ? token : 0) * EXPERTS * SIZE<GATING_DTYPE>;

  float gate[PER_LANE], added[PER_LANE] = {};
  if (FULL && is_aligned(gating, bias)) load_both<FULL>(row, bias, gate, added);
  else load_both<false>(row, bias, gate, added);
  Experts experts = scored(gate, added);
  if (TOPK_GROUP < GROUPS) {
    const bool kept = is_kept(experts);
    UNROLL for (int i = 0; i < PER_LANE; ++i)
      if (!kept) experts.rank[i] = has_expert(i) ? DROPPED : 0;
  }

  const Chosen chosen = choose(experts);
  UNROLL for (int slot = 0; slot < SLOTS; ++slot) {
    const u32 number = slot * TOKEN_LANES + lane();
    if (present && number < TOPK) {
      store_weight(weights, token * TOPK + number, weight_of(chosen.value[slot], chosen));
      ((ID *)ids)[token * TOPK + number] = chosen.expert[slot];
    }
  }
}
