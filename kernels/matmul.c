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

// PANEL rows times WIDTH vectors of sums fill the registers.
#ifndef PANEL
#if LANES == 16
#define PANEL 4
#define WIDTH 6
#else
#define PANEL 6
#define WIDTH 2
#endif
#endif
#ifndef BATCH
#if LANES == 16
#define BATCH 8
#else
#define BATCH 4
#endif
#endif

#define MIN2(a, b) ((a) < (b) ? (a) : (b))
#define CHUNK MIN2(GROUP, 64 * DEPTH)      // elements along K of a decoded tile
#define CHUNK_WORDS (CHUNK / 4)
#define STEPS (CHUNK / DEPTH)
#define GROUPS (K / GROUP)
#define LOAD MIN2(GROUP, 4 * LANES)        // codes that are loaded at once along K
#define LOADS (CHUNK / LOAD)
#define STRIPES (COLUMNS / (WIDTH * LANES))  // of WIDTH vectors, in a tile of b

typedef u32 Quad __attribute__((vector_size(16), aligned(1), may_alias));
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
typedef u32 Eight __attribute__((vector_size(32)));
INLINE Eight join_quads(const u8 *a, const u8 *b) {
  const Quad x = *(const Quad *)a, y = *(const Quad *)b;
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return (Eight){x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3]};
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

// words[j], lane n: codes 4j .. 4j+3 of 16 codes of row n.
INLINE void transposed(const u8 *const *rows, i64 at, Words words[4]) {
  Words r[4];
  for (int i = 0; i < 4; ++i) r[i] = quads(rows + i, at);
  Words low01 = SHUFFLE(r[0], r[1], IN_QUADS(0, LANES, 1, LANES + 1)), high01 = SHUFFLE(r[0], r[1], IN_QUADS(2, LANES + 2, 3, LANES + 3));
  Words low23 = SHUFFLE(r[2], r[3], IN_QUADS(0, LANES, 1, LANES + 1)), high23 = SHUFFLE(r[2], r[3], IN_QUADS(2, LANES + 2, 3, LANES + 3));
  words[0] = SHUFFLE(low01, low23, IN_QUADS(0, 1, LANES, LANES + 1));
  words[1] = SHUFFLE(low01, low23, IN_QUADS(2, 3, LANES + 2, LANES + 3));
  words[2] = SHUFFLE(high01, high23, IN_QUADS(0, 1, LANES, LANES + 1));
  words[3] = SHUFFLE(high01, high23, IN_QUADS(2, 3, LANES + 2, LANES + 3));
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

INLINE Bytes chosen(Bytes low, Bytes high, Bytes which) {
  __asm__("vpermi2b %2, %1, %0" : "+v"(which) : "v"(low), "v"(high));
  return which;
}

#define WORD_OF(i, n) 4 * n + i, 64 + 4 * n + i, 4 * n + i + 1, 64 + 4 * n + i + 1
#define FOUR_WORDS_OF(i, n) WORD_OF(i, n), WORD_OF(i, (n + 1)), WORD_OF(i, (n + 2)), WORD_OF(i, (n + 3))
#define PAIRS_OF(i) \
  (Bytes) { FOUR_WORDS_OF(i, 0), FOUR_WORDS_OF(i, 4), FOUR_WORDS_OF(i, 8), FOUR_WORDS_OF(i, 12) }

// parts[p]: elements 2p and 2p+1 of each word of four.
INLINE void decode(Words words, int codes, const Decoder *decoder, Parts parts) {
  Bytes code = (Bytes)words, low = looked_up(code, decoder->low), high = looked_up(code, decoder->high);
  high |= code & 0x80;
  if (codes == E4M3FNUZ) {
    Bytes nan = (Bytes)(code == 0x80);
    low |= nan, high |= nan;
  }
  parts[0] = (Words)chosen(low, high, PAIRS_OF(0));
  parts[1] = (Words)chosen(low, high, PAIRS_OF(2));
}

INLINE Floats multiply_add(Floats sum, Words a, Words b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
typedef struct { char unused; } Decoder;

INLINE Decoder decoder_of(int codes) { return (Decoder){0}; }

// parts[p]: element p of each word of four.
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

// A chunk of the tile of b, [stripe][step][vector of the stripe], and its columns' scales, a lane for each vector.
typedef struct {
  Words words[STRIPES][STEPS][WIDTH];
  float scale[COLUMNS / LANES];
} Right;

typedef struct {
  u32 words[PANEL][STEPS + LANES];
} Left;

INLINE int least(i64 a, i64 b) { return (int)(a < b ? a : b); }

// The rows of b from n on; those beyond the last are the last.
INLINE void rows_of(const u8 *b, i64 n, int count, const u8 **rows) {
  for (int i = 0; i < count; ++i) rows[i] = b + (n + i < N ? n + i : N - 1) * (i64)K;
}

INLINE void decode_right(const Product *p, i64 first, i64 k, const Decoder *decoder, Right *right) {
  for (int v = 0; v < COLUMNS / LANES; ++v) {
    const u8 *rows[LANES];
    const i64 n = first + v * LANES;
    rows_of(p->b, n, LANES, rows);
    right->scale[v] = p->b_scale[(n < N ? n : N - 1) / GROUP * GROUPS + k / GROUP];
    for (int quad = 0; quad < CHUNK / 16; ++quad) {
      Words words[4];
      transposed(rows, k + 16 * quad, words);
      for (int i = 0; i < 4; ++i) {
        Parts parts;
        decode(words[i], B_CODES, decoder, parts);
        const int word = 4 * quad + i, step = word / (LOAD / 4) * (LOAD / DEPTH) + word % (LOAD / 4);
        for (int part = 0; part < PARTS; ++part)
          right->words[v / WIDTH][step + part * (LOAD / 4)][v % WIDTH] = parts[part];
      }
    }
    if (k + CHUNK < K)
      for (int i = 0; i < LANES; ++i) __builtin_prefetch(rows[i] + k + CHUNK);
  }
}

INLINE void decode_left(const Product *p, i64 row, int rows, i64 k, const Decoder *decoder, Left *left) {
  for (int i = 0; i < rows; ++i)
    for (int step = 0; step < LOADS; ++step) {
      Parts parts;
      decode(load_codes(p->a + (row + i) * (i64)K + k + step * LOAD), A_CODES, decoder, parts);
      for (int part = 0; part < PARTS; ++part) *(LooseWords *)&left->words[i][(step * PARTS + part) * (LOAD / 4)] = parts[part];
    }
}

// sums[i][v] += scale * (row i of the panel times the columns of vector v)
INLINE void multiply_panel(const Left *left, int rows, const Words (*right)[WIDTH], const float (*scale)[WIDTH],
                           Floats *sums) {
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
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) {
      Floats *to = sums + i * (COLUMNS / LANES) + v;
      *to = fma(sum[i][v], floats_of(once(bits_of(all(scale[i][v])))), *to);
    }
}

// Not inlined: the sums need all registers, and the compiler would spend some on what comes before.
static __attribute__((noinline)) void multiply_whole_panel(const Left *left, const Words (*right)[WIDTH],
                                                           const float (*scale)[WIDTH], Floats *sums) {
  multiply_panel(left, PANEL, right, scale, sums);
}

static __attribute__((noinline)) void multiply_one_row(const Left *left, const Words (*right)[WIDTH],
                                                       const float (*scale)[WIDTH], Floats *sums) {
  multiply_panel(left, 1, right, scale, sums);
}

INLINE void multiply_rows(const Product *p, i64 row, int rows, i64 k, const Decoder *decoder, const Right *right,
                          Floats *sums) {
  Left left;
  decode_left(p, row, rows, k, decoder, &left);
  for (int stripe = 0; stripe < STRIPES; ++stripe) {
    float scale[PANEL][WIDTH];
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < WIDTH; ++v)
        scale[i][v] = p->a_scale[(row + i) * GROUPS + k / GROUP] * right->scale[stripe * WIDTH + v];
    (rows == PANEL ? multiply_whole_panel : multiply_one_row)(&left, right->words[stripe], scale, sums + stripe * WIDTH);
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
  Floats sums[ROWS][COLUMNS / LANES];
  Right right;
  const Decoder a_decoder = decoder_of(A_CODES), b_decoder = decoder_of(B_CODES);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < COLUMNS / LANES; ++v) sums[i][v] = (Floats){0};
  for (i64 k = 0; k < K; k += CHUNK) {
    decode_right(p, first, k, &b_decoder, &right);
    int i = 0;
    for (; i + PANEL <= rows; i += PANEL) multiply_rows(p, row + i, PANEL, k, &a_decoder, &right, sums[i]);
    for (; i < rows; ++i) multiply_rows(p, row + i, 1, k, &a_decoder, &right, sums[i]);
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < COLUMNS / LANES; ++v)
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
    union { float each[COLUMNS]; Floats vectors[COLUMNS / LANES]; } results;
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
