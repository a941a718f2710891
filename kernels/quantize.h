// The quantizations of tile.h: from a vector of y and the largest values of its groups to codes and scales in memory.
// Included where QUANTS is above 0, in the same namespace, with the same macros.

constexpr int LARGEST_GROUP = GROUP0 | GROUP1 | GROUP2 | GROUP3;  // as far as comparing with powers of two goes

// A quantization as constants; lowering/families/row.py explains them.  GROUPi is 0 where the whole row is one group; floats
// come as their bits, an INVERSE of 0 means division.
#define SCHEME(i) \
  struct Scheme##i { \
    static constexpr int group = GROUP##i, length = GROUP##i ? GROUP##i : HIDDEN, groups = HIDDEN / length; \
    static constexpr int layout = LAYOUT##i, codes = CODES##i, limit = LIMIT##i; \
    static constexpr bool power = POWER##i, infinite = POWER##i == 2; \
    enum { given = QUOTIENT##i == GIVEN, least = LEAST_OF(i), by_inverse = (RECIPROCAL##i & 3) == BY_INVERSE }; \
    enum { inverted_twice = RECIPROCAL##i & INVERTED_TWICE, scale_is_inverted = RECIPROCAL##i & SCALE_IS_INVERTED }; \
    static constexpr bool reciprocal = RECIPROCAL##i & 3, safe = QUOTIENT##i != DIVIDED; \
    static constexpr bool twofold = QUOTIENT##i == TWOFOLD && !power && !reciprocal; \
    static constexpr u32 floor = FLOOR##i, ceiling = CEILING##i, scale_floor = SCALE_FLOOR##i, inverse = INVERSE##i; \
  }
SCHEME(0);
#if QUANTS > 1
SCHEME(1);
#endif
#if QUANTS > 2
SCHEME(2);
#endif
#if QUANTS > 3
SCHEME(3);
#endif

// Bits of max|y| over the groups of 32, 64 and 128 elements this lane's vector lies in, and over its row.  absmax hands
// on a NaN, and since the sign is gone bits order as values do with NaN on top: from here on the maximum is an integer
// one.
struct Amax { u32 of32, of64, of128, of_row; };

// max|y| over this lane's vector.  Where y is 16-bit and the machine compares two such at once, on the packed form.
DEVICE float lane_amax(const Y &y) {
#if HAS_ABSMAX16
  if constexpr (NARROW) {
    u32 part[PAIRS];
    UNROLL for (int i = 0; i < PAIRS; ++i) part[i] = y.bits.word[i];
    UNROLL for (int step = PAIRS / 2; step > 0; step /= 2)
      UNROLL for (int i = 0; i < step; ++i) part[i] = absmax16<Y_DTYPE>(part[i], part[i + step]);
    Packed<Y_DTYPE> last;
    last.word[0] = part[0];
    f2 both = unpack<Y_DTYPE>(last, 0);
    return absmax(both.x, both.y);
  }
#endif
  float part[PAIRS];
  UNROLL for (int i = 0; i < PAIRS; ++i) part[i] = absmax(y.value.pair[i].x, y.value.pair[i].y);
  UNROLL for (int step = PAIRS / 2; step > 0; step /= 2)
    UNROLL for (int i = 0; i < step; ++i) part[i] = absmax(part[i], part[i + step]);
  return part[0];
}

DEVICE u32 amax_bits(const Y &y) { return as_bits(lane_amax(y)) & 0x7fffffffu; }

DEVICE Amax group_amax(const Y &y, u32 of_row) {
  Amax amax = {};
  amax.of_row = of_row;
  if constexpr (LARGEST_GROUP == 0) return amax;
  constexpr int vectors32 = 32 / VECTOR;  // vectors in a group of 32
  u32 bits = amax_bits(y);
  if constexpr (vectors32 == 4) bits = max_u32(bits, fold<1>(bits));
  amax.of32 = max_u32(bits, fold<vectors32 / 2>(bits));
  if constexpr (LARGEST_GROUP >= 64) amax.of64 = max_u32(amax.of32, fold<vectors32>(amax.of32));
  if constexpr (LARGEST_GROUP >= 128) amax.of128 = max_u32(amax.of64, fold<2 * vectors32>(amax.of64));
  return amax;
}

// The next power of two not below, its exponent kept in [-126, 127], or up to infinity; NaN stays NaN.
template <bool infinite> DEVICE float power_of_two_above(float scale) {
  u32 bits = as_bits(scale), up = (bits + 0x7fffffu) & INFINITE_BITS;
  return bits > INFINITE_BITS ? scale : as_float(min_u32(max_u32(up, 0x00800000u), infinite ? INFINITE_BITS : 0x7f000000u));
}

// 1/scale for such a power, exactly: that of 2^127 is subnormal.
template <bool infinite> DEVICE float inverse_power(float scale) {
  if (infinite && scale == INFINITE) return 0.0f;
  return scale < INFINITE ? as_float(max_u32(0x7f000000u - as_bits(scale), 0x00400000u)) : scale;
}

template <class S> DEVICE u32 bounded(const Amax &amax) {
  u32 bits = S::group == 32 ? amax.of32 : S::group == 64 ? amax.of64 : S::group == 128 ? amax.of128 : amax.of_row;
  bits = max_u32(bits, S::floor);
  if constexpr (S::ceiling < INFINITE_BITS) bits = bits > INFINITE_BITS ? bits : min_u32(bits, S::ceiling);
  return bits;
}

// The inverse of a scale, from the largest magnitude itself.
template <class S> DEVICE float inverse_of(u32 amax) {
  return S::inverted_twice ? reciprocal(as_float(amax)) * (float)S::limit : divide((float)S::limit, as_float(amax));
}

template <class S> DEVICE float scale_of(u32 bits) {
  float scale;
  if constexpr (S::scale_is_inverted) return reciprocal(inverse_of<S>(bits));
  if constexpr (S::inverse != 0) scale = as_float(bits) * as_float(S::inverse);
  else scale = S::safe ? divide_by<S::limit>(as_float(bits)) : divide(as_float(bits), (float)S::limit);
  if constexpr (S::scale_floor != 0) scale = as_float(max_u32(as_bits(scale), S::scale_floor));
  return S::power ? power_of_two_above<S::infinite>(scale) : scale;
}

// 1/scale correctly rounded, by one Newton step from an approximation within an ulp.  Of all significands only that of
// all ones can come out wrong (checked exhaustively), and amax/limit never rounds to it for an amax of 11 bits.  The
// step is not for infinity: the caller's business.
DEVICE float scale_reciprocal(float scale) {
  if constexpr (!NARROW) return reciprocal(scale);
  float near = near_reciprocal(scale);
  return fma(fma(-scale, near, 1.0f), near, near);
}

// What a group's values are divided by: 1/scale as r, or as r + rest; s is scale but where that is infinite.
struct Divisor { float scale, r, rest, s; };

// For TWOFOLD a scale from here on is rare; it is made smaller, and the values with it, so that no part of 1/scale is
// subnormal.  NaN is rare too.
constexpr float LARGE = 0x1p100f, SHRINK = 0x1p-64f;

// r + rest is within 2^-43 of 1/scale, and neither is negative, so that the sign of a zero survives.
DEVICE Divisor twofold_divisor(float scale) {
  const float r = as_float(as_bits(near_reciprocal(scale)) - 2);  // below 1/scale
  const float error = fma(-scale, r, 1.0f);
  return {scale, r, fma(error, error, error) * r, scale};
}

// Of a scale that is given.  Where it is so far from 1 that a part of y/scale might leave float32's normal range, or is
// negative, s is 0: then values are divided.
template <class S> DEVICE Divisor given_divisor(float scale) {
  const bool usual = scale >= 0x1p-80f && scale <= 0x1p80f;
  return {scale, S::by_inverse ? scale : reciprocal(scale), 0.0f, usual ? scale : 0.0f};
}

template <class S> DEVICE Divisor divisor_of(float scale, u32 amax) {
  if constexpr (S::given) return given_divisor<S>(scale);
  else if constexpr (S::by_inverse) return {scale, inverse_of<S>(amax), 0.0f, scale};
  const bool infinite = scale == INFINITE;
  const float s = infinite ? 0.0f : scale;
  if constexpr (S::power) return {scale, inverse_power<S::infinite>(scale), 0.0f, s};
  else if constexpr (S::twofold) return twofold_divisor(scale);
  else if constexpr (S::safe) return {scale, infinite ? 0.0f : scale_reciprocal(scale), 0.0f, s};
  else return {scale, S::reciprocal ? reciprocal(scale) : 0.0f, 0.0f, s};
}

// Whether it is a number not far above every limit.
DEVICE bool is_small(float a) { return a < 0x1p20f && a > -0x1p20f; }

// y/scale, or y * (1/scale) where the scheme says so.
//
// TWOFOLD: y*r + y*rest with one rounding at the end is within 2^-43 of y/scale, and for a y of 8 bits y/scale is
// never that close to where float32 rounds the other way (lowering/families/row.py checks every significand of y and scale).
//
// CORRECTED: the quotient comes from r = RN(1/scale): t = RN(y*r) is within an ulp or so of y/scale, and
// t - (t*scale - y)*r rounds to RN(y/scale) (Markstein's theorem, which needs r correctly rounded).  It holds while
// nothing under- or overflows, which the floor on amax ensures for scale and r; where y is so small that the remainder
// underflows, q is a zero either way.  Written as t - e*r with e = t*scale - y the sign of a zero survives.
// An infinite scale means r = 0, and e must then be finite: the step uses 0 for scale, so finite y give a zero and
// inf * 0 gives the NaN of inf/inf.
//
// In both |y| <= amax makes |y/scale| <= limit*(1 + 2^-22), which rounds to limit: clamping would change nothing, and
// a NaN in the group makes scale, r and every quotient NaN.
// DIVIDED (a tiny floor, a ceiling): the true division is carried out.
// GIVEN: CORRECTED, where y*r is so large that it would overflow, or no number, without the correction, which only what
// is clamped later can need.
template <class S> DEVICE f2 quotient(f2 y, const Divisor &by) {
  f2 near = mul2(y, pair(by.r, by.r));
  if constexpr (S::given && !S::reciprocal)
    if (by.s == 0.0f) return pair(divide(y.x, by.scale), divide(y.y, by.scale));
  if constexpr (S::power || S::reciprocal) return near;
  if constexpr (!S::safe) return pair(divide(y.x, by.scale), divide(y.y, by.scale));
  if constexpr (S::twofold) return fma2(y, pair(by.r, by.r), mul2(y, pair(by.rest, by.rest)));
  const f2 exact = fma2(negated(fma2(near, pair(by.s, by.s), negated(y))), pair(by.r, by.r), near);
  if constexpr (S::given) return pair(is_small(near.x) ? exact.x : near.x, is_small(near.y) ? exact.y : near.y);
  return exact;
}

// Whether quotients may lie beyond the limit: a power of two is infinite only where it may be, so elsewhere an infinite y has
// to be clamped, unless the machine's converter does it.
template <class S> DEVICE bool clamps(const Divisor &by) {
  constexpr int largest = S::codes == E4M3FN ? 448 : S::codes == E4M3FNUZ ? 240 : S::codes == E5M2 ? 57344 : 0;
  if constexpr (!S::safe || S::given) return true;
  return S::power && !(SATURATES && S::limit == largest) && as_bits(by.scale) == 0x7f000000u;
}

// Into [least, limit]; NaN stays NaN, but for int8, whose code is then undefined in torch and 0 here.
template <class S> DEVICE float clamped(float a) {
  const float limit = S::limit, least = S::least, beyond = a < least ? least : a;
  if constexpr (S::codes == INT8) return a > limit ? limit : a == a ? beyond : 0.0f;
  return a > limit ? limit : beyond;
}

// Four codes.  Adding 1.5*2^23 leaves the integer, rounded to nearest even, in the low bits.
template <class S> DEVICE u32 codes_of(f2 low, f2 high) {
  if constexpr (S::codes != INT8) {
    return pack_codes<S::codes>(low, high);
  } else {
    const f2 magic = pair(12582912.0f, 12582912.0f);
    f2 a = add2(low, magic), b = add2(high, magic);
    return low_bytes(as_bits(a.x), as_bits(a.y), as_bits(b.x), as_bits(b.y));
  }
}

template <class S, bool CLAMPED> DEVICE void vector_codes(const Vector &y, const Divisor &by, u32 *words) {
  UNROLL for (int i = 0; i < VECTOR / 4; ++i) {
    f2 low = quotient<S>(y.pair[2 * i], by), high = quotient<S>(y.pair[2 * i + 1], by);
    if constexpr (CLAMPED) {
      low = pair(clamped<S>(low.x), clamped<S>(low.y));
      high = pair(clamped<S>(high.x), clamped<S>(high.y));
    }
    words[i] = codes_of<S>(low, high);
    // Unclamped quotients are NaN only where the scale is no number, or infinite.
    if constexpr (S::codes == INT8 && !CLAMPED) words[i] = by.scale < INFINITE ? words[i] : 0;
  }
}

// The codes of a vector whose scale is LARGE or no number.
template <class S> DEVICE void rare_codes(const Vector &y, float scale, u32 *words) {
  Vector small;
  UNROLL for (int i = 0; i < PAIRS; ++i) small.pair[i] = mul2(y.pair[i], pair(SHRINK, SHRINK));
  Divisor by = twofold_divisor(scale * SHRINK);
  if (scale == INFINITE) by.r = by.rest = 0.0f;  // finite/inf is a zero, inf/inf NaN
  vector_codes<S, false>(small, by, words);
}

// The scale of group g.  The lane of the last row also writes the pad rows, that of the last group the pad bytes; not in
// a loop, which makes a single row a twentieth slower.
template <class S> DEVICE void store_scale(u8 *scales, float scale, u32 row, u32 rows, u32 g) {
  const u32 padded = (rows + 3) & ~3u;
  if constexpr (S::layout == UE8M0_PACKED) {
    constexpr int pad_bytes = (4 - S::groups % 4) % 4;
    const bool pads = pad_bytes != 0 && g == S::groups - 1;
    u8 *bytes = scales + ((u64)(g / 4) * padded + row) * 4 + g % 4;
    bytes[0] = (u8)(as_bits(scale) >> 23);
    if (pads) UNROLL for (int i = 1; i <= pad_bytes; ++i) bytes[i] = 0;
    if (row == rows - 1) UNROLL for (int r = 1; r < 4; ++r) {
      if (row + r >= padded) break;
      bytes[r * 4] = 0;
      if (pads) UNROLL for (int i = 1; i <= pad_bytes; ++i) bytes[r * 4 + i] = 0;
    }
  } else if constexpr (S::layout == ROW) {
    ((float *)scales)[(u64)row * S::groups + g] = scale;
  } else if constexpr (S::layout == COLUMN) {
    ((float *)scales)[(u64)g * rows + row] = scale;
  } else {
    float *line = (float *)scales + (u64)g * padded;
    line[row] = scale;
    if (row == rows - 1) UNROLL for (u32 i = 1; i < 4; ++i)
      if (row + i < padded) line[row + i] = 0.0f;
  }
}

// One quantization of one vector.
template <class S, bool WIDE>
DEVICE void quantize(const Vector &y, const Amax &amax, u8 *q, u8 *scales, u32 row, u32 rows, u32 column) {
  const u32 largest = S::given ? 0 : bounded<S>(amax);
  const float scale = S::given ? *(const float *)scales : scale_of<S>(largest);
  const Divisor by = divisor_of<S>(scale, largest);
  u32 words[VECTOR / 4];
  if (clamps<S>(by)) vector_codes<S, true>(y, by, words);
  else vector_codes<S, false>(y, by, words);
  if constexpr (S::twofold)
    if (!(scale < LARGE)) rare_codes<S>(y, scale, words);
  u8 *to = q + (u64)row * HIDDEN + column;
  if constexpr (WIDE && VECTOR == 16) store16(to, words);
  else if constexpr (WIDE) store8(to, words);
  else UNROLL for (int i = 0; i < VECTOR; ++i) to[i] = (u8)(words[i / 4] >> 8 * (i % 4));
  if constexpr (S::given) return;
  if (column % S::length == 0) store_scale<S>(scales, scale, row, rows, column / S::length);
}

// Every quantization of one vector.
template <bool WIDE>
DEVICE void quantize_all(const Site &site, const Y &y, const Amax &amax, u32 row, u32 column) {
#define QUANTIZE(i) quantize<Scheme##i, WIDE>(y.value, amax, site.q[i], site.scale[i], row, site.rows, column)
  QUANTIZE(0);
#if QUANTS > 1
  QUANTIZE(1);
#endif
#if QUANTS > 2
  QUANTIZE(2);
#endif
#if QUANTS > 3
  QUANTIZE(3);
#endif
}
