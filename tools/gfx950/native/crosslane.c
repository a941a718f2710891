// Vector instructions that move whole lanes, or whose operands do not fit the pattern of vop.def.
#include "operands.h"

static u32 first_lane(const Wave *w) { return exec_of(w) ? (u32)__builtin_ctzll(exec_of(w)) : 0; }

static void issue_readfirstlane(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  Source s;
  fetch(m, w, in, 0, U32, 0, ~0ull, &s);
  const u32 lane = first_lane(w);
  write_scalar(m, w, in, in->dst, s.value->u[lane], s.dirty ? s.shadow.u[lane] : 0);
}

static u32 lane_operand(Machine *m, Wave *w, const Inst *in, int which) {
  u32 shadow;
  const u32 lane = read_scalar(m, w, in, in->src[which], &shadow);
  if (shadow && (m->checks & CHECK_UNDEFINED))
    fail(m, w, in, UNDEFINED, 0, "a lane number depends on a value nobody defined");
  return lane % LANES;
}

static void issue_readlane(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  Source s;
  fetch(m, w, in, 0, U32, 0, ~0ull, &s);
  const u32 lane = lane_operand(m, w, in, 1);
  write_scalar(m, w, in, in->dst, s.value->u[lane], s.dirty ? s.shadow.u[lane] : 0);
}

static void issue_writelane(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  u32 value[LANES], shadows[LANES], shadow;
  value[0] = read_scalar(m, w, in, in->src[0], &shadow);
  const u32 lane = lane_operand(m, w, in, 1);
  value[lane] = value[0], shadows[lane] = shadow;
  write_vgpr(m, w, in, in->dst, value, shadow ? shadows : 0, 1ull << lane);
}

// The odd blocks of `block` lanes of one register change places with the even blocks of the other.
static void issue_permlane_swap(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  const u32 a = in->dst, b = in->src[0] - VGPR, block = op->detail;
  check_vgpr(m, w, in, a), check_vgpr(m, w, in, b);
  u32 value[2][LANES], shadow[2][LANES];
  for (u32 i = 0; i < LANES; ++i) {
    const bool odd = i / block % 2;
    const u32 from_a = odd ? b : a, a_lane = odd ? i - block : i;
    const u32 from_b = odd ? b : a, b_lane = odd ? i : i + block;
    value[0][i] = w->v[from_a][a_lane], shadow[0][i] = w->v_shadow[from_a][a_lane];
    value[1][i] = w->v[from_b][b_lane], shadow[1][i] = w->v_shadow[from_b][b_lane];
  }
  const bool dirty = w->undefined[a] || w->undefined[b];
  write_vgpr(m, w, in, a, value[0], dirty ? shadow[0] : 0, exec_of(w));
  write_vgpr(m, w, in, b, value[1], dirty ? shadow[1] : 0, exec_of(w));
}

static void issue_swap(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  const u32 a = in->dst, b = in->src[0] - VGPR;
  check_vgpr(m, w, in, a), check_vgpr(m, w, in, b);
  u32 value[LANES], shadow[LANES];
  memcpy(value, w->v[a], sizeof value), memcpy(shadow, w->v_shadow[a], sizeof shadow);
  const bool dirty = w->undefined[a] != 0;
  write_vgpr(m, w, in, a, w->v[b], w->undefined[b] ? w->v_shadow[b] : 0, exec_of(w));
  write_vgpr(m, w, in, b, value, dirty ? shadow : 0, exec_of(w));
}

enum Accumulation { ACC_READ, ACC_WRITE, ACC_MOVE };

// Moves to, from and between accumulation registers.
static void issue_accumulation(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Source s;
  if (op->detail == ACC_WRITE && in->src[0] < VGPR) {
    u32 shadow, value[LANES], shadows[LANES];
    const u32 scalar = read_scalar(m, w, in, in->src[0], &shadow);
    for (int i = 0; i < LANES; ++i) value[i] = scalar, shadows[i] = shadow;
    write_vgpr(m, w, in, in->dst + ACC, value, shadow ? shadows : 0, exec_of(w));
    return;
  }
  const u32 from = in->src[0] - VGPR + (op->detail == ACC_WRITE ? 0u : ACC);
  fetch_registers(m, w, in, from, 1, exec_of(w), &s);
  write_vgpr(m, w, in, in->dst + (op->detail == ACC_READ ? 0u : ACC), s.value->u, s.dirty ? s.shadow.u : 0,
             exec_of(w));
}

// Each half of the result is either half of one operand.
static void issue_packed_move(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  Source s[2];
  Inst each = *in;
  for (int half = 0; half < 2; ++half) {
    each.opsel_hi = each.opsel;
    each.neg = each.abs = 0;
    fetch(m, w, &each, half, U32, (u32)half, exec_of(w), &s[half]);
  }
  const Lanes low = *s[0].value, high = *s[1].value;
  write_vgpr(m, w, in, in->dst, low.u, s[0].dirty ? s[0].shadow.u : 0, exec_of(w));
  write_vgpr(m, w, in, in->dst + 1u, high.u, s[1].dirty ? s[1].shadow.u : 0, exec_of(w));
}

enum Mix { TO_F32, TO_LOW_HALF, TO_HIGH_HALF };

// An operand of V_FMA_MIX: float32, or either half as float16 (op_sel_hi says that, op_sel which).
static double mixed(const Inst *in, int which, u32 bits) {
  const bool half = in->opsel_hi >> which & 1;
  double x = half ? half_value(in->opsel >> which & 1 ? bits >> 16 : bits) : (double)bits_float(bits);
  if (in->abs >> which & 1) x = fabs(x);
  return in->neg >> which & 1 ? -x : x;
}

static void issue_mix(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Source s[3];
  Inst plain = *in;
  u32 value[LANES], shadow[LANES];
  plain.encoding = VOP3, plain.neg = plain.abs = plain.opsel = 0;
  for (int k = 0; k < 3; ++k)
    fetch(m, w, &plain, k, in->opsel_hi >> k & 1 ? F16 : F32, 0, exec_of(w), &s[k]);
  check_vgpr(m, w, in, in->dst);
  for (int i = 0; i < LANES; ++i) {
    const double a = mixed(in, 0, s[0].value->u[i]), b = mixed(in, 1, s[1].value->u[i]),
                 c = mixed(in, 2, s[2].value->u[i]);
    float d = fmaf((float)a, (float)b, (float)c);
    if (in->clamp) d = isnan(d) ? (w->mode >> 8 & 1 ? 0.0f : d) : fminf(fmaxf(d, 0.0f), 1.0f);
    const u32 half = encode(HALF, (double)d, (Rounding)(w->mode >> 2 & 3), false), old = w->v[in->dst][i];
    value[i] = op->detail == TO_F32        ? float_bits(d)
               : op->detail == TO_LOW_HALF ? (old & 0xffff0000) | half
                                           : (old & 0xffff) | half << 16;
    bool undefined = false;
    for (int k = 0; k < 3; ++k) undefined |= s[k].dirty && s[k].shadow.u[i];
    const u32 kept = op->detail == TO_F32 ? 0 : op->detail == TO_LOW_HALF ? 0xffff0000 : 0xffff;
    shadow[i] = (undefined ? ~kept : 0) | (w->v_shadow[in->dst][i] & kept);
  }
  write_vgpr(m, w, in, in->dst, value, shadow, exec_of(w));
}

// Dot products of packed small operands, added to a third.
enum Dot { DOT2_F16, DOT2_BF16, DOT2C_BF16, DOT2_I16, DOT2_U16, DOT4_I8, DOT4_U8, DOT8_I4, DOT8_U4 };

static i64 part_of(u32 word, int k, int width, bool sign) {
  const u32 up = word << (32 - width * (k + 1));
  return sign ? (i64)((i32)up >> (32 - width)) : (i64)(up >> (32 - width));
}

static float low_half(u32 word) { return (float)half_value(word); }
static float high_half(u32 word) { return (float)half_value(word >> 16); }

static u32 dotted(enum Dot kind, u32 a, u32 b, u32 c, bool clamp) {
  if (kind == DOT2_F16)
    return float_bits(fmaf(high_half(a), high_half(b), fmaf(low_half(a), low_half(b), bits_float(c))));
  if (kind == DOT2C_BF16)
    return float_bits(
        fmaf(bfloat_value(a >> 16), bfloat_value(b >> 16), fmaf(bfloat_value(a), bfloat_value(b), bits_float(c))));
  if (kind == DOT2_BF16)
    return float_bits(fmaf(bfloat_value(a >> 16), bfloat_value(b >> 16), bfloat_value(a) * bfloat_value(b)) +
                      bits_float(c));
  const int width = kind == DOT2_I16 || kind == DOT2_U16 ? 16 : kind == DOT4_I8 || kind == DOT4_U8 ? 8 : 4;
  const bool sign = kind == DOT2_I16 || kind == DOT4_I8 || kind == DOT8_I4;
  i64 sum = sign ? (i64)(i32)c : (i64)c;
  for (int k = 0; k < 32 / width; ++k) sum += part_of(a, k, width, sign) * part_of(b, k, width, sign);
  if (!clamp) return (u32)sum;
  const i64 low = sign ? INT32_MIN : 0, high = sign ? INT32_MAX : 0xffffffffll;
  return (u32)(sum < low ? low : sum > high ? high : sum);
}

static void issue_dot(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Source s[3];
  Inst plain = *in;
  u32 value[LANES], shadow[LANES];
  plain.encoding = VOP3, plain.opsel = 0;
  if (plain.neg | plain.abs) fail(m, w, in, ILLEGAL, 0, "sign modifiers of a dot product are not implemented");
  for (int k = 0; k < 3; ++k) fetch(m, w, &plain, k, U32, 0, exec_of(w), &s[k]);
  for (int i = 0; i < LANES; ++i) {
    value[i] = dotted((enum Dot)op->detail, s[0].value->u[i], s[1].value->u[i], s[2].value->u[i], in->clamp);
    bool undefined = false;
    for (int k = 0; k < 3; ++k) undefined |= s[k].dirty && s[k].shadow.u[i];
    shadow[i] = undefined ? ~0u : 0;
  }
  write_vgpr(m, w, in, in->dst, value, shadow, exec_of(w));
}

#define SPECIAL(NAME, ISSUE, WORK, DETAIL) {.name = #NAME, .issue = ISSUE, .work = WORK, .detail = DETAIL},
const Operation cross_lane_operations[] = {
    SPECIAL(V_READFIRSTLANE_B32, issue_readfirstlane, CROSS_LANE, 0)
    SPECIAL(V_READLANE_B32, issue_readlane, CROSS_LANE, 0)
    SPECIAL(V_WRITELANE_B32, issue_writelane, CROSS_LANE, 0)
    SPECIAL(V_PERMLANE16_SWAP_B32, issue_permlane_swap, CROSS_LANE, 16)
    SPECIAL(V_PERMLANE32_SWAP_B32, issue_permlane_swap, CROSS_LANE, 32)
    SPECIAL(V_SWAP_B32, issue_swap, VALU, 0)
    SPECIAL(V_ACCVGPR_READ, issue_accumulation, VALU, ACC_READ)
    SPECIAL(V_ACCVGPR_WRITE, issue_accumulation, VALU, ACC_WRITE)
    SPECIAL(V_ACCVGPR_MOV_B32, issue_accumulation, VALU, ACC_MOVE)
    SPECIAL(V_PK_MOV_B32, issue_packed_move, PACKED, 0)
    SPECIAL(V_MAD_MIX_F32, issue_mix, VALU, TO_F32)
    SPECIAL(V_MAD_MIXLO_F16, issue_mix, VALU, TO_LOW_HALF)
    SPECIAL(V_MAD_MIXHI_F16, issue_mix, VALU, TO_HIGH_HALF)
    SPECIAL(V_DOT2_F32_F16, issue_dot, VALU, DOT2_F16)
    SPECIAL(V_DOT2_F32_BF16, issue_dot, VALU, DOT2_BF16)
    SPECIAL(V_DOT2C_F32_F16, issue_dot, VALU, DOT2_F16)
    SPECIAL(V_DOT2C_F32_BF16, issue_dot, VALU, DOT2C_BF16)
    SPECIAL(V_DOT2_I32_I16, issue_dot, VALU, DOT2_I16)
    SPECIAL(V_DOT2_U32_U16, issue_dot, VALU, DOT2_U16)
    SPECIAL(V_DOT2C_I32_I16, issue_dot, VALU, DOT2_I16)
    SPECIAL(V_DOT4_I32_I8, issue_dot, VALU, DOT4_I8)
    SPECIAL(V_DOT4C_I32_I8, issue_dot, VALU, DOT4_I8)
    SPECIAL(V_DOT4_U32_U8, issue_dot, VALU, DOT4_U8)
    SPECIAL(V_DOT8_I32_I4, issue_dot, VALU, DOT8_I4)
    SPECIAL(V_DOT8C_I32_I4, issue_dot, VALU, DOT8_I4)
    SPECIAL(V_DOT8_U32_U4, issue_dot, VALU, DOT8_U4)
    {0}};
