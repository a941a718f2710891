// sigmoid(x) as the float32 nearest to the exact value, the same on every machine: in float64, and rounded once.
// Shared by topk.h (C++) and topk.c (C), which name the operations: SIGMOID, fused (a*b + c), bits_of, double_of,
// near_reciprocal (within 2^-20).
//
// Before the rounding the error is about 2^-51, so that one value in 10^8 may be rounded to its other neighbour.
// NaN gives NaN, infinities give 0 and 1.

SIGMOID double polynomial_of_e(double r) {  // e^r for |r| <= ln2/2, within 2^-51
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

SIGMOID double reciprocal_of(double a) {  // for a in [1, 2]: each step doubles the digits
  double r = near_reciprocal((float)a);
  r = fused(fused(-a, r, 1.0), r, r);
  return fused(fused(-a, r, 1.0), r, r);
}

// With e = e^-|x|, 1/(1 + e) or e/(1 + e): nothing cancels or overflows, and a NaN goes through.  No branch, and choices
// between float64 alone: else compilers make no vectors of it.
SIGMOID float sigmoid(float x) {
  // Adding this leaves n + 1023, n = y/ln2 rounded to an integer, in the low bits: the exponent field of 2^n.
  const double round = 0x1.8p52 + 1023.0;
  const double wide = x;
  double y = wide < 0.0 ? wide : -wide;
  y = y < -110.0 ? -110.0 : y;  // where e is nothing beside the smallest float32
  const double shifted = fused(y, 0x1.71547652b82fep+0, round);
  const double r = fused(shifted - round, -0x1.62e42fefa39efp-1, y);
  const double e = polynomial_of_e(r) * double_of(bits_of(shifted) << 52);
  const double above = reciprocal_of(1.0 + e), below = e * above;
  return (float)(wide < 0.0 ? below : above);
}
