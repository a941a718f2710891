// Operations of vop.def that take more than an expression.
#pragma once
#include "numbers.h"

static inline bool ieee_mode(const Context *x) { return x->wave->mode >> 9 & 1; }
static inline bool saturates8(const Context *x) { return x->wave->mode >> 23 & 1; }  // FP16_OVFL
static inline int exponent32(float a) { return (int)(float_bits(a) >> 23 & 255); }
static inline int exponent64(double a) { return (int)(double_bits(a) >> 52 & 2047); }
static inline bool is_signalling(float a) { return isnan(a) && !(float_bits(a) & 0x400000); }
static inline bool is_signalling64(double a) { return isnan(a) && !(double_bits(a) & 1ull << 51); }
static inline float quiet(float a) { return isnan(a) ? bits_float(float_bits(a) | 0x400000) : a; }

// -- minimum and maximum: of two numbers, or the number; of zeros, the signed order -----------------

static inline float min_number(float a, float b) {
  const float lesser = a < b ? a : b, zero = bits_float(float_bits(a) | float_bits(b));
  return isnan(a) ? b : isnan(b) ? a : a == 0.0f && b == 0.0f ? zero : lesser;
}
static inline float max_number(float a, float b) {
  const float greater = a > b ? a : b, zero = bits_float(float_bits(a) & float_bits(b));
  return isnan(a) ? b : isnan(b) ? a : a == 0.0f && b == 0.0f ? zero : greater;
}
static inline float min32(const Context *x, float a, float b) {
  if (ieee_mode(x) && (is_signalling(a) || is_signalling(b))) return is_signalling(a) ? quiet(a) : quiet(b);
  return min_number(a, b);
}
static inline float max32(const Context *x, float a, float b) {
  if (ieee_mode(x) && (is_signalling(a) || is_signalling(b))) return is_signalling(a) ? quiet(a) : quiet(b);
  return max_number(a, b);
}
static inline double min64(double a, double b) {
  if (isnan(a)) return b;
  if (isnan(b)) return a;
  return a == 0.0 && b == 0.0 ? (signbit(a) ? a : b) : a < b ? a : b;
}
static inline double max64(double a, double b) {
  if (isnan(a)) return b;
  if (isnan(b)) return a;
  return a == 0.0 && b == 0.0 ? (signbit(a) ? b : a) : a > b ? a : b;
}
// NaN if either is.
static inline float minimum(float a, float b) { return isnan(a) ? quiet(a) : isnan(b) ? quiet(b) : min_number(a, b); }
static inline float maximum(float a, float b) { return isnan(a) ? quiet(a) : isnan(b) ? quiet(b) : max_number(a, b); }
static inline double minimum64(double a, double b) { return isnan(a) ? a : isnan(b) ? b : min64(a, b); }
static inline double maximum64(double a, double b) { return isnan(a) ? a : isnan(b) ? b : max64(a, b); }

static inline float median(const Context *x, float a, float b, float c) {
  if (isnan(a) || isnan(b) || isnan(c)) return min32(x, min32(x, a, b), c);
  const float most = max_number(max_number(a, b), c);
  return most == a ? max_number(b, c) : most == b ? max_number(a, c) : max_number(a, b);
}
static inline double median64(double a, double b, double c) {
  if (isnan(a) || isnan(b) || isnan(c)) return min64(min64(a, b), c);
  const double most = max64(max64(a, b), c);
  return most == a ? max64(b, c) : most == b ? max64(a, c) : max64(a, b);
}
static inline u32 median_u(u32 a, u32 b, u32 c) {
  const u32 low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}
static inline i32 median_i(i32 a, i32 b, i32 c) {
  const i32 low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

// -- approximations: correctly rounded, then off by x->ulp; subnormal operands and results are zeros ---------

static inline float flushed(float a) { return fabsf(a) < 0x1p-126f ? copysignf(0.0f, a) : a; }

static inline float near32(const Context *x, double exact) {
  const float rounded = (float)exact;
  if (isnan(rounded) || isinf(rounded) || fabsf(rounded) < 0x1p-126f) return flushed(rounded);
  const u32 bits = float_bits(rounded) + (u32)x->ulp;
  return (bits & 0x7f800000) == 0x7f800000 || !(bits & 0x7f800000) ? rounded : bits_float(bits);
}
static inline double near64(const Context *x, double rounded) {  // these are good to some 2^-28 only
  return isnan(rounded) || isinf(rounded) || rounded == 0.0 ? rounded : rounded * (1.0 + x->ulp * 0x1p-29);
}
static inline double turns(double a, double (*f)(double)) {  // sin and cos take revolutions, up to 256 of them
  if (!(fabs(a) <= 256.0)) return isfinite(a) ? f(0.0) : NAN;
  return f((a - nearbyint(a)) * 6.283185307179586476925286766559);
}

// -- integers and floats ----------------------------------------------------------------------------

static inline i32 to_i32(double a) {
  return isnan(a) ? 0 : a <= -2147483648.0 ? INT32_MIN : a >= 2147483647.0 ? INT32_MAX : (i32)a;
}
static inline u32 to_u32(double a) { return isnan(a) || a <= 0.0 ? 0 : a >= 4294967295.0 ? ~0u : (u32)a; }
static inline i32 to_i16(double a) { return isnan(a) ? 0 : a <= -32768.0 ? -32768 : a >= 32767.0 ? 32767 : (i32)a; }
static inline u32 to_u16(double a) { return isnan(a) || a <= 0.0 ? 0 : a >= 65535.0 ? 65535 : (u32)a; }
static inline u32 to_snorm(double a) {
  return (u32)(i32)nearbyint(isnan(a) ? 0.0 : a < -1.0 ? -32767.0 : a > 1.0 ? 32767.0 : a * 32767.0) & 0xffff;
}
static inline u32 to_unorm(double a) {
  return (u32)nearbyint(isnan(a) || a < 0.0 ? 0.0 : a > 1.0 ? 65535.0 : a * 65535.0);
}
// To the nearest integer, ties to even, whatever the rounding mode.
static inline double round_even(double a) {
  if (!(fabs(a) < 0x1p52)) return a;
  const double down = floor(a), rest = a - down;
  const bool odd = fmod(down, 2.0) != 0.0;
  return copysign(rest > 0.5 || (rest == 0.5 && odd) ? down + 1.0 : down, a);
}
static inline i32 clamp_i(i64 a, i64 low, i64 high) { return (i32)(a < low ? low : a > high ? high : a); }
static inline u32 leading(u32 a) { return a ? (u32)__builtin_clz(a) : ~0u; }
static inline u32 trailing(u32 a) { return a ? (u32)__builtin_ctz(a) : ~0u; }
static inline u32 reversed(u32 a) {
  a = (a >> 1 & 0x55555555) | (a & 0x55555555) << 1;
  a = (a >> 2 & 0x33333333) | (a & 0x33333333) << 2;
  a = (a >> 4 & 0x0f0f0f0f) | (a & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(a);
}
static inline u64 above(u32 a, u32 b) { return (u64)a << 32 | b; }
static inline u32 absolute_difference(u32 a, u32 b) { return a > b ? a - b : b - a; }
static inline u32 byte_of(u32 word, int i) { return word >> 8 * i & 255; }
static inline i32 bits_of(u32 word, int at, int width) { return (i32)(word << (32 - at - width)) >> (32 - width); }

static inline u32 permuted_byte(u64 data, u32 select) {
  if (select >= 13) return 0xff;
  if (select == 12) return 0;
  if (select >= 8) return data >> (16 * (select - 8) + 15) & 1 ? 0xff : 0;
  return data >> 8 * select & 0xff;
}
static inline u32 permuted(u64 data, u32 select) {
  u32 d = 0;
  for (int i = 0; i < 4; ++i) d |= permuted_byte(data, byte_of(select, i)) << 8 * i;
  return d;
}
static inline u32 truth_table(u32 table, u32 a, u32 b, u32 c) {
  u32 d = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}

// -- division ---------------------------------------------------------------------------------------
// A quotient S2/S1 is computed from operands scaled out of harm's way (V_DIV_SCALE), scaled back in the last step
// (V_DIV_FMAS, told by a mask), and special operands are put right (V_DIV_FIXUP).

static inline bool is_subnormal(double a, int lowest) { return a != 0.0 && fabs(a) < ldexp(1.0, lowest); }

typedef struct { int apart, up, lowest, tiny; } Division;
static const Division DIVISION32 = {96, 64, -126, 23}, DIVISION64 = {768, 128, -1022, 53};

// By how many powers of two a (which is s1 or s2) is scaled; whether the quotient has to be scaled back.
static inline int division_scale(Division k, double a, double s1, double s2, int e1, int e2, u32 *back) {
  const bool tiny_inverse = is_subnormal(1.0 / s1, k.lowest);
  const bool tiny_quotient = is_subnormal(s2 / s1, k.lowest) || (s2 / s1 == 0.0 && isfinite(s1));
  if (e2 - e1 >= k.apart) return *back = 1, a == s1 ? k.up : 0;
  if (is_subnormal(s1, k.lowest)) return k.up;
  // The manual says up here, where s1 is too large for it: that quotient would be infinite.  Down is what makes the
  // compiler's sequence correctly rounded, which it is on the machine.
  if (tiny_inverse && tiny_quotient) return *back = 1, a == s1 ? -k.up : 0;
  if (tiny_inverse) return -k.up;
  if (tiny_quotient) return *back = 1, a == s2 ? k.up : 0;
  return e2 <= k.tiny ? k.up : 0;
}
static inline float divide_scaled32(float a, float s1, float s2, u32 *back) {
  if (s1 == 0.0f || s2 == 0.0f) return NAN;
  return ldexpf(a, division_scale(DIVISION32, a, s1, s2, exponent32(s1), exponent32(s2), back));
}
static inline double divide_scaled64(double a, double s1, double s2, u32 *back) {
  if (s1 == 0.0 || s2 == 0.0) return NAN;
  return ldexp(a, division_scale(DIVISION64, a, s1, s2, exponent64(s1), exponent64(s2), back));
}
// a*b + c in double such that rounding it again to float32, at any exponent, rounds once: to odd where inexact.
static inline double fma_to_odd(float a, float b, float c) {
  const double product = (double)a * b, sum = product + c;
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  u64 bits = double_bits(sum);
  if (isfinite(sum) && error != 0.0 && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return bits_double(bits);
}
static inline float divide_fma32(float a, float b, float c, bool back) {
  if (!back) return fmaf(a, b, c);
  return (float)(fma_to_odd(a, b, c) * (exponent32(c) > 127 ? 0x1p64 : 0x1p-64));
}
static inline double divide_fma64(double a, double b, double c, bool back) {
  return fma(a, b, c) * (!back ? 1.0 : exponent64(c) > 1023 ? 0x1p128 : 0x1p-128);
}
static inline double divide_fixed(double a, double s1, double s2, int underflow, int e1, int e2) {
  const double sign = signbit(s1) != signbit(s2) ? -1.0 : 1.0;
  if (isnan(s2)) return s2;
  if (isnan(s1)) return s1;
  if ((s1 == 0.0 && s2 == 0.0) || (isinf(s1) && isinf(s2))) return NAN;
  if (s1 == 0.0 || isinf(s2)) return sign * INFINITY;
  if (isinf(s1) || s2 == 0.0) return sign * 0.0;
  if (e2 - e1 < underflow) return sign * 0.0;
  return isnan(a) ? sign * INFINITY : sign * fabs(a);  // a quotient so large that the steps before overflowed
}

// -- classes ----------------------------------------------------------------------------------------

static inline u32 class_of(bool negative, bool nan, bool signalling, bool infinite, bool normal, bool zero) {
  if (nan) return signalling ? 1 : 2;
  const int order = infinite ? 0 : normal ? 1 : !zero ? 2 : 3;
  return 1u << (negative ? 2 + order : 9 - order);
}
static inline u32 class32(float a) {
  return class_of(signbit(a), isnan(a), is_signalling(a), isinf(a), exponent32(a) > 0, a == 0.0f);
}
static inline u32 class64(double a) {
  return class_of(signbit(a), isnan(a), is_signalling64(a), isinf(a), exponent64(a) > 0, a == 0.0);
}
static inline u32 class16(u32 a) {
  const u32 m = a & 0x7fff;
  return class_of(a >> 15 & 1, m > 0x7c00, !(m & 0x200), m == 0x7c00, m >= 0x400, m == 0);
}

// -- 8-bit and smaller floats -----------------------------------------------------------------------

static inline Format fp8(const Context *x) { return x->fnuz ? E4M3FNUZ : E4M3FN; }
static inline Format bf8(const Context *x) { return x->fnuz ? E5M2FNUZ : E5M2; }
static inline u32 to_small(const Context *x, Format f, double a) { return encode(f, a, NEAREST_EVEN, saturates8(x)); }
static inline u32 two_bytes(u32 low, u32 high) { return low | high << 8; }
// The power of two that a block scale stands for: the exponent of a float32.
static inline double block_scale(float scale) { return ldexp(1.0, exponent32(scale) - 127); }
// Stochastic rounding: random bits below the last place of the result, then cut off (fp8 takes the upper 20).
static inline float stochastic(float a, u32 random, int keep) {
  return bits_float((float_bits(a) & 0xff800000) | ((float_bits(a) + (random >> keep)) & 0x7fffff));
}
// Which byte of the source a conversion from 8 bits takes: SDWA has shifted it down already.
static inline u32 source_byte(const Context *x, u32 a) {
  return x->inst->encoding == VOP3 ? byte_of(a, x->inst->opsel & 3) : a & 0xff;
}
static inline u32 source_half(const Context *x, u32 a) {
  return x->inst->encoding == VOP3 && (x->inst->opsel & 1) ? a >> 16 : a & 0xffff;
}
static inline u64 two_floats(double low, double high) {
  return float_bits((float)low) | (u64)float_bits((float)high) << 32;
}
static inline u32 two_halves(double low, double high) {
  return encode(HALF, low, NEAREST_EVEN, false) | encode(HALF, high, NEAREST_EVEN, false) << 16;
}
static inline u32 two_bfloats(double low, double high) {
  return bfloat_code((float)low) | bfloat_code((float)high) << 16;
}
