// Number formats narrower than float32, in integer arithmetic: what the converters round and how they overflow.
#pragma once
#include "machine.h"

typedef enum { NEAREST_EVEN, UP, DOWN, TO_ZERO } Rounding;  // as MODE encodes it

static inline u32 float_bits(float x) { u32 u; memcpy(&u, &x, 4); return u; }
static inline float bits_float(u32 u) { float x; memcpy(&x, &u, 4); return x; }
static inline u64 double_bits(double x) { u64 u; memcpy(&u, &x, 8); return u; }
static inline double bits_double(u64 u) { double x; memcpy(&x, &u, 8); return x; }

// value / 2^shift rounded to an integer.
static inline __attribute__((always_inline)) u64 shift_right_rounded(u64 value, int shift, Rounding mode,
                                                                     bool negative) {
  if (shift <= 0) return value << -shift;
  if (shift > 63) value = value != 0, shift = 2;  // only that it is not zero counts
  const u64 whole = value >> shift, rest = value & ((1ull << shift) - 1), half = 1ull << (shift - 1);
  if (mode == NEAREST_EVEN) return whole + (rest > half || (rest == half && (whole & 1)));
  if (mode == TO_ZERO) return whole;
  return whole + (rest != 0 && negative == (mode == DOWN));
}

// What the largest exponent means: infinities and NaNs; nothing but all ones being NaN; nothing, minus zero being NaN;
// nothing, and there is no NaN.
typedef enum { IEEE, FN, FNUZ, FINITE } Specials;
typedef struct { int exponent, mantissa, bias; Specials specials; } Format;

static const Format HALF = {5, 10, 15, IEEE}, BFLOAT = {8, 7, 127, IEEE};
static const Format E4M3FN = {4, 3, 7, FN}, E5M2 = {5, 2, 15, IEEE};
static const Format E4M3FNUZ = {4, 3, 8, FNUZ}, E5M2FNUZ = {5, 2, 16, FNUZ};
static const Format E2M1 = {2, 1, 1, FINITE}, E2M3 = {2, 3, 1, FINITE}, E3M2 = {3, 2, 3, FINITE};

static inline u32 sign_of(Format f) { return 1u << (f.exponent + f.mantissa); }
static inline u32 nan_code(Format f) {
  if (f.specials == FNUZ) return sign_of(f);
  if (f.specials == FINITE) return sign_of(f) - 1;
  return f.specials == FN ? sign_of(f) - 1 : (sign_of(f) - 1) & ~((1u << (f.mantissa - 1)) - 1);
}
static inline u32 largest_code(Format f) {
  if (f.specials == FN) return sign_of(f) - 2;
  if (f.specials == IEEE) return (((1u << f.exponent) - 1) << f.mantissa) - 1;
  return sign_of(f) - 1;
}

// The code of a double, rounded once.  What rounds beyond the largest is infinite (IEEE) or NaN, unless `saturate`.
static inline __attribute__((always_inline)) u32 encode(Format f, double x, Rounding mode, bool saturate) {
  const u64 bits = double_bits(x), magnitude = bits & ~(1ull << 63);
  const bool negative = bits >> 63;
  const u32 sign = negative ? sign_of(f) : 0;
  if (magnitude > 0x7ffull << 52) return f.specials == FNUZ ? nan_code(f) : sign | nan_code(f);
  const int field = (int)(magnitude >> 52), lowest = 1 - f.bias;
  const int exponent = (field ? field : 1) - 1023, at = exponent > lowest ? exponent : lowest;
  const u64 significand = (magnitude & ((1ull << 52) - 1)) | (field ? 1ull << 52 : 0);
  const u64 rounded = shift_right_rounded(significand, 52 - f.mantissa + at - exponent, mode, negative);
  const u64 code = rounded + ((u64)(at - lowest) << f.mantissa);
  if (code > largest_code(f)) {
    const bool inward = mode == TO_ZERO || (mode == UP && negative) || (mode == DOWN && !negative);
    if (saturate || f.specials == FINITE || (inward && field != 0x7ff)) return sign | largest_code(f);
    return f.specials == IEEE ? sign | (largest_code(f) + 1) : f.specials == FNUZ ? nan_code(f) : sign | nan_code(f);
  }
  return f.specials == FNUZ && code == 0 ? 0 : sign | (u32)code;
}

static inline __attribute__((always_inline)) double decode(Format f, u32 code) {
  const u32 sign = code & sign_of(f), magnitude = code & (sign_of(f) - 1);
  const int field = (int)(magnitude >> f.mantissa);
  const u32 fraction = magnitude & ((1u << f.mantissa) - 1);
  if (f.specials == FNUZ && code == sign_of(f)) return NAN;
  if (f.specials == FN && magnitude == sign_of(f) - 1) return sign ? -NAN : NAN;
  if (f.specials == IEEE && field == (1 << f.exponent) - 1)
    return bits_double((u64)(sign != 0) << 63 | 0x7ffull << 52 | (u64)fraction << (52 - f.mantissa));
  const u32 significand = fraction | (field ? 1u << f.mantissa : 0);
  const double unit = bits_double((u64)(1023 + (field ? field : 1) - f.bias - f.mantissa) << 52);
  return (sign ? -1.0 : 1.0) * significand * unit;
}

static inline double half_value(u32 code) { return decode(HALF, code & 0xffff); }
static inline float bfloat_value(u32 code) { return bits_float(code << 16); }

static inline u32 bfloat_code(float x) {
  const u32 bits = float_bits(x);
  if (isnan(x)) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
