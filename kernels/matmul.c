// Products on CPUs: out[m, n] = row m of a [rows, K] times row n of b [N, K], plus bias[n] if HAS_BIAS.
//
//   PLAIN undefined   8-bit floats, scaled in blocks: the sum over the groups g of K of a_scale[m, g] *
//                     b_scale[n / GROUP, g] times the product of group g.  The scales of a are [rows, GROUPS] or, in
//                     columns, [GROUPS, rows or rows rounded up to 4].
//   PLAIN defined     floats of that dtype, without scales; K is one group
//
//   few rows    lanes are places along K: BATCH rows of b stream past one row of a.
//   many rows   lanes are columns: a tile of COLUMNS rows of b is decoded and transposed, a chunk of K at a time, and
//               multiplied with one panel of rows of a after another.  The sums of a tile lie on the stack.
//               The next chunk of b is sent for meanwhile, some rows with each panel.
//
// A worker of IREE has 128 KiB of stack, of which ROWS = 128 and COLUMNS = 96 take 75.  A store of a vector takes as
// long as one and a half products, so nothing is stored that need not be; shuffles are free beside products (measured
// on Zen 4).  Pointers need only the alignment of their element.
//
// A workgroup takes one tile, or TILES where all rows fit into one.
//
// The macros that specialise this file come from lowering/matmul_kernel.py.

#include "cpu.h"
#include "vectors.h"

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

enum { ROW = 0, COLUMN_TMA = 1, COLUMN = 2 };

#define MIN2(a, b) ((a) < (b) ? (a) : (b))
// Elements along K of a decoded tile.
#define CHUNK (GROUP % (MOST_STEPS * DEPTH) == 0 ? MOST_STEPS * DEPTH : MIN2(GROUP, 32 * DEPTH))
#ifdef PLAIN
#define SCALED 0
#define GROUP K
#define A_CODES 0
#define B_CODES 0
#define A_SCALE_LAYOUT ROW
#include "plain.h"
#else
#define SCALED 1
#include "float8.h"
#endif

#define GROUPS (K / GROUP)
// From a scale of a to the one of the next row.
#define SCALE_STEP (!SCALED ? 0 : A_SCALE_LAYOUT == ROW ? GROUPS : 1)
#define STEPS (CHUNK / DEPTH)
#define VECTORS (COLUMNS / LANES)
#define STRIPES (VECTORS / WIDTH)
_Static_assert(VECTORS % WIDTH == 0 && CHUNK % LOAD == 0 && GROUP % CHUNK == 0, "tiles are made of whole panels");

typedef float Eight __attribute__((vector_size(32)));
typedef float LooseEight __attribute__((vector_size(32), aligned(4), may_alias));

// A value that is in a register from here on: compilers like to load it anew for each use.
INLINE Words once(Words a) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(a));
#endif
  return a;
}

// -- many rows -----------------------------------------------------------------------------------------------------

#if OUT_DTYPE == F32
typedef float Out;
#else
typedef u16 Out;
#endif

typedef struct {
  const u8 *a, *b;
  const float *a_scale, *b_scale;
  i64 scale_column;  // elements from a scale of a to the one of the next group
  const Out *bias;
  Out *out;
} Product;

INLINE const float *scale_of(const Product *p, i64 row, i64 group) {
  return p->a_scale + row * SCALE_STEP + group * (A_SCALE_LAYOUT == ROW ? 1 : p->scale_column);
}

INLINE const float *b_scale_of(const Product *p, i64 n, i64 group) { return p->b_scale + n / GROUP * GROUPS + group; }

INLINE const u8 *row_of(const u8 *matrix, i64 row) { return matrix + row * ((i64)K * BYTES); }

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
  for (int i = 0; i < count; ++i) rows[i] = row_of(b, n + i < N ? n + i : N - 1);
}

// Where among the steps of a chunk the left tile has a row's elements from DEPTH * n on.
INLINE int step_of(int n) {
  const int load = n / (LOAD / DEPTH), in_load = n % (LOAD / DEPTH);
  const Place place = place_of(in_load);
  return load * (LOAD / DEPTH) + place.part * (LOAD / DEPTH / PARTS) + place.word;
}

// Send for a chunk of rows `from` to `to` of b.
INLINE void prefetch_right(const u8 *const *rows, i64 k, int from, int to) {
  for (int i = from; i < to; ++i)
    for (int byte = 0; byte < CHUNK * BYTES; byte += 64) __builtin_prefetch(rows[i] + k * BYTES + byte);
}

// Vector v of a tile of b, a chunk of LANES rows.
INLINE void decode_right(const u8 *const *rows, i64 k, int v, const Decoder *decoder, Right *right) {
  rows += v * LANES;
#pragma GCC unroll 8
  for (int unit = 0; unit < CHUNK / UNIT; unit += SPAN) {
    Words quads[SPAN][4];
    load_quads(rows, (k + UNIT * unit) * BYTES, quads);
#pragma GCC unroll 4
    for (int span = 0; span < SPAN; ++span) {
      Words words[UNIT / DEPTH];
      column_words(quads[span], B_CODES, decoder, words);
#pragma GCC unroll 16
      for (int i = 0; i < UNIT / DEPTH; ++i)
        right->words[v / WIDTH][step_of((unit + span) * (UNIT / DEPTH) + i)][v % WIDTH] = words[i];
    }
  }
}

INLINE void decode_left(const Product *p, i64 row, int rows, i64 k, const Decoder *decoder, Left *left) {
  for (int i = 0; i < rows; ++i)
    for (int load = 0; load < CHUNK / LOAD; ++load) {
      Parts parts;
      row_words(row_of(p->a, row + i) + (k + load * LOAD) * BYTES, A_CODES, decoder, parts);
      for (int part = 0; part < PARTS; ++part)
        *(LooseWords *)&left->words[i][(load * PARTS + part) * (LOAD / DEPTH / PARTS)] = parts[part];
    }
}

// sums[i][v] += a_scale of row i * b_scale of vector v * (row i of the panel times the columns of vector v)
INLINE void multiply_panel(const Left *left, int rows, const Words (*right)[WIDTH], const float *a_scale,
                           const float *b_scale, Floats *sums) {
  Floats sum[PANEL][WIDTH] = {{{0}}};
  for (int step = 0; step < STEPS; ++step) {
    Words b[WIDTH];
    __builtin_prefetch(sums + step, 1);  // they are many, and not all in the first cache
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
  for (int i = 0; i < rows; ++i) {
    Floats *to = sums + i * VECTORS;
    const Eight scale = a_scale[i * (i64)SCALE_STEP] * *(const LooseEight *)b_scale;
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) to[v] = add_product(to[v], sum[i][v], all(scale[v]));
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

// The biases of `count` columns from n on, zeros after them.
INLINE Floats load_bias(const Product *p, i64 n, int count) {
  Floats bias = {0};
#if HAS_BIAS && OUT_DTYPE == F32
  for (int i = 0; i < LANES && i < count; ++i) bias[i] = p->bias[n + i];
#elif HAS_BIAS
  Halves halves = {0};
  for (int i = 0; i < LANES && i < count; ++i) halves[i] = p->bias[n + i];
  Words words = __builtin_convertvector(halves, Words);
  bias = OUT_DTYPE == BF16 ? floats_of(words << 16) : f16_to_floats(words);
#endif
  return bias;
}

// The biases of a tile's columns.
INLINE void load_biases(const Product *p, i64 first, Floats *biases) {
  for (int v = 0; v < VECTORS; ++v) biases[v] = load_bias(p, first + v * LANES, least(LANES, N - first - v * LANES));
}

INLINE Floats biased(Floats sums, Floats bias) { return HAS_BIAS ? sums + bias : sums; }

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
  Right right;
  Left left;
  float b_scale[VECTORS + 8];
  const u8 *b_rows[COLUMNS];
  const Decoder a_decoder = decoder_of(A_CODES), b_decoder = decoder_of(B_CODES);
  rows_of(p->b, first, COLUMNS, b_rows);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = (Floats){0};
  for (i64 k = 0; k < K; k += CHUNK) {
    const i64 group = k / GROUP;
    for (int v = 0; v < VECTORS; ++v) {
      b_scale[v] = SCALED ? *b_scale_of(p, least(first + v * LANES, N - 1), group) : 1.0f;
      decode_right(b_rows, k, v, &b_decoder, &right);
    }
    for (int i = 0; i < rows; i += PANEL) {
      const int count = least(PANEL, rows - i);
      // A few rows at a time: more would hold up the loads that are made meanwhile.
      prefetch_right(b_rows, k + CHUNK, COLUMNS * i / rows, COLUMNS * (i + count) / rows);
      decode_left(p, row + i, count, k, &a_decoder, &left);
      multiply_rows(count, &left, &right, scale_of(p, row + i, group), b_scale, sums[i]);
    }
  }
  Floats biases[VECTORS];
  load_biases(p, first, biases);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < VECTORS; ++v)
      store_out(p->out + (row + i) * N + first + v * LANES, biased(sums[i][v], biases[v]),
                least(LANES, N - first - v * LANES));
}

// -- few rows ------------------------------------------------------------------------------------------------------

// Elements n to n + BATCH - 1 of a row of the result.
INLINE void one_row_batch(const Product *p, i64 row, i64 n, const Decoder *a_decoder, const Decoder *b_decoder,
                          float *results) {
  const u8 *a = row_of(p->a, row), *rows[BATCH];
  rows_of(p->b, n, BATCH, rows);
  Floats sums[BATCH] = {{0}};
  for (i64 group = 0; group < GROUPS; ++group) {
    Floats partial[BATCH] = {{0}};
#pragma GCC unroll 4
    for (int step = 0; step < GROUP / LOAD; ++step) {
      const i64 at = (group * GROUP + step * LOAD) * BYTES;
      Parts left;
      row_words(a + at, A_CODES, a_decoder, left);
#pragma GCC unroll 8
      for (int i = 0; i < BATCH; ++i) {
        Parts right;
        row_words(rows[i] + at, B_CODES, b_decoder, right);
        for (int part = 0; part < PARTS; ++part) partial[i] = multiply_add(partial[i], left[part], right[part]);
      }
    }
    const Floats scale = all(SCALED ? *scale_of(p, row, group) * *b_scale_of(p, n < N ? n : N - 1, group) : 1.0f);
#pragma GCC unroll 8
    for (int i = 0; i < BATCH; ++i) sums[i] = add_product(sums[i], partial[i], scale);
  }
  for (int i = 0; i < BATCH; ++i) results[i] = lane_sum(sums[i]);
}

INLINE void few_rows(const Product *p, i64 row, int rows, i64 first) {
  const Decoder a_decoder = decoder_of(A_CODES), b_decoder = decoder_of(B_CODES);
  const int columns = least(COLUMNS, N - first);
  Floats biases[VECTORS];
  load_biases(p, first, biases);
  for (int i = 0; i < rows; ++i) {
    union { float each[COLUMNS]; Floats vectors[VECTORS]; } results;
    for (int n = 0; n < columns; n += BATCH)
      one_row_batch(p, row + i, first + n, &a_decoder, &b_decoder, results.each + n);
    for (int v = 0; v * LANES < columns; ++v)
      store_out(p->out + (row + i) * N + first + v * LANES, biased(results.vectors[v], biases[v]),
                columns - v * LANES);
  }
}

// -- the entry -----------------------------------------------------------------------------------------------------

#if HAS_BIAS
#define BIAS_BINDING BINDING(const Out, bias),
#define BIAS bias + bias_offset
#else
#define BIAS_BINDING
#define BIAS 0
#endif

#if SCALED
#define SCALE_BINDINGS BINDING(const float, a_scale), BINDING(const float, b_scale),
#define A_SCALE a_scale + a_scale_offset
#define B_SCALE b_scale + b_scale_offset
#else
#define SCALE_BINDINGS
#define A_SCALE &one
#define B_SCALE &one
#endif

void ENTRY(BINDING(const Element, a), BINDING(const Element, b), SCALE_BINDINGS BIAS_BINDING BINDING(Out, out),
           i32 rows, i32 workgroup) {
  const float one = 1;
  const i64 scale_column = A_SCALE_LAYOUT == COLUMN_TMA ? ((i64)rows + 3) / 4 * 4 : rows;
  const Product product = {(const u8 *)(a + a_offset), (const u8 *)(b + b_offset), A_SCALE, B_SCALE,
                           scale_column, BIAS, out + out_offset};
  const i64 across = (N + COLUMNS - 1) / COLUMNS, each = rows <= ROWS ? TILES : 1;
  const i64 row = workgroup * each / across * ROWS, begin = workgroup * each % across;
  const int count = least(ROWS, rows - row), end = least(begin + each, across);
  FloatMode mode = enter_ieee();
  for (i64 tile = begin; tile < end; ++tile) {
    if (rows <= FEW_ROWS) few_rows(&product, row, count, tile * COLUMNS);
    else many_rows(&product, row, count, tile * COLUMNS);
  }
  leave_ieee(mode);
}
