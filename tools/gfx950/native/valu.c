// Lane-wise instructions: fetch the operands, run the operation on 64 lanes, write the result under EXEC.
//
// What an operation computes is a line of vop.def, vopc.def or vop3p.def.
#include "operands.h"

typedef struct {
  Source source[3];
  Lanes result, shadow;
  bool dirty;
  Context context;
} Call;

static const Lanes NOTHING;

static Rounding rounding_of(const Wave *w, Type type) {
  return (Rounding)(type == F32 ? w->mode & 3 : w->mode >> 2 & 3);
}

static int host_rounding(Rounding mode) {
  static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
  return modes[mode];
}

static void compute(const Operation *op, Call *c, const Lanes *const in[3], Lanes *out) {
  Wave *w = c->context.wave;
  const Rounding mode = rounding_of(w, (Type)(op->dst == NONE ? op->src[0] : op->dst));
  c->context.round16 = (int)(w->mode >> 2 & 3);
  if (mode != NEAREST_EVEN) fesetround(host_rounding(mode));
  op->lanewise(in[0], in[1], in[2], out, &c->context);
  if (mode != NEAREST_EVEN) fesetround(FE_TONEAREST);
}

// A source with its undefined bits changed in one of the ways of guess().
static void guess_lanes(const Source *s, int words, enum Guess how, Lanes *out) {
  for (int lane = 0; lane < LANES; ++lane) {
    if (words == 2) out->q[lane] = guess(s->value->q[lane], s->shadow.q[lane], how);
    else out->u[lane] = (u32)guess(s->value->u[lane], s->shadow.u[lane], how);
  }
}

static void run_otherwise(const Operation *op, Call *c, enum Guess how) {
  Lanes changed[3], other;
  u32 carry[LANES];
  const Lanes *in[3] = {&NOTHING, &NOTHING, &NOTHING};
  for (int i = 0; i < op->sources; ++i) {
    in[i] = c->source[i].value;
    if (!c->source[i].dirty) continue;
    guess_lanes(&c->source[i], words_of((Type)op->src[i]), how, &changed[i]);
    in[i] = &changed[i];
  }
  memcpy(carry, c->context.carry, sizeof carry);
  compute(op, c, in, &other);
  for (int i = 0; i < LANES; ++i) {
    if (words_of((Type)op->dst) == 2) c->shadow.q[i] |= other.q[i] ^ c->result.q[i];
    else c->shadow.u[i] |= other.u[i] ^ c->result.u[i];
    const u32 differs = (carry[i] ^ c->context.carry[i]) & 1;
    c->context.carry[i] = carry[i] | differs << 1;  // bit 1: undefined
  }
}

// Run `op` on fetched operands.
static void run(const Operation *op, Call *c) {
  const Lanes *in[3] = {&NOTHING, &NOTHING, &NOTHING};
  c->dirty = false;
  for (int i = 0; i < op->sources; ++i) in[i] = c->source[i].value, c->dirty |= c->source[i].dirty;
  compute(op, c, in, &c->result);
  if (!c->dirty) return;
  memset(&c->shadow, 0, sizeof c->shadow);
  for (enum Guess how = ALL_ZERO; how < GUESSES; ++how) run_otherwise(op, c, how);
}

// -- results --------------------------------------------------------------------------------------

static void scale_and_clamp(Machine *m, Wave *w, const Inst *in, Type type, u32 omod, bool clamp, Lanes *d) {
  static const float factor[] = {1.0f, 2.0f, 4.0f, 0.5f};
  if (!omod && !clamp) return;
  if (omod && type != F32 && type != F64 && type != F16)
    fail(m, w, in, ILLEGAL, 0, "an output modifier on a result that is no float");
  const bool nan_to_zero = w->mode >> 8 & 1;  // DX10_CLAMP
  for (int i = 0; i < LANES; ++i) {
    double x = type == F32 ? d->f[i] : type == F64 ? d->d[i] : half_value(d->u[i]);
    x *= factor[omod];
    if (clamp) x = isnan(x) ? (nan_to_zero ? 0.0 : x) : x < 0.0 ? 0.0 : x > 1.0 ? 1.0 : x;
    if (type == F32) d->f[i] = (float)x;
    else if (type == F64) d->d[i] = x;
    else d->u[i] = encode(HALF, x, NEAREST_EVEN, false);
  }
}

static void flush_results(const Wave *w, Type type, Lanes *d) {
  const bool flush32 = type == F32 && !(w->mode >> 5 & 1), flush16 = !(w->mode >> 7 & 1);
  if (!flush32 && !(flush16 && is_float(type))) return;
  for (int i = 0; i < LANES; ++i) {
    if (type == F32 && !(d->u[i] & 0x7f800000)) d->u[i] &= 0x80000000;
    if (type == F64 && !(d->q[i] & 0x7ffull << 52)) d->q[i] &= 1ull << 63;
    if ((type == F16 || type == F16K) && !(d->u[i] & 0x7c00)) d->u[i] &= 0x8000;
  }
}

// `width` bits of each lane at bit `at` of register `reg`, keeping the others or (not `keep`) zeroing them.
static void write_part(Machine *m, Wave *w, const Inst *in, u32 reg, int at, int width, bool keep, const Call *c,
                       u64 lanes) {
  const u32 mask = (u32)((1ull << width) - 1) << at;
  u32 value[LANES], shadow[LANES];
  if (keep) check_vgpr(m, w, in, reg);
  const bool dirty = c->dirty || (keep && w->undefined[reg]);
  for (int i = 0; i < LANES; ++i) {
    value[i] = (keep ? w->v[reg][i] & ~mask : 0) | (c->result.u[i] << at & mask);
    shadow[i] = (keep ? w->v_shadow[reg][i] & ~mask : 0) | (c->dirty ? c->shadow.u[i] << at & mask : 0);
  }
  write_vgpr(m, w, in, reg, value, dirty ? shadow : 0, lanes);
}

static void write_sdwa(Machine *m, Wave *w, const Inst *in, Call *c, u64 lanes) {
  const u32 select = in->literal >> 8 & 7, unused = in->literal >> 11 & 3;
  if (select == 6) {
    write_vgpr(m, w, in, in->dst, c->result.u, c->dirty ? c->shadow.u : 0, lanes);
    return;
  }
  const int width = select < 4 ? 8 : 16, at = select < 4 ? 8 * (int)select : 16 * ((int)select - 4);
  if (unused == 1) fail(m, w, in, ILLEGAL, 0, "SDWA with sign-extended padding is not implemented");
  write_part(m, w, in, in->dst, at, width, unused == 2, c, lanes);
}

static void write_result(Machine *m, Wave *w, const Inst *in, Type type, Call *c, u64 lanes) {
  const u32 *shadow = c->dirty ? c->shadow.u : 0;
  if (words_of(type) == 2) {
    u32 low[LANES], high[LANES], low_shadow[LANES], high_shadow[LANES];
    for (int i = 0; i < LANES; ++i) low[i] = (u32)c->result.q[i], high[i] = (u32)(c->result.q[i] >> 32);
    for (int i = 0; i < LANES; ++i) low_shadow[i] = (u32)c->shadow.q[i], high_shadow[i] = (u32)(c->shadow.q[i] >> 32);
    write_vgpr(m, w, in, in->dst, low, shadow ? low_shadow : 0, lanes);
    write_vgpr(m, w, in, in->dst + 1u, high, shadow ? high_shadow : 0, lanes);
  } else if (in->variant == SDWA) {
    write_sdwa(m, w, in, c, lanes);
  } else if (type == BYTE) {
    write_part(m, w, in, in->dst, 8 * (in->opsel >> 2 & 3), 8, true, c, lanes);
  } else if (is_half(type)) {
    const bool high = in->opsel >> 3 & 1, keep = high || type == U16K || type == F16K;
    write_part(m, w, in, in->dst, high ? 16 : 0, 16, keep, c, lanes);
  } else {
    write_vgpr(m, w, in, in->dst, c->result.u, shadow, lanes);
  }
}

static void write_mask(Machine *m, Wave *w, const Inst *in, const Call *c, u32 code, u64 lanes) {
  u64 mask = 0, shadow = 0;
  for (int i = 0; i < LANES; ++i)
    mask |= (u64)(c->context.carry[i] & 1) << i, shadow |= (u64)(c->context.carry[i] >> 1 & 1) << i;
  write_scalar64(m, w, in, code, mask & lanes, shadow & lanes);
}

// -- issue ----------------------------------------------------------------------------------------

static void fetch_all(Machine *m, Wave *w, const Inst *in, const Operation *op, u32 half, Call *c) {
  c->context.wave = w, c->context.inst = in, c->context.ulp = m->ulp, c->context.fnuz = m->fnuz;
  for (int i = 0; i < op->sources; ++i) fetch(m, w, in, i, (Type)op->src[i], half, exec_of(w), &c->source[i]);
}

static u64 written_lanes(const Wave *w, const Inst *in) {
  return in->variant == DPP ? dpp_lanes(w, in) & exec_of(w) : exec_of(w);
}

static void issue_valu(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Call c;
  fetch_all(m, w, in, op, 0, &c);
  run(op, &c);
  const Type type = (Type)op->dst;
  flush_results(w, type, &c.result);
  const bool sdwa = in->variant == SDWA;
  scale_and_clamp(m, w, in, type, sdwa ? in->literal >> 14 & 3 : in->omod,
                  !op->detail && (sdwa ? in->literal >> 13 & 1 : in->clamp), &c.result);
  write_result(m, w, in, type, &c, written_lanes(w, in));
}

// With a mask as a second result.
static void issue_carry(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Call c;
  fetch_all(m, w, in, op, 0, &c);
  run(op, &c);
  const u64 lanes = written_lanes(w, in);
  write_result(m, w, in, (Type)op->dst, &c, lanes);
  write_mask(m, w, in, &c, in->sdst, lanes);
}

// With a mask as the only one; V_CMPX writes EXEC too.
static void issue_compare(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Call c;
  fetch_all(m, w, in, op, 0, &c);
  run(op, &c);
  const u64 lanes = exec_of(w);
  write_mask(m, w, in, &c, in->sdst, lanes);
  if (op->detail) write_mask(m, w, in, &c, EXEC, lanes);
}

// A packed instruction is the plain one done for each half.
static void issue_packed(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Call halves[2];
  u32 value[LANES], shadow[LANES];
  const bool wide = !is_half((Type)op->dst);
  for (u32 half = 0; half < 2; ++half) {
    Call *c = &halves[half];
    fetch_all(m, w, in, op, half, c);
    run(op, c);
    flush_results(w, (Type)op->dst, &c->result);
    scale_and_clamp(m, w, in, (Type)op->dst, 0, !op->detail && in->clamp, &c->result);
  }
  for (u32 half = 0; wide && half < 2; ++half)
    write_vgpr(m, w, in, in->dst + half, halves[half].result.u, halves[half].dirty ? halves[half].shadow.u : 0,
               exec_of(w));
  if (wide) return;
  const bool dirty = halves[0].dirty || halves[1].dirty;
  for (int i = 0; i < LANES; ++i) {
    value[i] = (halves[0].result.u[i] & 0xffff) | halves[1].result.u[i] << 16;
    shadow[i] =
        (halves[0].dirty ? halves[0].shadow.u[i] & 0xffff : 0) | (halves[1].dirty ? halves[1].shadow.u[i] << 16 : 0);
  }
  write_vgpr(m, w, in, in->dst, value, dirty ? shadow : 0, exec_of(w));
}

// -- operations -----------------------------------------------------------------------------------

typedef u32 T_NONE, T_U32, T_B32, T_U16, T_U16K, T_U24, T_BOOL, T_BYTE;
typedef i32 T_I32, T_I16, T_I24;
typedef u64 T_U64;
typedef i64 T_I64;
typedef float T_F32, T_BF16;
typedef double T_F64, T_F16, T_F16K;

#define GET_NONE(lanes, i) 0
#define GET_U32(lanes, i) (lanes)->u[i]
#define GET_B32(lanes, i) (lanes)->u[i]
#define GET_I32(lanes, i) (lanes)->i[i]
#define GET_F32(lanes, i) (lanes)->f[i]
#define GET_U64(lanes, i) (lanes)->q[i]
#define GET_I64(lanes, i) (lanes)->l[i]
#define GET_F64(lanes, i) (lanes)->d[i]
#define GET_U16(lanes, i) ((lanes)->u[i] & 0xffff)
#define GET_I16(lanes, i) ((i32)(i16)(lanes)->u[i])
#define GET_F16(lanes, i) half_value((lanes)->u[i])
#define GET_BF16(lanes, i) bfloat_value((lanes)->u[i])
#define GET_U24(lanes, i) ((lanes)->u[i] & 0xffffff)
#define GET_I24(lanes, i) ((i32)((lanes)->u[i] << 8) >> 8)
#define GET_BOOL(lanes, i) (lanes)->u[i]

#define PUT_NONE(lanes, i, x) (void)(x)
#define PUT_U32(lanes, i, x) (lanes)->u[i] = (x)
#define PUT_B32(lanes, i, x) (lanes)->u[i] = (x)
#define PUT_I32(lanes, i, x) (lanes)->i[i] = (x)
#define PUT_F32(lanes, i, x) (lanes)->f[i] = (x)
#define PUT_U64(lanes, i, x) (lanes)->q[i] = (x)
#define PUT_I64(lanes, i, x) (lanes)->l[i] = (x)
#define PUT_F64(lanes, i, x) (lanes)->d[i] = (x)
#define PUT_U16(lanes, i, x) (lanes)->u[i] = (x) & 0xffff
#define PUT_U16K(lanes, i, x) (lanes)->u[i] = (x) & 0xffff
#define PUT_I16(lanes, i, x) (lanes)->u[i] = (u32)(x) & 0xffff
#define PUT_F16(lanes, i, x) (lanes)->u[i] = encode(HALF, x, (Rounding)x_->round16, false)
#define PUT_F16K(lanes, i, x) PUT_F16(lanes, i, x)
#define PUT_BYTE(lanes, i, x) (lanes)->u[i] = (x) & 0xff

#include "arithmetic.h"

// Pass one: a function for each line.
#define BODY(NAME, D, A, B, C, CARRY, ...)                                                                        \
  static void run_##NAME(const Lanes *restrict a_, const Lanes *restrict b_, const Lanes *restrict c_,            \
                         Lanes *restrict d_, Context *x_) {                                                       \
    (void)a_, (void)b_, (void)c_, (void)d_, (void)x_;                                                             \
    for (int i = 0; i < LANES; ++i) {                                                                             \
      const T_##A a = GET_##A(a_, i);                                                                             \
      const T_##B b = GET_##B(b_, i);                                                                             \
      const T_##C c = GET_##C(c_, i);                                                                             \
      T_##D d = 0;                                                                                                \
      u32 carry = 0;                                                                                              \
      (void)a, (void)b, (void)c;                                                                                  \
      __VA_ARGS__;                                                                                                \
      PUT_##D(d_, i, d);                                                                                          \
      if (CARRY) x_->carry[i] = carry;                                                                            \
    }                                                                                                             \
  }
#define V1(NAME, WORK, D, A, ...) BODY(NAME, D, A, NONE, NONE, 0, __VA_ARGS__)
#define V2(NAME, WORK, D, A, B, ...) BODY(NAME, D, A, B, NONE, 0, __VA_ARGS__)
#define V3(NAME, WORK, D, A, B, C, ...) BODY(NAME, D, A, B, C, 0, __VA_ARGS__)
#define VC(NAME, WORK, D, A, B, C, ...) BODY(NAME, D, A, B, C, 1, __VA_ARGS__)
#define CLAMPED2(NAME, WORK, D, A, B, ...) BODY(NAME, D, A, B, NONE, 0, __VA_ARGS__)
#define CLAMPED3(NAME, WORK, D, A, B, C, ...) BODY(NAME, D, A, B, C, 0, __VA_ARGS__)
#define COMPARE(NAME, X, A, B, ...) BODY(NAME, NONE, A, B, NONE, 1, carry = (__VA_ARGS__))
#define PACKED1(NAME, PLAIN, D, A, B, C)
#include "vop.def"
#include "vopc.def"
#include "vop3p.def"
#undef V1
#undef V2
#undef V3
#undef VC
#undef CLAMPED2
#undef CLAMPED3
#undef COMPARE
#undef PACKED1

// Pass two: the table.  A clamp of an integer operation is in its line (detail 1), that of a float one is general.
#define SOURCES(A, B, C) (C != NONE ? 3 : B != NONE ? 2 : A != NONE ? 1 : 0)
#define ROW(NAME, ISSUE, RUN, D, A, B, C, WORK, DETAIL) \
  {.name = #NAME,                                       \
   .issue = ISSUE,                                      \
   .lanewise = RUN,                                     \
   .dst = D,                                            \
   .src = {A, B, C},                                    \
   .work = WORK,                                        \
   .detail = DETAIL,                                    \
   .sources = SOURCES(A, B, C)},
#define V1(NAME, WORK, D, A, ...) ROW(NAME, issue_valu, run_##NAME, D, A, NONE, NONE, WORK, 0)
#define V2(NAME, WORK, D, A, B, ...) ROW(NAME, issue_valu, run_##NAME, D, A, B, NONE, WORK, 0)
#define V3(NAME, WORK, D, A, B, C, ...) ROW(NAME, issue_valu, run_##NAME, D, A, B, C, WORK, 0)
#define VC(NAME, WORK, D, A, B, C, ...) ROW(NAME, issue_carry, run_##NAME, D, A, B, C, WORK, 1)
#define CLAMPED2(NAME, WORK, D, A, B, ...) ROW(NAME, issue_valu, run_##NAME, D, A, B, NONE, WORK, 1)
#define CLAMPED3(NAME, WORK, D, A, B, C, ...) ROW(NAME, issue_valu, run_##NAME, D, A, B, C, WORK, 1)
#define COMPARE(NAME, X, A, B, ...) ROW(NAME, issue_compare, run_##NAME, NONE, A, B, NONE, VALU, X)
#define PACKED1(NAME, PLAIN, D, A, B, C) \
  ROW(NAME, issue_packed, run_##PLAIN, D, A, B, C, PACKED, D == U16 || D == I16)
const Operation vector_operations[] = {
#include "vop.def"
#include "vopc.def"
#include "vop3p.def"
    {0}};
