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

typedef Words Parts[PARTS];
typedef struct { char unused; } Decoder;

INLINE Decoder decoder_of(int codes) { return (Decoder){0}; }

#if WIDENED
typedef __UINT64_TYPE__ u64;
typedef u64 LooseFour __attribute__((aligned(2), may_alias));
typedef u64 Fours __attribute__((vector_size(2 * LANES)));

INLINE Words widened(Halves halves) {
  const Words words = __builtin_convertvector(halves, Words);
  return PLAIN == BF16 ? words << 16 : bits_of(f16_to_floats(words));
}

// Four elements of every fourth of LANES rows.
INLINE Words widened_quads(const u8 *const *rows, i64 at) {
  Fours fours;
  for (int i = 0; i < LANES / 4; ++i) fours[i] = *(const LooseFour *)(rows[4 * i] + at);
  return widened((Halves)fours);
}
#endif

#define LOAD (DEPTH * LANES)
INLINE void row_words(const u8 *from, int codes, const Decoder *decoder, Parts parts) {
#if WIDENED
  parts[0] = widened(*(const LooseHalves *)from);
#else
  parts[0] = *(const LooseWords *)from;
#endif
}

#define UNIT (4 * DEPTH)
INLINE void column_words(const u8 *const *rows, i64 at, int codes, const Decoder *decoder, Words words[UNIT / DEPTH]) {
  Words r[4];
#if WIDENED
  for (int i = 0; i < 4; ++i) r[i] = widened_quads(rows + i, at);
#else
  for (int i = 0; i < 4; ++i) r[i] = quads(rows + i, at);
#endif
  transposed_quads(r, words);
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
