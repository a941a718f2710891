// act(gate) of gated activations, on vectors of float32: shared by row.h (C++, pairs of floats) and row.c (C, machine
// vectors), which name the operations: Reals, all, plus, times, fused (a*b + c), over (a/b), between (a clamped),
// magnitude, with_sign, where_above, exponent_from.
//
// Nothing here depends on a machine's own approximation but `over`, which each machine makes all but correctly rounded.
// Measured against float64:
//   silu        2 units in the last place for g >= -88.7; below, exp overflows and the result is -0, as in torch
//   gelu        2 units for g >= 0, |g| * 2^-23 below: g/2 * (1 + erf(g/sqrt(2))) with every operation rounded, as in
//               torch, and with torch's own cancellation for large negative g
//   gelu_tanh   2.1 units for g >= 0, |g| * 2^-23 below, as g/(1 + exp(-2z)): g/2 * (1 + tanh z) without its
//               cancellation
// NaN gives NaN; -inf gives NaN and +inf gives +inf, as the formulas do.

// e^x = 4 * whole * (1 + rest): a power of two, and a rest within [-0.3, 0.42].  The factor 4 keeps `whole` finite
// where e^x itself is not.
typedef struct { Reals whole, rest; } Power;

// For x in [-85, 89]; what lies beyond counts as the bound, where 1 + e^x is 1 or infinite already.
ACTIVATION Power power_of_e(Reals x) {
  // Adding this leaves n + 125, n = x/ln2 rounded to an integer, in the low bits: the exponent field of 2^(n - 2).
  const float round = 12582912.0f + 125.0f;
  x = between(x, -85.0f, 89.0f);
  Reals shifted = fused(x, all(0x1.715476p+0f), all(round));
  Reals n = plus(shifted, all(-round));
  // ln2 in two parts; n times the first is exact.
  Reals r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
  // (e^r - 1 - r)/r^2 for |r| <= ln2/2, within 2^-27 of e^r
  Reals q = fused(r, all(0x1.6a2448p-10f), all(0x1.1239d6p-7f));
  q = fused(r, q, all(0x1.5558f2p-5f));
  q = fused(r, q, all(0x1.555492p-3f));
  q = fused(r, q, all(0x1.fffffcp-2f));
  Power power;
  power.whole = exponent_from(shifted);
  power.rest = fused(times(r, r), q, r);
  return power;
}

// The small part first: the other order loses a whole unit where the power is 2^24.
ACTIVATION Reals one_plus_exp(Reals x) {
  Power power = power_of_e(x);
  return times(all(4.0f), plus(power.whole, fused(power.whole, power.rest, all(0.25f))));
}

ACTIVATION Reals one_minus_exp(Reals x) {
  Power power = power_of_e(x);
  Reals negative = times(all(-1.0f), power.whole);
  return times(all(4.0f), fused(negative, power.rest, plus(all(0.25f), negative)));
}

// An odd polynomial near zero; 1 - exp(polynomial in |x|) beyond.
ACTIVATION Reals error_function(Reals x) {
  Reals size = magnitude(x), square = times(x, x);
  Reals near = fused(all(-5.96761703e-4f), square, all(4.99119423e-3f));
  near = fused(near, square, all(-2.67681349e-2f));
  near = fused(near, square, all(1.12819925e-1f));
  near = fused(near, square, all(-3.76125336e-1f));
  near = fused(near, square, all(1.28379166e-1f));
  near = fused(near, x, x);
  Reals far = fused(all(-1.72853470e-5f), size, all(3.83197126e-4f));
  far = fused(far, square, fused(all(-3.88396438e-3f), size, all(2.42546219e-2f)));
  far = fused(far, size, all(-1.06777877e-1f));
  far = fused(far, size, all(-6.34846687e-1f));
  far = fused(far, size, all(-1.28717512e-1f));
  far = fused(far, size, times(all(-1.0f), size));
  return where_above(size, 475.0f / 512.0f, with_sign(one_minus_exp(far), x), near);
}

ACTIVATION Reals silu(Reals g) { return over(g, one_plus_exp(times(all(-1.0f), g))); }

ACTIVATION Reals gelu(Reals g) {
  Reals erf = error_function(times(g, all(0.70710678118654752440f)));
  return times(times(g, all(0.5f)), plus(all(1.0f), erf));
}

ACTIVATION Reals gelu_tanh(Reals g) {
  Reals cubic = fused(times(all(0.044715f), g), times(g, g), g);
  return over(g, one_plus_exp(times(all(-1.59576912160573071176f), cubic)));  // -2 sqrt(2/pi)
}

#ifdef ACT
ACTIVATION Reals activation(Reals g) { return ACT == SILU ? silu(g) : ACT == GELU ? gelu(g) : gelu_tanh(g); }
#endif
