// Attention of few queries on CPUs, in two kernels: what parts of the keys contribute, and their sum.
//
//   JOINED 0   a workgroup takes KEYS_EACH keys of a pair (a sequence, and a head of keys and values) and all QUERIES
//              queries of the GROUP heads that share them.  For each it writes the sum of the values weighted with
//              e^(score - largest), then the sum of the weights, then the largest score; all of these keys.
//   JOINED 1   a workgroup takes a row: out = sum of e^(largest - largest of all) * values, over that of the weights.
//
// score = q . k * SCALE + mask, in float32.  Keys that the mask takes from all queries (-inf) are not read, in whole
// vectors of them.  A query that may look at no key gives zeros, as in torch.
//
// The macros that specialise this file come from lowering/families/attention.py.

#include "cpu.h"
#include "vectors.h"
#define B_CHUNK_BYTES 0
#include "lanes.h"
#include "reals_cpu.h"

#if DTYPE == F32
typedef float Element;
#else
typedef u16 Element;
#endif

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

#define ROWS (GROUP * QUERIES)
#define WEIGHT WIDTH         // where the sum of the weights is in a part of a row,
#define LARGEST (WIDTH + 1)  // and the largest score
#define PART (WIDTH + 2)
#define INFINITY __builtin_inff()

INLINE Floats load(const Element *from) {
#if DTYPE == F32
  return *(const LooseFloats *)from;
#else
  Words halves = __builtin_convertvector(*(const LooseHalves *)from, Words);
  return DTYPE == BF16 ? floats_of(halves << 16) : f16_to_floats(halves);
#endif
}

INLINE void store(Element *to, Floats a) {
#if DTYPE == F32
  *(LooseFloats *)to = a;
#else
  *(LooseHalves *)to = __builtin_convertvector(DTYPE == BF16 ? bf16_of(a, 1) >> 16 : f16_of(a), Halves);
#endif
}

// e^x of x <= 0, of which what is below e^-85 counts as 0; NaN of NaN.
INLINE Floats exponential(Floats x) {
  Power power = power_of_e(x);
  Floats y = (power.whole + power.whole * power.rest) * all(4.0f);
  y = floats_of(select((Signed)(x < all(-85.0f)), (Words){0}, bits_of(y)));
  return floats_of(select((Signed)(x != x), bits_of(x), bits_of(y)));
}

// The largest of what can be compared, which no NaN is; -inf where there is none.  Whole vectors are read.
INLINE float largest_of(const float *scores, int count) {
  Floats largest = all(-INFINITY);
  for (int i = 0; i < count; i += LANES) {
    const Floats next = *(const LooseFloats *)(scores + i);
    largest = floats_of(select((Signed)(next > largest), bits_of(next), bits_of(largest)));
  }
  float one = -INFINITY;
  for (int i = 0; i < LANES; ++i) one = largest[i] > one ? largest[i] : one;
  return one;
}

INLINE float finite(float largest) { return largest == -INFINITY ? 0.0f : largest; }

#if !JOINED

// Lane i is the sum of the lanes of a[i].
INLINE Floats lane_sums(const Floats a[LANES]) {
  float quads[LANES / 4][LANES], sums[LANES];
  for (int g = 0; g < LANES / 4; ++g) {
    Words given[4], turned[4];
    for (int i = 0; i < 4; ++i) given[i] = bits_of(a[4 * g + i]);
    transposed_quads(given, turned);
    Floats sum = (floats_of(turned[0]) + floats_of(turned[1])) + (floats_of(turned[2]) + floats_of(turned[3]));
    *(LooseFloats *)quads[g] = sum;
    Four total = *(const Four *)quads[g];
    for (int q = 4; q < LANES; q += 4) total += *(const Four *)(quads[g] + q);
    *(Four *)(sums + 4 * g) = total;
  }
  return *(const LooseFloats *)sums;
}

INLINE Floats dots(const float *q, const Element *const keys[LANES]) {
  Floats sum[LANES] = {{0}};
  for (int d = 0; d < DEPTH; d += LANES) {
    const Floats query = *(const LooseFloats *)(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) sum[i] = add_product(sum[i], query, load(keys[i] + d));
  }
  return lane_sums(sum);
}

// The scores of LANES keys for all rows; 0 where the mask takes all of them from every row, whose scores are -inf.
static int score(const float q[ROWS][DEPTH], const Element *k, int count, const float *const mask[ROWS],
                 float scores[ROWS][KEYS_EACH], int at) {
  Floats added[ROWS];
  int some = !MASKED;
  for (int r = 0; r < ROWS; ++r) {
    added[r] = (Floats){0};
    if (MASKED && count == LANES) added[r] = *(const LooseFloats *)(mask[r] + at);
    else if (MASKED) for (int i = 0; i < count; ++i) added[r][i] = mask[r][at + i];
    for (int i = 0; i < count; ++i) some |= added[r][i] != -INFINITY;
  }
  // Beyond the last key the first is read again; its score is -inf there.
  const Element *keys[LANES];
  for (int i = 0; i < LANES; ++i) keys[i] = k + (i64)(i < count ? i : 0) * DEPTH;
  for (int r = 0; r < ROWS; ++r) {
    Floats found = some ? dots(q[r], keys) * all(SCALE) + added[r] : added[r];
    for (int i = count; i < LANES; ++i) found[i] = -INFINITY;
    *(LooseFloats *)(scores[r] + at) = found;
  }
  return some;
}

#define BLOCK (WIDTH % (4 * LANES) == 0 ? 4 : 1)  // vectors of a value that are summed at once

INLINE void add_values(const float *weights, const Element *v, int count, float *to) {
  for (int n = 0; n < WIDTH; n += BLOCK * LANES) {
    Floats sum[BLOCK];
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK; ++i) sum[i] = *(const LooseFloats *)(to + n + i * LANES);
    for (int j = 0; j < count; ++j) {
      const Floats weight = all(weights[j]);
#pragma GCC unroll 4
      for (int i = 0; i < BLOCK; ++i)
        sum[i] = add_product(sum[i], weight, load(v + (i64)j * WIDTH + n + i * LANES));
    }
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK; ++i) *(LooseFloats *)(to + n + i * LANES) = sum[i];
  }
}

static void one_part(const Element *q, const Element *k, const Element *v, const float *const mask[ROWS], int count,
                     float *to) {
  float queries[ROWS][DEPTH], scores[ROWS][KEYS_EACH];
  int read[KEYS_EACH / LANES], any = 0;
  for (int r = 0; r < ROWS; ++r)
    for (int d = 0; d < DEPTH; d += LANES) *(LooseFloats *)(queries[r] + d) = load(q + r * DEPTH + d);
  for (int at = 0; at < KEYS_EACH; at += LANES) {
    const int left = count - at < LANES ? count - at : LANES;
    read[at / LANES] = left > 0 && score(queries, k + (i64)at * DEPTH, left, mask, scores, at);
    any |= read[at / LANES];
  }
  for (int r = 0; r < ROWS; ++r) {
    float *row = to + r * (i64)(PARTS * PART);
    const float largest = any ? largest_of(scores[r], count) : -INFINITY;
    Floats total = {0};
    for (int n = 0; n < WIDTH; n += LANES) *(LooseFloats *)(row + n) = (Floats){0};
    for (int at = 0; at < KEYS_EACH; at += LANES) {
      if (!read[at / LANES]) continue;
      const Floats weights = exponential(*(const LooseFloats *)(scores[r] + at) - all(finite(largest)));
      *(LooseFloats *)(scores[r] + at) = weights;
      total += weights;
      add_values(scores[r] + at, v + (i64)at * WIDTH, count - at < LANES ? count - at : LANES, row);
    }
    row[WEIGHT] = lane_sum(total);
    row[LARGEST] = largest;
  }
}

#if MASKED
#define MASK_BINDING BINDING(const float, mask),
#else
#define MASK_BINDING
#endif

void ENTRY(BINDING(const Element, q), BINDING(const Element, k), BINDING(const Element, v),
           MASK_BINDING BINDING(float, parts), i32 rows, i32 workgroup) {
  const i64 pair = workgroup % PAIRS, part = workgroup / PAIRS, first = part * KEYS_EACH;
  const float *masks[ROWS];
  (void)rows;
  for (int r = 0; r < ROWS; ++r) {
    masks[r] = 0;
#if MASKED
    const i64 head = pair % SHARED * GROUP + r / QUERIES;
    const i64 row = pair / SHARED * MASK_BATCH + head * MASK_HEAD + r % QUERIES * MASK_QUERY;
    masks[r] = mask + mask_offset + row * KEYS + first;
#endif
  }
  const i64 key = pair * KEYS + first;
  FloatMode mode = enter_ieee();
  one_part(q + q_offset + pair * (ROWS * DEPTH), k + k_offset + key * DEPTH, v + v_offset + key * WIDTH, masks,
           KEYS - first < KEYS_EACH ? KEYS - first : KEYS_EACH,
           parts + parts_offset + pair * (i64)(ROWS * PARTS * PART) + part * PART);
  leave_ieee(mode);
}

#else

void ENTRY(BINDING(const float, parts), BINDING(Element, out), i32 rows, i32 workgroup) {
  (void)rows;
  const float *given = parts + parts_offset + workgroup * (i64)(PARTS * PART);
  Element *to = out + out_offset + workgroup * (i64)WIDTH;
  float scores[(PARTS + LANES - 1) / LANES * LANES], total = 0.0f;
  FloatMode mode = enter_ieee();
  for (int part = 0; part < (int)(sizeof(scores) / sizeof(*scores)); ++part)
    scores[part] = part < PARTS ? given[part * PART + LARGEST] : -INFINITY;
  const float largest = finite(largest_of(scores, PARTS));
  for (int part = 0; part < PARTS; part += LANES)
    *(LooseFloats *)(scores + part) = exponential(*(const LooseFloats *)(scores + part) - all(largest));
  for (int part = 0; part < PARTS; ++part) total += scores[part] * given[part * PART + WEIGHT];
  for (int n = 0; n < WIDTH; n += LANES) {
    Floats sum = {0};
    for (int part = 0; part < PARTS; ++part)
      sum = add_product(sum, all(scores[part]), *(const LooseFloats *)(given + part * PART + n));
    store(to + n, sum / all(total == 0.0f ? 1.0f : total));
  }
  leave_ieee(mode);
}

#endif
