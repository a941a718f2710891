// Operands of 32- or 16-bit floats, both of dtype PLAIN: as they are, bfloat16 in pairs where the machine multiplies
// those, or widened to 32 bits.  The names are those of kernels/float8.h.

#if PLAIN == F32
typedef float Element;
#define BYTES 4
#else
typedef u16 Element;
#define BYTES 2
#endif
#if PLAIN == BF16 && BF16_PAIRS
#define DEPTH 2
#else
#define DEPTH 1
#endif
#define WIDENED (BYTES == 2 && DEPTH == 1)
#define PARTS 1
#define MOST_STEPS (BYTES == 4 ? 32 : 64)  // measured
#include "lanes.h"

typedef Words Parts[PARTS];
typedef struct { char unused; } Decoder;

INLINE Decoder decoder_of(int codes) { return (Decoder){0}; }

#if WIDENED
// The values of 16-bit floats, which are the low halves of words.
INLINE Words widened(Words halves) { return PLAIN == BF16 ? halves << 16 : bits_of(f16_to_floats(halves)); }
#endif

#define LOAD (DEPTH * LANES)
INLINE void row_words(const u8 *from, int codes, const Decoder *decoder, Parts parts) {
#if WIDENED
  parts[0] = widened(__builtin_convertvector(*(const LooseHalves *)from, Words));
#else
  parts[0] = *(const LooseWords *)from;
#endif
}

#define UNIT (16 / BYTES)
INLINE void column_words(const Words quads[4], int codes, const Decoder *decoder, Words words[UNIT / DEPTH]) {
#if WIDENED
  Words pairs[4];
  transposed_quads(quads, pairs);
  for (int i = 0; i < 4; ++i) words[2 * i] = widened(pairs[i] & 0xffffu), words[2 * i + 1] = widened(pairs[i] >> 16);
#else
  transposed_quads(quads, words);
#endif
}

typedef struct { int part, word; } Place;

INLINE Place place_of(int n) { return (Place){0, n}; }

INLINE Floats multiply_add(Floats sum, Words a, Words b) {
#if DEPTH == 2
  return add_pair_products(sum, a, b);
#else
  return add_product(sum, floats_of(a), floats_of(b));
#endif
}
