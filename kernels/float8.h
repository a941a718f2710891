// Codes of 8-bit floats, decoded to what a CPU multiplies: pairs of bfloat16 where it multiplies those, else floats.
// Either is exact, and so is a product of two of them in float32.
//
// A decoded word holds DEPTH elements, a word of codes four.  `decode` makes PARTS vectors of a vector of codes without
// an exchange between quads of lanes; in which order those hold a row's elements, `place_of` tells.

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define BF16_PAIRS 1
#define DEPTH 2
#else
#define BF16_PAIRS 0
#define DEPTH 1
#endif
#define PARTS (4 / DEPTH)

typedef u32 Quad __attribute__((vector_size(16), aligned(1), may_alias));
typedef Words Parts[PARTS];

#ifndef __has_builtin
#define __has_builtin(x) 0
#endif

// -- parts of vectors side by side ---------------------------------------------------------------------------------

#if LANES == 16
typedef u32 HalfWords __attribute__((vector_size(2 * LANES)));
typedef u32 LooseHalfWords __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
INLINE Words join(HalfWords a, HalfWords b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return (Words){a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]};
#endif
}
#endif
#if LANES >= 8
typedef u32 TwoQuads __attribute__((vector_size(32)));
INLINE TwoQuads join_quads(const u8 *a, const u8 *b) {
  const Quad x = *(const Quad *)a, y = *(const Quad *)b;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return (TwoQuads){x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3]};
#endif
}
#endif

// 16 bytes of every fourth of LANES rows.
INLINE Words quads(const u8 *const *rows, i64 at) {
#if LANES == 16
  return join(join_quads(rows[0] + at, rows[4] + at), join_quads(rows[8] + at, rows[12] + at));
#elif LANES == 8
  return join_quads(rows[0] + at, rows[4] + at);
#else
  return *(const Quad *)(rows[0] + at);
#endif
}

#if LANES == 16
#define IN_QUADS(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#elif LANES == 8
#define IN_QUADS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#else
#define IN_QUADS(a, b, c, d) a, b, c, d
#endif

// The lower or upper halves of the quads of two vectors, interleaved in units of so many bits.
#define LOW64(a, b) SHUFFLE(a, b, IN_QUADS(0, 1, LANES, LANES + 1))
#define HIGH64(a, b) SHUFFLE(a, b, IN_QUADS(2, 3, LANES + 2, LANES + 3))
#define LOW32(a, b) SHUFFLE(a, b, IN_QUADS(0, LANES, 1, LANES + 1))
#define HIGH32(a, b) SHUFFLE(a, b, IN_QUADS(2, LANES + 2, 3, LANES + 3))
#if BF16_PAIRS
#define INTERLEAVED(name, instruction)                             \
  INLINE Words name(Words a, Words b) {                            \
    Words r;                                                       \
    __asm__(instruction " %2, %1, %0" : "=v"(r) : "v"(a), "v"(b)); \
    return r;                                                      \
  }
INTERLEAVED(low16, "vpunpcklwd")
INTERLEAVED(high16, "vpunpckhwd")
INTERLEAVED(low8, "vpunpcklbw")
INTERLEAVED(high8, "vpunpckhbw")
#endif

// 16 codes of each of LANES rows, transposed so that `decode` leaves row n in lane n: its part p of words[j] has the
// elements (4j + p * DEPTH) to (4j + p * DEPTH + DEPTH - 1) of the 16.
INLINE void transposed(const u8 *const *rows, i64 at, Words words[4]) {
  Words r[4];
  for (int i = 0; i < 4; ++i) r[i] = quads(rows + i, at);
#if BF16_PAIRS
  const Words low01 = low16(r[0], r[1]), high01 = high16(r[0], r[1]);
  const Words low23 = low16(r[2], r[3]), high23 = high16(r[2], r[3]);
  words[0] = LOW32(low01, low23), words[1] = HIGH32(low01, low23);
  words[2] = LOW32(high01, high23), words[3] = HIGH32(high01, high23);
#else
  const Words low01 = LOW32(r[0], r[1]), high01 = HIGH32(r[0], r[1]);
  const Words low23 = LOW32(r[2], r[3]), high23 = HIGH32(r[2], r[3]);
  words[0] = LOW64(low01, low23), words[1] = HIGH64(low01, low23);
  words[2] = LOW64(high01, high23), words[3] = HIGH64(high01, high23);
#endif
}

// -- decoding ------------------------------------------------------------------------------------------------------

// The value of the code in the low byte of each word, the rest of which is zero.
INLINE Floats value_of(Words code, int codes) {
  Words magnitude = code & 0x7fu;
  Words bits = bits_of(floats_of(magnitude << 20) * (codes == E4M3FN ? 0x1p120f : 0x1p119f));
  bits |= (code & 0x80u) << 24;
  Signed nan = codes == E4M3FN ? (Signed)(magnitude == 0x7fu) : (Signed)(code == 0x80u);
  return floats_of(bits | ((Words)nan & 0x7fc00000u));
}

// sum + a*b.  `fma` is made of scalar ones, and among many gcc finds not all that are a vector.
INLINE Floats add_product(Floats sum, Floats a, Floats b) {
#if defined(__x86_64__) && HAS_FMA
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return fma(a, b, sum);
#endif
}

#if BF16_PAIRS
typedef u8 Bytes __attribute__((vector_size(64)));

// The bytes of the bfloat16 of each magnitude; bit 6 of a code chooses the vector, the low six bits the byte.
typedef struct { Bytes low[2], high[2]; } Decoder;

INLINE Decoder decoder_of(int codes) {
  union { u8 bytes[128]; Bytes vectors[2]; } low, high;
  for (u32 code = 0; code < 128; ++code) {
    const u32 bits = word_of(value_of((Words){0} + code, codes)[0]);
    low.bytes[code] = (u8)(bits >> 16), high.bytes[code] = (u8)(bits >> 24);
  }
  return (Decoder){{low.vectors[0], low.vectors[1]}, {high.vectors[0], high.vectors[1]}};
}

INLINE Bytes looked_up(Bytes codes, const Bytes table[2]) {
  __asm__("vpermi2b %2, %1, %0" : "+v"(codes) : "v"(table[0]), "v"(table[1]));
  return codes;
}

// Of each quad of 16 codes the first eight go to parts[0], the others to parts[1].
INLINE void decode(Words words, int codes, const Decoder *decoder, Parts parts) {
  Bytes code = (Bytes)words, low = looked_up(code, decoder->low), high = looked_up(code, decoder->high);
  high |= code & 0x80;
  if (codes == E4M3FNUZ) {
    Bytes nan = (Bytes)(code == 0x80);
    low |= nan, high |= nan;
  }
  parts[0] = low8((Words)low, (Words)high), parts[1] = high8((Words)low, (Words)high);
}

INLINE Floats multiply_add(Floats sum, Words a, Words b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
typedef struct { char unused; } Decoder;

INLINE Decoder decoder_of(int codes) { return (Decoder){0}; }

// Of each word of four codes one goes to each part.
INLINE void decode(Words words, int codes, const Decoder *decoder, Parts parts) {
  for (int p = 0; p < PARTS; ++p) parts[p] = bits_of(value_of((words >> (8 * p)) & 0xffu, codes));
}

INLINE Floats multiply_add(Floats sum, Words a, Words b) { return add_product(sum, floats_of(a), floats_of(b)); }
#endif

// Where `decode` puts elements DEPTH * n and what follows of codes that lie in order.
typedef struct { int part, word; } Place;

INLINE Place place_of(int n) {
#if BF16_PAIRS
  return (Place){n / 4 % 2, n / 8 * 4 + n % 4};
#else
  return (Place){n % 4, n / 4};
#endif
}
