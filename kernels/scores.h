// Scores of a router as the float32 nearest to the exact value, the same on every machine: in float64, and rounded once.
// Shared by topk.h (C++) and topk.c (C), which name the operations: SHARED, fused (a*b + c), as_bits, as_float, bits_of,
// double_of, square_root, near_reciprocal (within 2^-20), divide, f16_value (of bits).
//
// Before the rounding the error is about 2^-51, so that one value in 10^8 may be rounded to its other neighbour.
// NaN gives NaN; infinities give what the limit is.

// dtype codes
#define BF16 1
#define F16 2
#define F32 3

// What SCORES may be of
#define SIGMOID 1
#define SOFTMAX 2
#define ROOT_OF_SOFTPLUS 3
#define GATING 4

// and WEIGHTS,
#define OF_SCORES 1
#define OF_CHOICES 2
#define SOFTMAX_OF_CHOICES 3
#define SIGMOID_OF_CHOICES 4

// and ORDER: of equals the first, or as torch.topk chooses them on a CPU.
#define FIRST 1
#define TORCH_SORTED 2
#define TORCH_UNSORTED 3

SHARED double polynomial_of_e(double r) {  // e^r for |r| <= ln2/2, within 2^-51
  double p = fused(0x1.28a2ca617b969p-22, r, 0x1.72fafebdaf273p-19);
  p = fused(p, r, 0x1.a019a6611cad5p-16);
  p = fused(p, r, 0x1.a01978b8b3d18p-13);
  p = fused(p, r, 0x1.6c16c17f46982p-10);
  p = fused(p, r, 0x1.1111112ddae8bp-7);
  p = fused(p, r, 0x1.55555555520a4p-5);
  p = fused(p, r, 0x1.555555554b736p-3);
  p = fused(p, r, 0x1.0000000000005p-1);
  p = fused(p, r, 0x1.000000000001ep+0);
  return fused(p, r, 1.0);
}

SHARED double reciprocal_of(double a) {  // for a in [1, 2^20]: each step doubles the digits
  double r = near_reciprocal((float)a);
  r = fused(fused(-a, r, 1.0), r, r);
  return fused(fused(-a, r, 1.0), r, r);
}

// e^y for y <= 0, about 2^-158 where that is nothing beside the smallest float32.  A NaN goes through.  No branch, and
// choices between float64 alone: else compilers make no vectors of it.
SHARED double exponential(double y) {
  // Adding this leaves n + 1023, n = y/ln2 rounded to an integer, in the low bits: the exponent field of 2^n.
  const double round = 0x1.8p52 + 1023.0;
  y = y < -110.0 ? -110.0 : y;
  const double shifted = fused(y, 0x1.71547652b82fep+0, round);
  const double r = fused(shifted - round, -0x1.62e42fefa39efp-1, y);
  return polynomial_of_e(r) * double_of(bits_of(shifted) << 52);
}

// With e = e^-|x|, 1/(1 + e) or e/(1 + e): nothing cancels or overflows.
SHARED float sigmoid(float x) {
  const double wide = x, e = exponential(wide < 0.0 ? wide : -wide);
  const double above = reciprocal_of(1.0 + e), below = e * above;
  return (float)(wide < 0.0 ? below : above);
}

SHARED double log_of_one_and(double e) {  // log(1 + e) for e in [0, 1], within 2^-50: 2 atanh(e / (2 + e))
  const double s = e * reciprocal_of(2.0 + e), t = s * s;
  double p = fused(0x1.5d1081172f887p-4, t, 0x1.54f8c703ce149p-5);
  p = fused(p, t, 0x1.f00852a5c69fap-5);
  p = fused(p, t, 0x1.106443d797a85p-4);
  p = fused(p, t, 0x1.3b1e2bc8a12dep-4);
  p = fused(p, t, 0x1.745caf74cbe5ep-4);
  p = fused(p, t, 0x1.c71c7445b2127p-4);
  p = fused(p, t, 0x1.249249201beacp-3);
  p = fused(p, t, 0x1.99999999a1c4fp-3);
  p = fused(p, t, 0x1.5555555555527p-2);
  p = fused(p, t, 1.0);
  return 2.0 * s * p;
}

// The float32 nearest to log(1 + e^x), and its root.
SHARED float root_of_softplus(float x) {
  const double wide = x, e = exponential(wide < 0.0 ? wide : -wide);
  return square_root((float)((wide < 0.0 ? 0.0 : wide) + log_of_one_and(e)));
}

// The bits of `value` rounded to the nearest of the 16-bit floats.
SHARED u32 bf16_bits(float value) {
  const u32 bits = as_bits(value);
  return value != value ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
SHARED u32 f16_bits(float value) {
  const u32 bits = as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  // Below the smallest normal number, 0.5 and its last place count in the steps of the subnormal ones.
  if (magnitude < 0x38800000u) return sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}

// `value` rounded to a dtype.
SHARED float rounded(float value, int dtype) {
  if (dtype == F32) return value;
  return dtype == BF16 ? as_float(bf16_bits(value) << 16) : f16_value(f16_bits(value));
}

// What is compared: a score with its bias, of which a gating of -0, or what is rounded to -0, counts as 0.  All else cannot
// be -0.
SHARED float choice_of(float score, float added) {
  const float choice = HAS_BIAS ? rounded(score + added, CHOICE_DTYPE) : score;
  return SCORES == GATING || CHOICE_DTYPE != F32 ? choice + 0.0f : choice;
}

// What a group of these two largest choices is worth.
SHARED float sum_of_two(float first, float second) {
  const float sum = rounded(first + second, CHOICE_DTYPE);
  return CHOICE_DTYPE != F32 ? sum + 0.0f : sum;
}

// A weight, given the sum of all: neither is rounded yet.
SHARED float weight_of_total(float weight, double sum) {
  if (RENORMALIZE) {
    float total = rounded(rounded((float)sum, STEP_DTYPE) + EPS, STEP_DTYPE);
    const float least = rounded(LEAST_TOTAL, STEP_DTYPE);
    if (HAS_LEAST_TOTAL && total < least) total = least;
    weight = rounded(divide(weight, total), STEP_DTYPE);
  }
  return rounded(weight * FACTOR, STEP_DTYPE);
}
