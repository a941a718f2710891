// Machine vectors of CPU kernels, and the 16-bit floats in them.  A vector of floats is LANES wide.

// The codes of dtypes.
#define BF16 1
#define F16 2
#define F32 3
enum { E4M3FN = 0, E4M3FNUZ = 1, E5M2 = 2, INT8 = 3 };

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define BF16_PAIRS 1  // the machine multiplies pairs of bfloat16
#else
#define BF16_PAIRS 0
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef u32 Words __attribute__((vector_size(4 * LANES)));
typedef i32 Signed __attribute__((vector_size(4 * LANES)));
typedef u16 Halves __attribute__((vector_size(2 * LANES)));
// As they lie in memory: aligned to their element only.
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef u32 LooseWords __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef u16 LooseHalves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Signed){__VA_ARGS__})
#endif

INLINE Words bits_of(Floats a) { return (Words)a; }
INLINE Floats floats_of(Words a) { return (Floats)a; }
INLINE Floats all(float a) { return a - (Floats){0}; }
INLINE Words select(Signed mask, Words a, Words b) { return ((Words)mask & a) | (~(Words)mask & b); }

INLINE Words larger(Words a, Words b) {
  Words r;
  for (int i = 0; i < LANES; ++i) r[i] = a[i] > b[i] ? a[i] : b[i];
  return r;
}

INLINE Words smaller(Words a, Words b) {
  Words r;
  for (int i = 0; i < LANES; ++i) r[i] = a[i] < b[i] ? a[i] : b[i];
  return r;
}

// a*b + c; where the machine has no fused form only the sum of squares uses it, whose roundings are free.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if HAS_FMA
  Floats r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

// |a| rounded to nearest even onto the numbers with DIGITS significand bits and exponents of at least LEAST (biased
// as in float32), as the code (exponent field, mantissa) of such a format, subnormals included.  Adding a power of
// two whose last place is the format's last place at that exponent lets the adder round.  |a| is below 2^126.
INLINE Words encode(Words magnitude, int digits, u32 least) {
  Words exponent = larger(magnitude & 0x7f800000u, (Words){0} + (least << 23));
  Words grid = exponent + ((u32)(24 - digits) << 23);
  Words units = bits_of(floats_of(magnitude) + floats_of(grid)) - grid;
  return units + (exponent >> (24 - digits)) - (least << (digits - 1));
}

INLINE Words f16_of(Floats a) {
  Words bits = bits_of(a), magnitude = bits & 0x7fffffffu;
  Words code = smaller(encode(smaller(magnitude, (Words){0} + 0x47800000u), 11, 113), (Words){0} + 0x7c00u);
  return select((Signed)(magnitude > 0x7f800000u), (Words){0} + 0x7e00u, code) | ((bits >> 16) & 0x8000u);
}

INLINE Floats f16_to_floats(Words half) {
  Words magnitude = (half & 0x7fffu) << 13;
  Words bits = bits_of(floats_of(magnitude) * 0x1p112f);
  bits = select((Signed)(magnitude >= 0x0f800000u), magnitude | 0x7f800000u, bits);
  return floats_of(bits | (half & 0x8000u) << 16);
}

// Rounded to bfloat16, in the upper half of each word; the lower is garbage.  Only a NaN that float32 arithmetic made
// (`any_nan`) can have low bits to carry over into the sign.
INLINE Words bf16_of(Floats a, int any_nan) {
  Words bits = bits_of(a), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return any_nan ? select((Signed)((bits & 0x7fffffffu) > 0x7f800000u), bits | 0x400000u, rounded) : rounded;
}

INLINE float lane_sum(Floats a) {
  float part[LANES];
  for (int i = 0; i < LANES; ++i) part[i] = a[i];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}
