// The quantizations of row.c: from a block of y to codes and scales in memory.  Included where QUANTS is above 0.

#define MAX2(a, b) ((a) > (b) ? (a) : (b))
// Every group divides it but a whole row, and it divides HIDDEN.
#define BLOCK MAX2(32, MAX2(MAX2(GROUP0, GROUP1), MAX2(GROUP2, GROUP3)))
#define PAIRS (BLOCK / STEP)

// A quantization as constants; lowering/families/row.py explains them.  A group of 0 is the whole row; floats that are
// compared come as their bits, an inverse of 0 means division.
typedef struct {
  int group, layout, codes, limit, least, power, reciprocal, safe, given;
  u32 floor, ceiling, scale_floor, inverse;
} Scheme;

#define SCHEME(i) \
  (Scheme) { \
    GROUP##i, LAYOUT##i, CODES##i, LIMIT##i, LEAST_OF(i), POWER##i, RECIPROCAL##i, QUOTIENT##i != 0, QUOTIENT##i == GIVEN, \
        FLOOR##i, CEILING##i, SCALE_FLOOR##i, INVERSE##i \
  }

// What a group's values are divided by: r = 1/scale, and s = scale but where that is infinite.
typedef struct { float scale, r, s; } Divisor;

// The next power of two not below, its exponent kept in [-126, 127], or up to infinity where power is 2; NaN stays NaN.
INLINE u32 power_of_two_above(u32 scale, int power) {
  u32 up = (scale + 0x7fffffu) & 0x7f800000u, largest = power == 2 ? 0x7f800000u : 0x7f000000u;
  up = up < 0x00800000u ? 0x00800000u : up > largest ? largest : up;
  return scale > 0x7f800000u ? scale : up;
}

INLINE u32 bounded(u32 amax, Scheme scheme) {
  amax = MAX2(amax, scheme.floor);
  return amax > scheme.ceiling && amax <= 0x7f800000u ? scheme.ceiling : amax;
}

// The inverse of a scale, from the largest magnitude itself.
INLINE float inverse_of(u32 amax, Scheme scheme) {
  const float limit = scheme.limit;
  return scheme.reciprocal & INVERTED_TWICE ? 1.0f / float_of(amax) * limit : limit / float_of(amax);
}

INLINE float scale_of(u32 amax, Scheme scheme) {
  if (scheme.reciprocal & SCALE_IS_INVERTED) return 1.0f / inverse_of(amax, scheme);
  float scale = scheme.inverse ? float_of(amax) * float_of(scheme.inverse) : float_of(amax) / (float)scheme.limit;
  u32 bits = MAX2(word_of(scale), scheme.scale_floor);
  return float_of(scheme.power ? power_of_two_above(bits, scheme.power) : bits);
}

INLINE Divisor divisor_of(float scale, u32 amax, Scheme scheme) {
  const int by_inverse = (scheme.reciprocal & 3) == BY_INVERSE;
  const float r = !by_inverse ? 1.0f / scale : scheme.given ? scale : inverse_of(amax, scheme);
  return (Divisor){scale, r, word_of(scale) == 0x7f800000u ? 0.0f : scale};
}

INLINE Floats clamped(Floats a, float least, float limit) {
  a = floats_of(select((Signed)(a > limit), bits_of(all(limit)), bits_of(a)));
  return floats_of(select((Signed)(a < least), bits_of(all(least)), bits_of(a)));
}

// y/scale correctly rounded, or y * (1/scale) where the scheme says so; quantize.h says why the short way is enough, and
// when there is nothing to clamp.
INLINE Floats quotient(Floats y, Divisor by, Scheme scheme) {
  Floats near = y * by.r;
  const int multiplies = scheme.reciprocal & 3;
  if (scheme.given) return clamped(multiplies ? near : y / by.scale, scheme.least, scheme.limit);
  if (scheme.power || (multiplies && !scheme.safe)) return clamped(near, scheme.least, scheme.limit);
  if (multiplies) return near;
  if (!scheme.safe) return clamped(y / by.scale, scheme.least, scheme.limit);
  return HAS_FMA ? fma(-fma(near, all(by.s), -y), all(by.r), near) : y / by.scale;
}

// Bits of max|y| over `count` elements.  Bits of magnitudes order as magnitudes do, with NaN on top, so the integer
// maximum hands on a NaN.
INLINE u32 amax_of(const Pair *y, int count) {
  Words magnitude = {0};
  for (int i = 0; i < count / STEP; ++i) {
    magnitude = larger(magnitude, bits_of(y[i].even) & 0x7fffffffu);
    magnitude = larger(magnitude, bits_of(y[i].odd) & 0x7fffffffu);
  }
  return lane_max(magnitude);
}

// Codes of quotients that are finite and round to at most the largest of the type, or NaN.
//
// A NaN becomes the value its code would stand for: 480 for e4m3fn's 0x7f, 114688 for e5m2's 0x7f, 256 for e4m3fnuz's
// 0x80, which is where that type has no negative zero either.  Torch leaves the int8 of NaN undefined; here it is 0.
// Adding 1.5*2^23 leaves the integer, rounded to nearest even, in the low bits.
INLINE Words codes_of(Floats a, int codes) {
  Words bits = bits_of(a), magnitude = bits & 0x7fffffffu, sign = (bits >> 24) & 0x80u;
  if (codes == INT8) return select((Signed)(magnitude > 0x7f800000u), (Words){0}, bits_of(a + 12582912.0f) & 0xffu);
  if (codes == E5M2) return encode(smaller(magnitude, (Words){0} + 0x47e00000u), 3, 113) | sign;
  if (codes == E4M3FN) return encode(smaller(magnitude, (Words){0} + 0x43f00000u), 4, 121) | sign;
  Words code = encode(smaller(magnitude, (Words){0} + 0x43800000u), 4, 120);
  return code | (sign & (Words)(code != 0u));
}

// 2*LANES bytes from two vectors of codes.
INLINE void store_codes(u8 *to, Words even, Words odd) {
  Words both = even | odd << 8;
#if LANES == 8
  typedef long long Longs __attribute__((vector_size(32)));
  Longs packed = (Longs)__builtin_ia32_packusdw256((Signed)both, (Signed)both);
#ifdef __clang__
  packed = __builtin_shufflevector(packed, packed, 0, 2, 0, 2);
#else
  packed = __builtin_shuffle(packed, (Longs){0, 2, 0, 2});
#endif
  typedef long long Low __attribute__((vector_size(16), aligned(1), may_alias));
  *(Low *)to = (Low){packed[0], packed[1]};
#else
  *(LooseHalves *)to = __builtin_convertvector(both, Halves);
#endif
}

INLINE void store_quotients(const Pair *y, int count, Divisor by, Scheme scheme, u8 *q) {
  for (int i = 0; i < count / STEP; ++i) {
    Words even = codes_of(quotient(y[i].even, by, scheme), scheme.codes);
    store_codes(q + i * STEP, even, codes_of(quotient(y[i].odd, by, scheme), scheme.codes));
  }
}

// The byte of the scale of group g, with the zeros of pad bytes after the last group and of pad rows after the last.
INLINE void store_packed_scale(u8 *bytes, i64 groups, i64 row, i64 rows, i64 g, float scale) {
  const i64 padded = (rows + 3) & ~(i64)3;
  const i64 pad_bytes = g == groups - 1 ? 3 - g % 4 : 0;
  bytes += g / 4 * padded * 4 + g % 4;
  bytes[row * 4] = (u8)(word_of(scale) >> 23);
  for (i64 i = 1; i <= pad_bytes; ++i) bytes[row * 4 + i] = 0;
  if (row == rows - 1)
    for (i64 pad = rows; pad < padded; ++pad)
      for (i64 i = 0; i <= pad_bytes; ++i) bytes[pad * 4 + i] = 0;
}

INLINE void store_scale(void *to, int layout, i64 groups, i64 row, i64 rows, i64 g, float scale) {
  float *scales = to;
  const i64 padded = (rows + 3) & ~(i64)3;
  if (layout == UE8M0_PACKED) {
    store_packed_scale(to, groups, row, rows, g, scale);
  } else if (layout == ROW) {
    scales[row * groups + g] = scale;
  } else if (layout == COLUMN) {
    scales[g * rows + row] = scale;
  } else {
    scales[g * padded + row] = scale;
    if (row == rows - 1)
      for (i64 pad = rows; pad < padded; ++pad) scales[g * padded + pad] = 0.0f;
  }
}

// One quantization of the block of y that starts at `column` of `row`; of_row is the largest magnitude of the row, given
// the scale that is not made here.
INLINE void quantize(const Site *site, int which, Scheme scheme, const Pair *y, u32 of_row, i64 row, i64 column) {
  const float given = site->given[which];
  const int length = scheme.group ? scheme.group : BLOCK;
  const i64 groups = scheme.group ? HIDDEN / scheme.group : 1;
  for (int g = 0; g < BLOCK / length; ++g) {
    const Pair *part = y + g * (length / STEP);
    const i64 at = column + g * length;
    const u32 amax = scheme.given ? 0 : bounded(scheme.group ? amax_of(part, length) : of_row, scheme);
    const float scale = scheme.given ? given : scale_of(amax, scheme);
    store_quotients(part, length, divisor_of(scale, amax, scheme), scheme, site->q[which] + row * HIDDEN + at);
    if (!scheme.given && (scheme.group || column == 0))
      store_scale(site->scale[which], scheme.layout, groups, row, site->rows, at / length, scale);
  }
}
