// Operands of 8-bit floats: codes, decoded to what a CPU multiplies, pairs of bfloat16 where it multiplies those, else
// floats.  Either is exact, and so is a product of two of them in float32.
//
// A decoded word holds DEPTH elements, a word of codes four.  `decode` makes PARTS vectors of a vector of codes without
// an exchange between quads of lanes; in which order those hold a row's elements, `place_of` tells.
//
// What kernels/matmul.c uses of its operands: Element, BYTES, DEPTH, MOST_STEPS, LOAD, PARTS, Decoder, `row_words`, UNIT,
// `column_words`, `place_of` and `multiply_add`.  kernels/plain.h has the same names for wider floats.

#define BYTES 1
#if BF16_PAIRS
#define DEPTH 2
#else
#define DEPTH 1
#endif
#define PARTS (4 / DEPTH)
#define MOST_STEPS 64  // of a decoded tile, which fits the first cache beside what streams past it
#include "lanes.h"

typedef u8 Element;
typedef Words Parts[PARTS];

// -- transposing ------------------------------------------------------------------------------------------------------

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
INLINE void transposed(const Words r[4], Words words[4]) {
#if BF16_PAIRS
  const Words low01 = low16(r[0], r[1]), high01 = high16(r[0], r[1]);
  const Words low23 = low16(r[2], r[3]), high23 = high16(r[2], r[3]);
  words[0] = LOW32(low01, low23), words[1] = HIGH32(low01, low23);
  words[2] = LOW32(high01, high23), words[3] = HIGH32(high01, high23);
#else
  transposed_quads(r, words);
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

#if BF16_PAIRS
typedef u8 Bytes __attribute__((vector_size(64)));

// The bytes of the bfloat16 of each magnitude; bit 6 of a code chooses the vector, the low six bits the byte.
typedef struct { Bytes low[2], high[2]; } Decoder;

typedef u8 LanesOfBytes __attribute__((vector_size(LANES)));

INLINE Decoder decoder_of(int codes) {
  union { LanesOfBytes lanes[128 / LANES]; Bytes vectors[2]; } low, high;
  Words code;
  for (int i = 0; i < LANES; ++i) code[i] = i;
  for (int i = 0; i < 128 / LANES; ++i, code += LANES) {
    const Words bits = bits_of(value_of(code, codes)) >> 16;
    low.lanes[i] = __builtin_convertvector(bits, LanesOfBytes);
    high.lanes[i] = __builtin_convertvector(bits >> 8, LanesOfBytes);
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

INLINE Floats multiply_add(Floats sum, Words a, Words b) { return add_pair_products(sum, a, b); }
#else
typedef struct { char unused; } Decoder;
typedef signed char SignedBytes __attribute__((vector_size(4 * LANES)));

INLINE Decoder decoder_of(int codes) { return (Decoder){0}; }

// Of each word of four codes one goes to each part.
INLINE void decode(Words words, int codes, const Decoder *decoder, Parts parts) {
  for (int p = 0; p < PARTS; ++p) parts[p] = bits_of(value_of((words >> (8 * p)) & 0xffu, codes));
}

INLINE Floats multiply_add(Floats sum, Words a, Words b) { return add_product(sum, floats_of(a), floats_of(b)); }

// Where weights stream past once, decoding them takes most of the time.  A code's exponent and mantissa in their places
// of a float are its value times a power of two, subnormals and all: a third of the instructions.  Only NaN is none, and
// is looked for.  Products stay exact: the row of a is multiplied by what both lack, but for a factor GROWN, with which
// the largest would overflow.
#define SHRUNK 1
#define GROWN 2.0f
INLINE void enlarge(int a_codes, int b_codes, Parts parts) {
  const float whole = a_codes == E4M3FN ? 0x1p120f : 0x1p119f, half = b_codes == E4M3FN ? 0x1p119f : 0x1p118f;
  for (int p = 0; p < PARTS; ++p) parts[p] = bits_of(floats_of(parts[p]) * whole * half);
}

// As `decode`, shrunk; tells with a bit in the words that have a code of NaN.
INLINE Words decode_shrunk(Words words, int codes, Parts parts) {
  for (int p = 0; p < PARTS; ++p)
    parts[p] = (Words)((Signed)(words << (24 - 8 * p)) >> 4) & 0x87f00000u;
  const SignedBytes bytes = (SignedBytes)words;
  return (Words)(codes == E4M3FN ? (bytes & 0x7f) == 0x7f : bytes == -128);
}
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

// LOAD elements of a row, in PARTS vectors.
#define LOAD MIN2(CHUNK, 4 * LANES)
INLINE Words row_codes(const u8 *from) {
#if LOAD == 4 * LANES
  return *(const LooseWords *)from;
#else
  return join(*(const LooseHalfWords *)from, (HalfWords){0});
#endif
}
INLINE void row_words(const u8 *from, int codes, const Decoder *decoder, Parts parts) {
  decode(row_codes(from), codes, decoder, parts);
}
#ifdef SHRUNK
INLINE Words row_words_shrunk(const u8 *from, int codes, Parts parts) {
  return decode_shrunk(row_codes(from), codes, parts);
}
#endif

// UNIT elements of each of LANES rows, loaded as quads: lane n of words[j] has those from DEPTH * j on of row n.
#define UNIT 16
INLINE void column_words(const Words quads[4], int codes, const Decoder *decoder, Words words[UNIT / DEPTH]) {
  Words four[4];
  transposed(quads, four);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) decode(four[i], codes, decoder, words + PARTS * i);
}
