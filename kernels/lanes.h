// What products on CPUs do to vectors, whatever they multiply: rows side by side, transposed in quads, sums.

typedef u32 Quad __attribute__((vector_size(16), aligned(1), may_alias));

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

// Where LANES rows are read along K: r[s][i] has bytes 16 * s to 16 * s + 15 of every fourth of them from row i on.  As
// many as lie in a vector are read at once, so that a line of the cache is touched once: where rows are a power of two
// apart it does not stay.
#ifndef B_CHUNK_BYTES
#define B_CHUNK_BYTES (CHUNK * BYTES)
#endif
#if LANES == 16 && B_CHUNK_BYTES % 64 == 0
#define SPAN 4
#define SHUFFLED_QUADS(a, b, which)                                                                  \
  ({                                                                                                 \
    Words r_;                                                                                        \
    __asm__("vshufi32x4 $" #which ", %2, %1, %0" : "=v"(r_) : "v"(a), "v"(b));                       \
    r_;                                                                                              \
  })
INLINE void load_quads(const u8 *const *rows, i64 at, Words r[SPAN][4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Words row[4];
    for (int j = 0; j < 4; ++j) row[j] = *(const LooseWords *)(rows[i + 4 * j] + at);
    const Words low01 = SHUFFLED_QUADS(row[0], row[1], 0x44), high01 = SHUFFLED_QUADS(row[0], row[1], 0xee);
    const Words low23 = SHUFFLED_QUADS(row[2], row[3], 0x44), high23 = SHUFFLED_QUADS(row[2], row[3], 0xee);
    r[0][i] = SHUFFLED_QUADS(low01, low23, 0x88), r[1][i] = SHUFFLED_QUADS(low01, low23, 0xdd);
    r[2][i] = SHUFFLED_QUADS(high01, high23, 0x88), r[3][i] = SHUFFLED_QUADS(high01, high23, 0xdd);
  }
}
#else
#define SPAN 1
INLINE void load_quads(const u8 *const *rows, i64 at, Words r[SPAN][4]) {
  for (int i = 0; i < 4; ++i) r[0][i] = quads(rows + i, at);
}
#endif

// The words of LANES rows, four of each as `quads` gives them, transposed: lane n of words[j] has word j of row n.
INLINE void transposed_quads(const Words r[4], Words words[4]) {
  const Words low01 = LOW32(r[0], r[1]), high01 = HIGH32(r[0], r[1]);
  const Words low23 = LOW32(r[2], r[3]), high23 = HIGH32(r[2], r[3]);
  words[0] = LOW64(low01, low23), words[1] = HIGH64(low01, low23);
  words[2] = LOW64(high01, high23), words[3] = HIGH64(high01, high23);
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
// sum + a*b of the two bfloat16 of each word.
INLINE Floats add_pair_products(Floats sum, Words a, Words b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif
