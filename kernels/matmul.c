// Products on CPUs: out[m, n] = row m of a [rows, K] times row n of b [N, K], plus bias[n] if HAS_BIAS; rounded, and
// residual[m, n] added, if HAS_RESIDUAL.
//
//   PLAIN undefined   8-bit floats with scales: the sum over the groups g of K of a_scale[m, g] *
//                     b_scale[n / B_ROWS, g] times the product of group g.  The scales of a are [rows, GROUPS] or, in
//                     columns, [GROUPS, rows or rows rounded up to 4].  WHOLE: K is one group, and the sum is scaled;
//                     ONE_A: by one scale for all rows of a.  Integers of 8 bits with whole rows of them: sums are exact.
//   PLAIN defined     floats of that dtype, without scales; K is one group
//   BITS defined too  b is packed integers of so many bits, whose scales are part of what they stand for
//
//   few rows    lanes are places along K: BATCH rows of b stream past one row of a.
//   many rows   lanes are columns: a tile of up to TILE rows of b is decoded and transposed, a chunk of K at a time,
//               and multiplied with one panel of rows of a after another.  The sums of a tile lie on the stack.
//               The next chunk of b is sent for meanwhile, some rows with each panel.
//
// A worker of IREE has 128 KiB of stack, of which ROWS = 128 and TILE = 96 take 75.  A store of a vector takes as
// long as one and a half products, so nothing is stored that need not be; shuffles are free beside products (measured
// on Zen 4).  Pointers need only the alignment of their element.
//
// A workgroup takes ROWS rows and SHARE columns, in whole tiles and one of the rest.
//
// The macros that specialise this file come from lowering/families/matmul/family.py.

#include "cpu.h"
#include "vectors.h"

// The most columns of a tile, which has a whole number of sixteens.
#define TILE 96
#define SIXTEENS(columns) (((columns) + 15) / 16)

// Sums of PANEL rows times WIDTH vectors fill the registers.
#if LANES == 16
#define PANEL 4
#define WIDTH 6
#define BATCH 8
#define SPREAD 1  // among 32 registers are enough to decode rows of a between products
#else
#define PANEL 6
#define WIDTH 2
#define BATCH 4
#define SPREAD 0
#endif

enum { ROW = 0, COLUMN_TMA = 1, COLUMN = 2 };
#define INTEGERS (A_CODES == 3)  // INT8

#define MIN2(a, b) ((a) < (b) ? (a) : (b))
// Elements along K of a decoded tile.
#define CHUNK (GROUP % (MOST_STEPS * DEPTH) == 0 ? MOST_STEPS * DEPTH : MIN2(GROUP, 32 * DEPTH))
#ifdef PLAIN
#define GROUP K
#define WHOLE 0
#define B_ROWS 1
#define A_CODES 0
#define B_CODES 0
#define A_SCALE_LAYOUT ROW
#ifdef BITS
#include "packed.h"
#else
#include "plain.h"
#endif
#define GROUPED 0
#else
#if INTEGERS
#include "int8.h"
#else
#include "float8.h"
#endif
#define GROUPED !WHOLE
#endif

#define GROUPS (K / GROUP)
// From a scale of a to the one of the next row.
#define SCALE_STEP (!GROUPED ? 0 : A_SCALE_LAYOUT == ROW ? GROUPS : 1)
#define STEPS (CHUNK / DEPTH)
// Steps at the end that are taken one row after the other.
#define LAST (SPREAD ? 4 : 0)
_Static_assert(CHUNK % LOAD == 0 && GROUP % CHUNK == 0, "tiles are made of whole loads, groups of whole tiles");

typedef float Eight __attribute__((vector_size(32)));
typedef float LooseEight __attribute__((vector_size(32), aligned(4), may_alias));

// A value that is in a register from here on: compilers like to load it anew for each use.
INLINE Words once(Words a) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(a));
#endif
  return a;
}

// No access to memory is moved past this.
INLINE void in_order(void) { __asm__ volatile("" : : : "memory"); }

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
  const Out *bias, *residual;
  Out *out;
#ifdef BITS
  Weights weights;
#endif
} Product;

// What a group's product is multiplied by where it has no scale of its own.
static const float ONE = 1;

INLINE const float *scale_of(const Product *p, i64 row, i64 group) {
  if (!GROUPED) return &ONE;
  return p->a_scale + row * SCALE_STEP + group * (A_SCALE_LAYOUT == ROW ? 1 : p->scale_column);
}

INLINE const float *b_scale_of(const Product *p, i64 n, i64 group) { return p->b_scale + n / B_ROWS * GROUPS + group; }

INLINE const u8 *row_of(const u8 *matrix, i64 row) { return matrix + row * ((i64)K * BYTES); }

// A panel of rows of a along a chunk of K, decoded.  Tiles of b are [stripe][step][vector], a stripe WIDTH vectors or,
// in a tile of fewer, all of them.
typedef struct {
  u32 words[PANEL][STEPS + LANES];
} Left;

INLINE int least(i64 a, i64 b) { return (int)(a < b ? a : b); }

#ifdef BITS
#define B_BYTES(k) CODE_BYTES(k)
#else
#define B_BYTES(k) ((k) * BYTES)
#endif

// The rows of b from n on; those beyond the last are the last.
INLINE void rows_of(const u8 *b, i64 n, int count, const u8 **rows) {
  for (int i = 0; i < count; ++i) rows[i] = b + (n + i < N ? n + i : N - 1) * B_BYTES((i64)K);
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
    for (int byte = 0; byte < B_BYTES(CHUNK); byte += 64) __builtin_prefetch(rows[i] + B_BYTES(k) + byte);
}

// Send for `rows` rows of a tile of results, to be written.
INLINE void prefetch_out(const Product *p, i64 row, int rows, i64 first, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < columns; n += 64 / sizeof(Out)) __builtin_prefetch(p->out + (row + i) * N + first + n, 1);
}

#ifndef BITS
// A chunk of LANES rows of b, every `width`th vector from `right` on.
INLINE void decode_right(const u8 *const *rows, i64 k, const Decoder *decoder, Words *right, int width) {
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
        right[step_of((unit + span) * (UNIT / DEPTH) + i) * width] = words[i];
    }
  }
}
#endif

// The panel to be multiplied next: a chunk of `rows` rows of a from `first` on, and where it is decoded to.
typedef struct {
  const u8 *first;
  int rows;
  const Decoder *decoder;
  Left *left;
} Next;

INLINE void decode_row(const Next *next, int i) {
  for (int load = 0; load < CHUNK / LOAD; ++load) {
    Parts parts;
    row_words(row_of(next->first, i) + load * LOAD * BYTES, A_CODES, next->decoder, parts);
    for (int part = 0; part < PARTS; ++part)
      *(LooseWords *)&next->left->words[i][(load * PARTS + part) * (LOAD / DEPTH / PARTS)] = parts[part];
  }
}

// sum + more * scale, or sum + more of integers.
INLINE Floats added(Floats sum, Floats more, Floats scale) {
#if INTEGERS
  return add_integers(sum, more);
#else
  return add_product(sum, more, scale);
#endif
}

INLINE float sum_of_lanes(Floats a) {
#if INTEGERS
  const Words words = bits_of(a);
  u32 sum = 0;
  for (int i = 0; i < LANES; ++i) sum += words[i];
  return float_of(sum);
#else
  return lane_sum(a);
#endif
}

// sums[v] += scale[v] * sum[v]
INLINE void add_scaled(const Floats *sum, Eight scale, int width, Floats *sums) {
#pragma GCC unroll 8
  for (int v = 0; v < width; ++v) sums[v] = floats_of(once(bits_of(added(sums[v], sum[v], all(scale[v])))));
  in_order();
}

// sums[i][v] += a_scale of row i * b_scale of vector v * (row i of the panel times the columns of vector v); the sums
// of a row come `stride` after those of the one before.
//
// Products wait where much is stored at once.  So the rows of the next panel are decoded apart, among the steps, and
// the last steps are taken one row after the other, so that the sums of one are stored while the next is multiplied.
INLINE void multiply_panel(int rows, int width, const Left *left, const Words *right, const float *a_scale,
                           const float *b_scale, Floats *sums, int stride, const Next *next) {
  const int parts = SPREAD ? PANEL : 1;
  Floats sum[PANEL][WIDTH] = {{{0}}};
  for (int part = 0, step = 0; part < parts; ++part) {
    for (; step < (STEPS - LAST) * (part + 1) / parts; ++step) {
      Words b[WIDTH];
      __builtin_prefetch(sums + step, 1);  // they are many, and not all in the first cache
#pragma GCC unroll 8
      for (int v = 0; v < width; ++v) b[v] = once(right[step * width + v]);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Words a = (Words){0} + left->words[i][step];
#pragma GCC unroll 8
        for (int v = 0; v < width; ++v) sum[i][v] = multiply_add(sum[i][v], a, b[v]);
      }
    }
    if (SPREAD && part < next->rows) decode_row(next, part);
  }
  in_order();
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int step = STEPS - LAST; step < STEPS; ++step) {
      const Words a = once((Words){0} + left->words[i][step]);
#pragma GCC unroll 8
      for (int v = 0; v < width; ++v) sum[i][v] = multiply_add(sum[i][v], a, once(right[step * width + v]));
    }
    add_scaled(sum[i], a_scale[i * (i64)SCALE_STEP] * *(const LooseEight *)b_scale, width, sums + i * stride);
  }
}

// Not inlined: the sums need all registers, and the compiler would spend some on what comes before.
#define MULTIPLY(rows, width)                                                                                      \
  static __attribute__((noinline, unused)) void multiply_##rows##_##width(                                         \
      const Left *left, const Words *right, const float *a_scale, const float *b_scale, Floats *sums, int stride,  \
      const Next *next) {                                                                                          \
    multiply_panel(rows, width, left, right, a_scale, b_scale, sums, stride, next);                                \
  }
#if LANES == 16
#define PANELS(OF) PANELS_OF(OF, 1) PANELS_OF(OF, 2) PANELS_OF(OF, 3) PANELS_OF(OF, 4) PANELS_OF(OF, 5) PANELS_OF(OF, 6)
#define PANELS_OF(OF, width) OF(1, width) OF(2, width) OF(3, width) OF(4, width)
#else
#define PANELS(OF) OF(1, 2) OF(2, 2) OF(3, 2) OF(4, 2) OF(5, 2) OF(6, 2)
#endif
PANELS(MULTIPLY)

INLINE void multiply_rows(int rows, int width, const Left *left, const Words *right, const float *a_scale,
                          const float *b_scale, Floats *sums, int stride, const Next *next) {
#define IF(r, w) \
  else if (width == w && rows == r) multiply_##r##_##w(left, right, a_scale, b_scale, sums, stride, next);
  if (0) {}
  PANELS(IF)
}

// -- results -------------------------------------------------------------------------------------------------------

// `count` elements of the dtype of the result, zeros after them.
INLINE Floats load_addends(const Out *from, int count) {
  Floats addends = {0};
#if OUT_DTYPE == F32
  for (int i = 0; i < LANES && i < count; ++i) addends[i] = from[i];
#else
  Halves halves = {0};
  for (int i = 0; i < LANES && i < count; ++i) halves[i] = from[i];
  Words words = __builtin_convertvector(halves, Words);
  addends = OUT_DTYPE == BF16 ? floats_of(words << 16) : f16_to_floats(words);
#endif
  return addends;
}

// As the dtype of the result has them.
INLINE Floats as_stored(Floats a) {
#if OUT_DTYPE == BF16
  return floats_of(bf16_of(a, 1) & 0xffff0000u);
#elif OUT_DTYPE == F16
  return f16_to_floats(f16_of(a));
#else
  return a;
#endif
}

// What finishes the sums of a tile's columns.
typedef struct {
  Floats scales[TILE / LANES], biases[TILE / LANES];
} Columns;

INLINE void load_columns(const Product *p, i64 first, int columns, Columns *to) {
  for (int v = 0; v * LANES < columns; ++v) {
    const i64 n = first + v * LANES;
    const int count = least(LANES, N - n);
#if HAS_BIAS
    to->biases[v] = load_addends(p->bias + n, count);
#endif
#if WHOLE
    for (int i = 0; i < LANES; ++i) to->scales[v][i] = p->b_scale[(n + MIN2(i, count - 1)) / B_ROWS];
#endif
  }
}

#if OUT_DTYPE == BF16 && BF16_PAIRS
// The instruction takes subnormal numbers for zeros.
INLINE Halves halves_of(Floats a) {
  Halves halves;
  u16 subnormal;
  __asm__("vfpclassps $0x20, %1, %0" : "=Yk"(subnormal) : "v"(a));
  if (subnormal) return __builtin_convertvector(bf16_of(a, 1) >> 16, Halves);
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(a));
  return halves;
}
#elif OUT_DTYPE == BF16
INLINE Halves halves_of(Floats a) { return __builtin_convertvector(bf16_of(a, 1) >> 16, Halves); }
#else
INLINE Halves halves_of(Floats a) { return __builtin_convertvector(f16_of(a), Halves); }
#endif

INLINE void store_out(Out *to, Floats sums, int count) {
#if OUT_DTYPE == F32
  if (count >= LANES) *(LooseFloats *)to = sums;
  else for (int i = 0; i < count; ++i) to[i] = sums[i];
#else
  Halves halves = halves_of(sums);
  if (count >= LANES) *(LooseHalves *)to = halves;
  else for (int i = 0; i < count; ++i) to[i] = halves[i];
#endif
}

// Store `count` results of row `row` from column n on, the tile's vector v, of their sums.
INLINE void finish(const Product *p, i64 row, i64 n, int count, Floats sums, const Columns *columns, int v) {
#if INTEGERS
  sums = __builtin_convertvector((Signed)sums, Floats);
#endif
#if WHOLE
  sums = sums * all(p->a_scale[ONE_A ? 0 : row]) * columns->scales[v];
#endif
#if BIAS_TWICE
  sums = as_stored(sums);
#endif
  if (HAS_BIAS) sums += columns->biases[v];
#if HAS_RESIDUAL
  sums = as_stored(sums) + load_addends(p->residual + row * N + n, count);
#endif
  store_out(p->out + row * N + n, sums, count);
}

// The panel after row i of `rows` and place k along K, if there is one: first of the next rows, then of the next chunk.
INLINE void advance(const Product *p, i64 row, int rows, int i, i64 k, Next *next) {
  const int at = i + PANEL < rows ? i + PANEL : 0;
  if (!at) k += CHUNK;
  next->rows = k < K ? least(PANEL, rows - at) : 0;
  next->first = row_of(p->a, row + at) + k * BYTES;
}

// A tile of `columns` columns, those past the last row of b among them.
INLINE void many_rows(const Product *p, i64 row, int rows, i64 first, int columns) {
  const int vectors = columns / LANES, width = MIN2(vectors, WIDTH);
  Floats sums[ROWS * (TILE / LANES)];
  Columns results;
  Words right[STEPS * (TILE / LANES)];
  Left lefts[2];
  float b_scale[TILE / LANES + 8];
  const u8 *b_rows[TILE];
  const Decoder a_decoder = decoder_of(A_CODES), b_decoder = decoder_of(B_CODES);
  Next next = {row_of(p->a, row), least(PANEL, rows), &a_decoder, lefts};
  for (int i = 0; i < next.rows; ++i) decode_row(&next, i);
  rows_of(p->b, first, columns, b_rows);
  for (int i = 0; i < rows * vectors; ++i) sums[i] = (Floats){0};
  for (i64 k = 0; k < K; k += CHUNK) {
    // The next chunk of this tile or the first of the next one.
    const i64 group = k / GROUP, ahead = k + CHUNK < K ? k + CHUNK : (i64)K * columns;
    for (int v = 0; v < vectors; ++v) {
      b_scale[v] = GROUPED ? *b_scale_of(p, least(first + v * LANES, N - 1), group) : 1.0f;
      Words *to = right + v / width * (STEPS * width) + v % width;
#ifdef BITS
      const i64 n = least(first + v * LANES, N - 1);
      decode_columns(b_rows + v * LANES, k, &p->weights, n, least(LANES, N - n), to, width);
#else
      decode_right(b_rows + v * LANES, k, &b_decoder, to, width);
#endif
    }
    for (int i = 0; i < rows; i += PANEL) {
      const int count = least(PANEL, rows - i);
      const Left *left = next.left;
      next.left = lefts + (left == lefts);
      advance(p, row, rows, i, k, &next);
      if (!SPREAD)
        for (int j = 0; j < next.rows; ++j) decode_row(&next, j);
      // A few rows at a time: more would hold up the loads that are made meanwhile.
      prefetch_right(b_rows, ahead, columns * i / rows, columns * (i + count) / rows);
      if (k + CHUNK == K) prefetch_out(p, row + i, count, first, columns);
      for (int v = 0; v < vectors; v += width, next.rows = 0)
        multiply_rows(count, width, left, right + v * STEPS, scale_of(p, row + i, group), b_scale + v,
                      sums + i * vectors + v, vectors, &next);
    }
  }
  load_columns(p, first, columns, &results);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v)
      finish(p, row + i, first + v * LANES, least(LANES, N - first - v * LANES), sums[i * vectors + v], &results, v);
}

// Not inlined: the stack holds the sums of one.
#define MANY_ROWS(sixteens)                                                                                            \
  static __attribute__((noinline, unused)) void many_rows_##sixteens(const Product *p, i64 row, int rows, i64 first) { \
    many_rows(p, row, rows, first, 16 * sixteens);                                                                     \
  }
MANY_ROWS(1) MANY_ROWS(2) MANY_ROWS(3) MANY_ROWS(4) MANY_ROWS(5) MANY_ROWS(6)

// Tiles of the sizes there are: whole ones, and what remains of a share and of the last one.
INLINE void tile_rows(const Product *p, i64 row, int rows, i64 first, int columns) {
  const int rest = SIXTEENS(SHARE) % 6, last_rest = SIXTEENS((N - 1) % SHARE + 1) % 6, sixteens = SIXTEENS(columns);
#define CASE(n) else if (sixteens == n && (n == 6 || n == rest || n == last_rest)) many_rows_##n(p, row, rows, first);
  if (0) {}
  CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
}

// -- few rows ------------------------------------------------------------------------------------------------------

// Elements n to n + BATCH - 1 of a row of the result.
INLINE void one_row_batch(const Product *p, i64 row, i64 n, const Decoder *a_decoder, const Decoder *b_decoder,
                          float *results) {
  const u8 *a = row_of(p->a, row), *rows[BATCH];
  rows_of(p->b, n, BATCH, rows);
#ifdef BITS
  n = n < N ? n : N - 1;
  multiply_row(a, rows, &p->weights, n, least(BATCH, N - n), a_decoder, results);
#else
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
    const Floats scale = all(GROUPED ? *scale_of(p, row, group) * *b_scale_of(p, n < N ? n : N - 1, group) : 1.0f);
#pragma GCC unroll 8
    for (int i = 0; i < BATCH; ++i) sums[i] = added(sums[i], partial[i], scale);
  }
  for (int i = 0; i < BATCH; ++i) results[i] = sum_of_lanes(sums[i]);
#endif
}

INLINE void few_rows(const Product *p, i64 row, int rows, i64 first, int columns) {
  const Decoder a_decoder = decoder_of(A_CODES), b_decoder = decoder_of(B_CODES);
  Columns results;
  load_columns(p, first, columns, &results);
  for (int i = 0; i < rows; ++i) {
    union { float each[TILE]; Floats vectors[TILE / LANES]; } sums;
    for (int n = 0; n < columns; n += BATCH)
      one_row_batch(p, row + i, first + n, &a_decoder, &b_decoder, sums.each + n);
    for (int v = 0; v * LANES < columns; ++v)
      finish(p, row + i, first + v * LANES, columns - v * LANES, sums.vectors[v], &results, v);
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

#if HAS_RESIDUAL
#define RESIDUAL_BINDING BINDING(const Out, residual),
#define RESIDUAL residual + residual_offset
#else
#define RESIDUAL_BINDING
#define RESIDUAL 0
#endif

#if defined(BITS) && HAS_ZERO
#define SCALE_BINDINGS BINDING(const Scale, scale), BINDING(const u8, zero),
#define WEIGHTS , {scale + scale_offset, zero + zero_offset}
#elif defined(BITS)
#define SCALE_BINDINGS BINDING(const Scale, scale),
#define WEIGHTS , {scale + scale_offset}
#else
#define WEIGHTS
#endif

#ifdef BITS
typedef u8 RightElement;
#define A_SCALE 0
#define B_SCALE 0
#elif !defined(PLAIN)
typedef Element RightElement;
#define SCALE_BINDINGS BINDING(const float, a_scale), BINDING(const float, b_scale),
#define A_SCALE a_scale + a_scale_offset
#define B_SCALE b_scale + b_scale_offset
#else
typedef Element RightElement;
#define SCALE_BINDINGS
#define A_SCALE 0
#define B_SCALE 0
#endif

void ENTRY(BINDING(const Element, a), BINDING(const RightElement, b), SCALE_BINDINGS BIAS_BINDING RESIDUAL_BINDING
           BINDING(Out, out), i32 rows, i32 workgroup) {
  const i64 scale_column = A_SCALE_LAYOUT == COLUMN_TMA ? ((i64)rows + 3) / 4 * 4 : rows;
  const Product product = {(const u8 *)(a + a_offset), (const u8 *)(b + b_offset), A_SCALE, B_SCALE,
                           scale_column, BIAS, RESIDUAL, out + out_offset WEIGHTS};
  const i64 shares = (N + SHARE - 1) / SHARE, row = workgroup / shares * ROWS, begin = workgroup % shares * SHARE;
  const i64 end = begin + SHARE < N ? begin + SHARE : N;
  const int count = least(ROWS, rows - row);
  FloatMode mode = enter_ieee();
  for (i64 first = begin; first < end; first += TILE) {
    const int columns = least(TILE, end - first);
    if (rows <= FEW_ROWS) few_rows(&product, row, count, first, columns);
    else tile_rows(&product, row, count, first, columns);
  }
  leave_ieee(mode);
}
