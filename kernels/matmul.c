// The block-scaled product on CPUs: out[m, n] = sum over groups g of K of a_scale[m, g] * b_scale[n/GROUP, g] * (the
// product of group g of row m of a and row n of b), a [rows, K] and b [N, K] of 8-bit floats, accumulated in float32.
//
// Codes are decoded once and multiplied as bfloat16 pairs where the machine has that (a product of two codes is exact in
// float32), else as floats.  Either way four codes of a row are one 32-bit word, and a vector of such words becomes
// PARTS vectors of DEPTH elements a lane without an exchange between lanes.
//
//   few rows    lanes are places along K: BATCH rows of b stream past one row of a.
//   many rows   lanes are columns: a tile of COLUMNS rows of b is decoded and transposed, one group at a time, and
//               multiplied with PANEL rows of a after another.  The sums of a tile stay on the stack.
//
// A worker's stack is 128 KiB; the tiles take less than 64.  Pointers need only the alignment of their element.
//
// The macros that specialise this file come from lowering/matmul_kernel.py.

#include "cpu.h"
#include "vectors.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define BF16_PAIRS 1
#define DEPTH 2
#else
#define BF16_PAIRS 0
#define DEPTH 1
#endif
#define PARTS (4 / DEPTH)

// Sums of PANEL rows times WIDTH vectors fill the registers.
#if LANES == 16
#define PANEL 4
#define WIDTH 6
#define BATCH 8
#else
#define PANEL 6
#define WIDTH 2
#define BATCH 4
#endif

#define MIN2(a, b) ((a) < (b) ? (a) : (b))
#define GROUPS (K / GROUP)
#define CHUNK MIN2(GROUP, 64)           // elements along K of a decoded tile
#define STEPS (CHUNK / DEPTH)
#define LOAD MIN2(CHUNK, 4 * LANES)     // codes that are loaded at once along K
#define VECTORS (COLUMNS / LANES)
#define STRIPES (VECTORS / WIDTH)

typedef u32 Quad __attribute__((vector_size(16), aligned(1), may_alias));
typedef float Eight __attribute__((vector_size(32)));
typedef float LooseEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef Words Parts[PARTS];

#if !defined(__has_builtin)
#define __has_builtin(x) 0
#endif

// A value that is in a register from here on: compilers like to load it anew for each use.
INLINE Words once(Words a) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(a));
#endif
  return a;
}

// Half vectors side by side.
#if LANES > 4
typedef u32 HalfWords __attribute__((vector_size(2 * LANES)));
typedef u32 LooseHalfWords __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
#endif
#if LANES == 16
#define UP_TO_HALF 0, 1, 2, 3, 4, 5, 6, 7
#define UP_TO_ALL UP_TO_HALF, 8, 9, 10, 11, 12, 13, 14, 15
INLINE Words join(HalfWords a, HalfWords b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, UP_TO_ALL);
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

// 16 bytes from each of LANES / 4 rows that are `stride` rows apart... see below
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
#define IN_QUADS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
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
#define INTERLEAVED(name, instruction)                                       \
  INLINE Words name(Words a, Words b) {                                      \
    Words r;                                                                 \
    __asm__(instruction " %2, %1, %0" : "=v"(r) : "v"(a), "v"(b));           \
    return r;                                                                \
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

// LOAD codes of a row, zeros after them.
INLINE Words load_codes(const u8 *from) {
#if LOAD == 4 * LANES
  return *(const LooseWords *)from;
#else
  return join(*(const LooseHalfWords *)from, (HalfWords){0});
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

INLINE Floats multiply_add(Floats sum, Words a, Words b) { return fma(floats_of(a), floats_of(b), sum); }
#endif

// -- many rows -----------------------------------------------------------------------------------------------------

typedef struct {
  const u8 *a, *b;
  const float *a_scale, *b_scale;
  void *out;
} Product;

// Tiles along a chunk of K, decoded: stripes of WIDTH vectors of columns, and a panel of rows of a.
typedef struct {
  Words words[STRIPES][STEPS][WIDTH];
} Right;

typedef struct {
  u32 words[PANEL][STEPS + LANES];
} Left;

INLINE int least(i64 a, i64 b) { return (int)(a < b ? a : b); }

// The rows of b from n on; those beyond the last are the last.
INLINE void rows_of(const u8 *b, i64 n, int count, const u8 **rows) {
  for (int i = 0; i < count; ++i) rows[i] = b + (n + i < N ? n + i : N - 1) * (i64)K;
}

// Where among the steps of a chunk `decode` puts a row's elements DEPTH * place and what follows it.
INLINE int step_of(int place) {
  const int load = place / (LOAD / DEPTH), in_load = place % (LOAD / DEPTH);
#if BF16_PAIRS
  const int part = in_load / 4 % 2, word = in_load / 8 * 4 + in_load % 4;
#else
  const int part = in_load % 4, word = in_load / 4;
#endif
  return load * (LOAD / DEPTH) + part * (LOAD / 4) + word;
}

// Vector v of a tile of b, a chunk of LANES rows; the chunk after it is sent for.
INLINE void decode_right(const u8 *const *rows, i64 k, int v, const Decoder *decoder, Right *right) {
  rows += v * LANES;
  for (int i = 0; i < LANES; ++i) __builtin_prefetch(rows[i] + k + CHUNK);
#pragma GCC unroll 4
  for (int quad = 0; quad < CHUNK / 16; ++quad) {
    Words words[4];
    transposed(rows, k + 16 * quad, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Parts parts;
      decode(words[i], B_CODES, decoder, parts);
      for (int part = 0; part < PARTS; ++part)
        right->words[v / WIDTH][step_of((16 * quad + 4 * i) / DEPTH + part)][v % WIDTH] = parts[part];
    }
  }
}

INLINE void decode_left(const Product *p, i64 row, int rows, i64 k, const Decoder *decoder, Left *left) {
  for (int i = 0; i < rows; ++i)
    for (int load = 0; load < CHUNK / LOAD; ++load) {
      Parts parts;
      decode(load_codes(p->a + (row + i) * (i64)K + k + load * LOAD), A_CODES, decoder, parts);
      for (int part = 0; part < PARTS; ++part)
        *(LooseWords *)&left->words[i][(load * PARTS + part) * (LOAD / 4)] = parts[part];
    }
}

// sums[i][v] += a_scale of row i * b_scale of vector v * (row i of the panel times the columns of vector v)
INLINE void multiply_panel(const Left *left, int rows, const Words (*right)[WIDTH], const float *a_scale,
                           const float *b_scale, Floats *sums) {
  Floats sum[PANEL][WIDTH] = {{{0}}};
  for (int step = 0; step < STEPS; ++step) {
    Words b[WIDTH];
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) b[v] = once(right[step][v]);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      Words a = (Words){0} + left->words[i][step];
#pragma GCC unroll 8
      for (int v = 0; v < WIDTH; ++v) sum[i][v] = multiply_add(sum[i][v], a, b[v]);
    }
  }
  Floats *to = sums;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, to += VECTORS) {
    const Eight scale = a_scale[i * GROUPS] * *(const LooseEight *)b_scale;
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) to[v] = fma(sum[i][v], all(scale[v]), to[v]);
  }
}

// Not inlined: the sums need all registers, and the compiler would spend some on what comes before.
#define PANEL_OF(rows)                                                                                              \
  static __attribute__((noinline)) void multiply_##rows(const Left *left, const Words (*right)[WIDTH],              \
                                                        const float *a_scale, const float *b_scale, Floats *sums) { \
    multiply_panel(left, rows, right, a_scale, b_scale, sums);                                                      \
  }
PANEL_OF(1)
PANEL_OF(2)
PANEL_OF(3)
PANEL_OF(4)
#if PANEL > 4
PANEL_OF(5)
PANEL_OF(6)
#endif

INLINE void multiply_rows(int rows, const Left *left, const Right *right, const float *a_scale, const float *b_scale,
                          Floats *sums) {
  for (int stripe = 0; stripe < STRIPES; ++stripe, b_scale += WIDTH, sums += WIDTH) switch (rows) {
      case 1: multiply_1(left, right->words[stripe], a_scale, b_scale, sums); break;
      case 2: multiply_2(left, right->words[stripe], a_scale, b_scale, sums); break;
      case 3: multiply_3(left, right->words[stripe], a_scale, b_scale, sums); break;
      case 4: multiply_4(left, right->words[stripe], a_scale, b_scale, sums); break;
#if PANEL > 4
      case 5: multiply_5(left, right->words[stripe], a_scale, b_scale, sums); break;
      case 6: multiply_6(left, right->words[stripe], a_scale, b_scale, sums); break;
#endif
    }
}

// -- results -------------------------------------------------------------------------------------------------------

#if OUT_DTYPE == F32
typedef float Out;
#else
typedef u16 Out;
#endif

INLINE void store_out(Out *to, Floats sums, int count) {
#if OUT_DTYPE == F32
  if (count >= LANES) *(LooseFloats *)to = sums;
  else for (int i = 0; i < count; ++i) to[i] = sums[i];
#else
  Halves halves = __builtin_convertvector(OUT_DTYPE == BF16 ? bf16_of(sums, 1) >> 16 : f16_of(sums), Halves);
  if (count >= LANES) *(LooseHalves *)to = halves;
  else for (int i = 0; i < count; ++i) to[i] = halves[i];
#endif
}

INLINE void many_rows(const Product *p, i64 row, int rows, i64 first) {
  Floats sums[ROWS][VECTORS];
  Right right[2];
  Left left;
  float b_scale[VECTORS + 8];
  const u8 *b_rows[COLUMNS];
  const Decoder a_decoder = decoder_of(A_CODES), b_decoder = decoder_of(B_CODES);
  rows_of(p->b, first, COLUMNS, b_rows);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = (Floats){0};
  for (int v = 0; v < VECTORS; ++v) decode_right(b_rows, 0, v, &b_decoder, &right[0]);
  for (i64 k = 0; k < K; k += CHUNK) {
    const i64 group = k / GROUP, chunk = k / CHUNK;
    for (int v = 0; v < VECTORS; ++v)
      b_scale[v] = p->b_scale[least(first + v * LANES, N - 1) / GROUP * (i64)GROUPS + group];
    // The next chunk of b is decoded between the panels: that takes place while their products queue up.
    int next = k + CHUNK < K ? 0 : VECTORS;
    for (int i = 0; i < rows; i += PANEL) {
      const int count = least(PANEL, rows - i);
      decode_left(p, row + i, count, k, &a_decoder, &left);
      multiply_rows(count, &left, &right[chunk % 2], p->a_scale + (row + i) * GROUPS + group, b_scale, sums[i]);
      for (; next < VECTORS && next * rows < VECTORS * (i + count); ++next)
        decode_right(b_rows, k + CHUNK, next, &b_decoder, &right[(chunk + 1) % 2]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < VECTORS; ++v)
      store_out((Out *)p->out + (row + i) * N + first + v * LANES, sums[i][v], least(LANES, N - first - v * LANES));
}

// -- few rows ------------------------------------------------------------------------------------------------------

// Elements n to n + BATCH - 1 of a row of the result.
INLINE void one_row_batch(const Product *p, i64 row, i64 n, const Decoder *a_decoder, const Decoder *b_decoder, float *results) {
  const u8 *a = p->a + row * K, *rows[BATCH];
  const float *a_scale = p->a_scale + row * GROUPS, *b_scale = p->b_scale + (n < N ? n : N - 1) / GROUP * GROUPS;
  rows_of(p->b, n, BATCH, rows);
  Floats sums[BATCH] = {{0}};
  for (i64 group = 0; group < GROUPS; ++group) {
    Floats partial[BATCH] = {{0}};
#pragma GCC unroll 4
    for (int step = 0; step < GROUP / LOAD; ++step) {
      const i64 at = group * GROUP + step * LOAD;
      Parts left;
      decode(load_codes(a + at), A_CODES, a_decoder, left);
#pragma GCC unroll 8
      for (int i = 0; i < BATCH; ++i) {
        Parts right;
        decode(load_codes(rows[i] + at), B_CODES, b_decoder, right);
        for (int part = 0; part < PARTS; ++part) partial[i] = multiply_add(partial[i], left[part], right[part]);
      }
    }
    const Floats scale = all(a_scale[group] * b_scale[group]);
#pragma GCC unroll 8
    for (int i = 0; i < BATCH; ++i) sums[i] = fma(partial[i], scale, sums[i]);
  }
  for (int i = 0; i < BATCH; ++i) results[i] = lane_sum(sums[i]);
}

INLINE void few_rows(const Product *p, i64 row, int rows, i64 first) {
  const Decoder a_decoder = decoder_of(A_CODES), b_decoder = decoder_of(B_CODES);
  const int columns = least(COLUMNS, N - first);
  for (int i = 0; i < rows; ++i) {
    union { float each[COLUMNS]; Floats vectors[VECTORS]; } results;
    for (int n = 0; n < columns; n += BATCH) one_row_batch(p, row + i, first + n, &a_decoder, &b_decoder, results.each + n);
    for (int v = 0; v * LANES < columns; ++v)
      store_out((Out *)p->out + (row + i) * N + first + v * LANES, results.vectors[v], columns - v * LANES);
  }
}

// -- the entry -----------------------------------------------------------------------------------------------------

void ENTRY(BINDING(const u8, a), BINDING(const u8, b), BINDING(const float, a_scale), BINDING(const float, b_scale),
           BINDING(Out, out), i32 rows, i32 workgroup) {
  const Product product = {a + a_offset, b + b_offset, a_scale + a_scale_offset, b_scale + b_scale_offset,
                           out + out_offset};
  const i64 tiles = (N + COLUMNS - 1) / COLUMNS, row = workgroup / tiles * ROWS, first = workgroup % tiles * COLUMNS;
  const int count = least(ROWS, rows - row);
  FloatMode mode = enter_ieee();
  if (rows <= FEW_ROWS) few_rows(&product, row, count, first);
  else many_rows(&product, row, count, first);
  leave_ieee(mode);
}
