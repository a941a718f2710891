// Operands of 8-bit integers: codes, decoded to pairs of 16 bits, which a CPU multiplies and adds up exactly.  A sum is 32
// bits of an integer in a vector of floats.  The names are those of kernels/float8.h.

#define BYTES 1
#define DEPTH 2
#define PARTS (4 / DEPTH)
#define MOST_STEPS 64
#include "lanes.h"

typedef u8 Element;
typedef Words Parts[PARTS];
typedef struct { char unused; } Decoder;
typedef short Shorts __attribute__((vector_size(4 * LANES)));

INLINE Decoder decoder_of(int codes) { return (Decoder){0}; }

// Of each word of four codes those of even places go to parts[0], the others to parts[1].
INLINE void decode(Words words, Parts parts) {
  parts[0] = (Words)((Shorts)(words << 8) >> 8), parts[1] = (Words)((Shorts)words >> 8);
}

typedef struct { int part, word; } Place;
INLINE Place place_of(int n) { return (Place){n % PARTS, n / PARTS}; }

#define LOAD MIN2(CHUNK, 4 * LANES)
_Static_assert(LOAD == 4 * LANES, "a load fills a vector");
INLINE void row_words(const u8 *from, int codes, const Decoder *decoder, Parts parts) {
  decode(*(const LooseWords *)from, parts);
}

#define UNIT 16
INLINE void column_words(const Words quads[4], int codes, const Decoder *decoder, Words words[UNIT / DEPTH]) {
  Words four[4];
  transposed_quads(quads, four);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) decode(four[i], words + PARTS * i);
}

INLINE Floats add_integers(Floats a, Floats b) { return floats_of(bits_of(a) + bits_of(b)); }

// sum + a*b of the two integers of each word.
INLINE Floats multiply_add(Floats sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#elif defined(__AVX__)
  Words products;
  __asm__("vpmaddwd %2, %1, %0" : "=v"(products) : "v"(a), "v"(b));
  return add_integers(sum, floats_of(products));
#elif defined(__SSE2__)
  __asm__("pmaddwd %1, %0" : "+x"(a) : "x"(b));
  return add_integers(sum, floats_of(a));
#else
  const Signed low = ((Signed)(a << 16) >> 16) * ((Signed)(b << 16) >> 16);
  return add_integers(sum, floats_of((Words)(low + ((Signed)a >> 16) * ((Signed)b >> 16))));
#endif
}
