// Matrix instructions: D = A*B + C for one or several blocks, spread over the registers of all 64 lanes.
//
// An element of A is row i, column k of block b; the lanes of a block hold consecutive runs of k:
//   lane = i + M*(b + B*(k / run)), element k % run of it, where run = K*M*B / 64, packed from the low bits of the
// first register up; B is laid out alike with its column j for i.  Of D and C (32 bits each) lane j + N*group holds
// row i = 8*(r/4) + 4*group + r%4 for 32x32, 4*group + r for 16x16, r for 4x4, in registers that count blocks
// outermost.
// Sums are exact (in double) and rounded once: the hardware's order of additions is not documented, so results may
// differ from it in the last place.  EXEC does not matter.
#include "operands.h"

typedef enum { M_F32, M_F64, M_F16, M_BF16, M_I8, M_FP8, M_BF8, M_SELECTED } Element;
typedef struct { u8 rows, depth, blocks; Element a, b; bool scaled; } Shape;  // square: M = N = rows

// name, M = N, K, blocks, types of A and B, whether there are block scales
#define PRODUCTS(X)                                                             \
  X(V_MFMA_F32_32X32X1_2B_F32, 32, 1, 2, M_F32, M_F32, false)                   \
  X(V_MFMA_F32_16X16X1_4B_F32, 16, 1, 4, M_F32, M_F32, false)                   \
  X(V_MFMA_F32_4X4X1_16B_F32, 4, 1, 16, M_F32, M_F32, false)                    \
  X(V_MFMA_F32_32X32X2_F32, 32, 2, 1, M_F32, M_F32, false)                      \
  X(V_MFMA_F32_16X16X4_F32, 16, 4, 1, M_F32, M_F32, false)                      \
  X(V_MFMA_F64_16X16X4_F64, 16, 4, 1, M_F64, M_F64, false)                      \
  X(V_MFMA_F32_32X32X4_2B_F16, 32, 4, 2, M_F16, M_F16, false)                   \
  X(V_MFMA_F32_16X16X4_4B_F16, 16, 4, 4, M_F16, M_F16, false)                   \
  X(V_MFMA_F32_4X4X4_16B_F16, 4, 4, 16, M_F16, M_F16, false)                    \
  X(V_MFMA_F32_32X32X8_F16, 32, 8, 1, M_F16, M_F16, false)                      \
  X(V_MFMA_F32_16X16X16_F16, 16, 16, 1, M_F16, M_F16, false)                    \
  X(V_MFMA_F32_16X16X32_F16, 16, 32, 1, M_F16, M_F16, false)                    \
  X(V_MFMA_F32_32X32X16_F16, 32, 16, 1, M_F16, M_F16, false)                    \
  X(V_MFMA_F32_32X32X4_2B_BF16, 32, 4, 2, M_BF16, M_BF16, false)                \
  X(V_MFMA_F32_16X16X4_4B_BF16, 16, 4, 4, M_BF16, M_BF16, false)                \
  X(V_MFMA_F32_4X4X4_16B_BF16, 4, 4, 16, M_BF16, M_BF16, false)                 \
  X(V_MFMA_F32_32X32X8_BF16, 32, 8, 1, M_BF16, M_BF16, false)                   \
  X(V_MFMA_F32_16X16X16_BF16, 16, 16, 1, M_BF16, M_BF16, false)                 \
  X(V_MFMA_F32_16X16X32_BF16, 16, 32, 1, M_BF16, M_BF16, false)                 \
  X(V_MFMA_F32_32X32X16_BF16, 32, 16, 1, M_BF16, M_BF16, false)                 \
  X(V_MFMA_I32_32X32X4_2B_I8, 32, 4, 2, M_I8, M_I8, false)                      \
  X(V_MFMA_I32_16X16X4_4B_I8, 16, 4, 4, M_I8, M_I8, false)                      \
  X(V_MFMA_I32_4X4X4_16B_I8, 4, 4, 16, M_I8, M_I8, false)                       \
  X(V_MFMA_I32_32X32X16_I8, 32, 16, 1, M_I8, M_I8, false)                       \
  X(V_MFMA_I32_16X16X32_I8, 16, 32, 1, M_I8, M_I8, false)                       \
  X(V_MFMA_I32_16X16X64_I8, 16, 64, 1, M_I8, M_I8, false)                       \
  X(V_MFMA_I32_32X32X32_I8, 32, 32, 1, M_I8, M_I8, false)                       \
  X(V_MFMA_F32_16X16X32_FP8_FP8, 16, 32, 1, M_FP8, M_FP8, false)                \
  X(V_MFMA_F32_16X16X32_FP8_BF8, 16, 32, 1, M_FP8, M_BF8, false)                \
  X(V_MFMA_F32_16X16X32_BF8_FP8, 16, 32, 1, M_BF8, M_FP8, false)                \
  X(V_MFMA_F32_16X16X32_BF8_BF8, 16, 32, 1, M_BF8, M_BF8, false)                \
  X(V_MFMA_F32_32X32X16_FP8_FP8, 32, 16, 1, M_FP8, M_FP8, false)                \
  X(V_MFMA_F32_32X32X16_FP8_BF8, 32, 16, 1, M_FP8, M_BF8, false)                \
  X(V_MFMA_F32_32X32X16_BF8_FP8, 32, 16, 1, M_BF8, M_FP8, false)                \
  X(V_MFMA_F32_32X32X16_BF8_BF8, 32, 16, 1, M_BF8, M_BF8, false)                \
  X(V_MFMA_F32_16X16X128_F8F6F4, 16, 128, 1, M_SELECTED, M_SELECTED, false)     \
  X(V_MFMA_F32_32X32X64_F8F6F4, 32, 64, 1, M_SELECTED, M_SELECTED, false)       \
  X(V_MFMA_SCALE_F32_16X16X128_F8F6F4, 16, 128, 1, M_SELECTED, M_SELECTED, true) \
  X(V_MFMA_SCALE_F32_32X32X64_F8F6F4, 32, 64, 1, M_SELECTED, M_SELECTED, true)

#define INDEX(NAME, ...) OF_##NAME,
enum { PRODUCTS(INDEX) };
#define SHAPE(NAME, ROWS, DEPTH, BLOCKS, A, B, SCALED) {ROWS, DEPTH, BLOCKS, A, B, SCALED},
static const Shape SHAPES[] = {PRODUCTS(SHAPE)};

enum { LARGEST = 32 * 32 * 2 };

typedef struct {
  const Shape *shape;
  u32 bits[2];                       // of an element of A and B
  Format format[2];                  // where they are small floats
  double a[32 * 128 * 2], b[32 * 128 * 2];  // [block][row or column][k]
  double c[LARGEST];                 // [block][row][column]
} Product;

static u32 run_length(const Shape *s) { return (u32)s->depth * s->rows * s->blocks / LANES; }

// -- elements -------------------------------------------------------------------------------------

// CBSZ and BLGP name the element types of ..._F8F6F4.
static const Format SELECTED[] = {
    {4, 3, 7, FN}, {5, 2, 15, IEEE}, {2, 3, 1, FINITE}, {3, 2, 3, FINITE}, {2, 1, 1, FINITE}};

static u32 width(Format f) { return (u32)(1 + f.exponent + f.mantissa); }

static void choose_format(Machine *m, Wave *w, const Inst *in, Product *p, int which) {
  static const u32 bits[] = {32, 64, 16, 16, 8, 8, 8};
  const Element e = which ? p->shape->b : p->shape->a;
  const u32 selector = which ? in->neg : in->abs;
  if (e == M_SELECTED) {
    if (selector > 4) fail(m, w, in, ILLEGAL, 0, "there is no element type %u", selector);
    p->format[which] = SELECTED[selector], p->bits[which] = width(SELECTED[selector]);
    return;
  }
  if (selector || in->opsel)
    fail(m, w, in, ILLEGAL, 0, "the broadcasts of a matrix instruction (CBSZ, ABID, BLGP) are not implemented");
  p->bits[which] = bits[e];
  if (e == M_F16) p->format[which] = HALF;
  if (e == M_BF16) p->format[which] = BFLOAT;
  if (e == M_FP8) p->format[which] = m->fnuz ? E4M3FNUZ : E4M3FN;
  if (e == M_BF8) p->format[which] = m->fnuz ? E5M2FNUZ : E5M2;
}

static double element_value(Element e, Format f, u64 bits) {
  switch (e) {
    case M_F64: return bits_double(bits);
    case M_F32: return (double)bits_float((u32)bits);
    case M_I8: return (i8)bits;
    case M_BF16: return (double)bfloat_value((u32)bits);
    default: return decode(f, (u32)bits);
  }
}

// Element `index` of `bits` each, from the registers on.
static u64 packed_bits(const Wave *w, u32 reg, u32 lane, u32 index, u32 bits) {
  const u32 at = index * bits, word = at / 32, shift = at % 32;
  u64 value = w->v[reg + word][lane];
  if (shift + bits > 32) value |= (u64)w->v[reg + word + 1][lane] << 32;
  return bits == 64 ? value : value >> shift & ((1ull << bits) - 1);
}

// A lane's block scale: one exponent for the values it holds.
static double lane_scale(Machine *m, Wave *w, const Inst *in, int which, u32 lane) {
  const u32 code = in->scale[which], byte = (in->opsel >> which & 1) | (in->opsel_hi >> which & 1) << 1;
  u32 shadow, word;
  if (code >= VGPR) check_vgpr(m, w, in, code - VGPR), word = w->v[code - VGPR][lane];
  else word = read_scalar(m, w, in, code, &shadow);
  const u32 exponent = word >> 8 * byte & 255;
  return exponent == 255 ? NAN : ldexp(1.0, (int)exponent - 127);
}

static void load_operand(Machine *m, Wave *w, const Inst *in, Product *p, int which, double *out) {
  const Shape *s = p->shape;
  const u32 run = run_length(s), reg = in->src[which] - VGPR + (in->acc >> which & 1 ? ACC : 0u);
  const Element e = which ? s->b : s->a;
  for (u32 lane = 0; lane < LANES; ++lane) {
    const u32 row = lane % s->rows, block = lane / s->rows % s->blocks, first = lane / s->rows / s->blocks * run;
    const double scale = s->scaled ? lane_scale(m, w, in, which, lane) : 1.0;
    double *to = out + ((u64)block * s->rows + row) * s->depth + first;
    for (u32 k = 0; k < run; ++k)
      to[k] = element_value(e, p->format[which], packed_bits(w, reg, lane, k, p->bits[which])) * scale;
  }
}

// -- D and C --------------------------------------------------------------------------------------

static u32 words_of_result(const Shape *s) { return s->a == M_F64 ? 2 : 1; }
static u32 results_per_lane(const Shape *s) { return (u32)s->rows * s->rows * s->blocks / LANES; }

// Where result r of a lane lies: an index into c.
static u32 result_index(const Shape *s, u32 lane, u32 r) {
  const u32 n = s->rows, per_block = n * n / LANES;
  if (n == 4) return lane / 4 * 16 + r * 4 + lane % 4;
  const u32 group = lane / n, groups = LANES / n, block = r / per_block, of_block = r % per_block;
  const u32 row = s->a == M_F64 ? of_block * groups + group : of_block / 4 * 4 * groups + 4 * group + of_block % 4;
  return (block * n + row) * n + lane % n;
}

static bool accumulates_integers(const Shape *s) { return s->a == M_I8; }

static double result_value(const Shape *s, u64 bits) {
  return s->a == M_F64             ? bits_double(bits)
         : accumulates_integers(s) ? (double)(i32)bits
                                   : (double)bits_float((u32)bits);
}

static u64 result_bits(const Shape *s, double x) {
  return s->a == M_F64 ? double_bits(x) : accumulates_integers(s) ? (u32)(i64)x : float_bits((float)x);
}

static void load_accumulator(Machine *m, Wave *w, const Inst *in, Product *p) {
  const Shape *s = p->shape;
  const u32 code = in->src[2], words = words_of_result(s);
  u64 shadow, constant = 0;
  if (code < VGPR)
    constant = words == 2 ? read_scalar64(m, w, in, code, F64, &shadow) : read_scalar(m, w, in, code, (u32[1]){0});
  const u32 reg = code - VGPR + (in->acc & 4 ? ACC : 0u);
  for (u32 r = 0; r < results_per_lane(s); ++r)
    for (u32 lane = 0; lane < LANES; ++lane)
      p->c[result_index(s, lane, r)] =
          result_value(s, code < VGPR ? constant : packed_bits(w, reg, lane, r, 32 * words));
}

static void store_result(Machine *m, Wave *w, const Inst *in, const Product *p, bool undefined) {
  const Shape *s = p->shape;
  const u32 words = words_of_result(s), reg = in->dst + (in->acc & 4 ? ACC : 0u);
  u32 value[2][LANES], shadow[LANES];
  memset(shadow, 0xff, sizeof shadow);
  for (u32 r = 0; r < results_per_lane(s); ++r) {
    for (u32 lane = 0; lane < LANES; ++lane) {
      const u64 bits = result_bits(s, p->c[result_index(s, lane, r)]);
      value[0][lane] = (u32)bits, value[1][lane] = (u32)(bits >> 32);
    }
    for (u32 i = 0; i < words; ++i)
      write_vgpr(m, w, in, reg + r * words + i, value[i], undefined ? shadow : 0, ~0ull);
  }
}

// -- the product ----------------------------------------------------------------------------------

static void multiply(Product *p) {
  const u32 n = p->shape->rows, depth = p->shape->depth;
  double columns[128 * 32];
  for (u32 block = 0; block < p->shape->blocks; ++block) {
    const double *a = p->a + (u64)block * n * depth, *b = p->b + (u64)block * n * depth;
    double *c = p->c + (u64)block * n * n;
    for (u32 j = 0; j < n; ++j)
      for (u32 k = 0; k < depth; ++k) columns[k * n + j] = b[j * depth + k];
    for (u32 i = 0; i < n; ++i)
      for (u32 k = 0; k < depth; ++k)
        for (u32 j = 0; j < n; ++j) c[i * n + j] += a[i * depth + k] * columns[k * n + j];
  }
}

static bool any_undefined(Machine *m, Wave *w, const Inst *in, u32 code, bool accumulation, u32 count) {
  bool undefined = false;
  if (code < VGPR) return false;
  for (u32 i = 0; i < count; ++i) {
    const u32 reg = code - VGPR + (accumulation ? ACC : 0u) + i;
    check_vgpr(m, w, in, reg);
    undefined |= w->undefined[reg] != 0;
  }
  return undefined;
}

static void issue_matrix(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  static _Thread_local Product p;
  const Shape *s = p.shape = &SHAPES[op->detail];
  bool undefined = false;
  for (int which = 0; which < 2; ++which) {
    if (in->src[which] < VGPR)
      fail(m, w, in, ILLEGAL, 0, "the operands of a matrix instruction are vector registers");
    choose_format(m, w, in, &p, which);
    undefined |=
        any_undefined(m, w, in, in->src[which], in->acc >> which & 1, (run_length(s) * p.bits[which] + 31) / 32);
  }
  undefined |= any_undefined(m, w, in, in->src[2], in->acc & 4, results_per_lane(s) * words_of_result(s));
  load_operand(m, w, in, &p, 0, p.a);
  load_operand(m, w, in, &p, 1, p.b);
  load_accumulator(m, w, in, &p);
  multiply(&p);
  store_result(m, w, in, &p, undefined);
}

// -- operations -----------------------------------------------------------------------------------

#define ROW(NAME, ...) {.name = #NAME, .issue = issue_matrix, .work = MATRIX, .detail = OF_##NAME},
const Operation matrix_operations[] = {PRODUCTS(ROW) {0}};
