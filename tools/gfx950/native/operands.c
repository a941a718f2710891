#include "operands.h"

// -- scalar registers and constants ---------------------------------------------------------------

static const u32 FLOAT32[] = {0x3f000000, 0xbf000000, 0x3f800000, 0xbf800000, 0x40000000,
                              0xc0000000, 0x40800000, 0xc0800000, 0x3e22f983};
static const u32 FLOAT16[] = {0x3800, 0xb800, 0x3c00, 0xbc00, 0x4000, 0xc000, 0x4400, 0xc400, 0x3118};
static const u32 BFLOAT16[] = {0x3f00, 0xbf00, 0x3f80, 0xbf80, 0x4000, 0xc000, 0x4080, 0xc080, 0x3e22};
static const u64 FLOAT64[] = {0x3fe0000000000000, 0xbfe0000000000000, 0x3ff0000000000000,
                              0xbff0000000000000, 0x4000000000000000, 0xc000000000000000,
                              0x4010000000000000, 0xc010000000000000, 0x3fc45f306dc9c882};

static bool is_inline_integer(u32 code) { return code >= 128 && code <= 208; }
static i32 inline_integer(u32 code) { return code <= 192 ? (i32)code - 128 : 192 - (i32)code; }
static bool is_inline_float(u32 code) { return code >= 240 && code <= 248; }

static void check_sgpr(Machine *m, Wave *w, const Inst *in, u32 code) {
  if (!w->s_pending[code] || !(m->checks & CHECK_WAITS)) return;
  if (w->s_pending[code] == w->smem_epoch + 1)
    fail(m, w, in, MISSING_WAIT, 0, "s%u is used before the scalar load that writes it was waited for (lgkmcnt(0))",
         code);
  w->s_pending[code] = 0;
}

u32 read_scalar(Machine *m, Wave *w, const Inst *in, u32 code, u32 *shadow) {
  *shadow = 0;
  if (code < 128) {
    check_sgpr(m, w, in, code);
    *shadow = w->s_shadow[code];
    return w->s[code];
  }
  if (is_inline_integer(code)) return (u32)inline_integer(code);
  if (is_inline_float(code)) return FLOAT32[code - 240];
  switch (code) {
    case LITERAL: return in->literal;
    case 235: return 0;  // the low halves of the apertures' bases
    case 236: return ~0u;
    case 237: return 0;
    case 238: return ~0u;
    case 251: return w->s64[VCC / 2] == 0;
    case 252: return exec_of(w) == 0;
    case 253: *shadow = w->scc_shadow; return w->scc;
  }
  fail(m, w, in, ILLEGAL, 0, "operand code %u means nothing here", code);
}

u64 read_scalar64(Machine *m, Wave *w, const Inst *in, u32 code, Type type, u64 *shadow) {
  *shadow = 0;
  if (code < 127) {
    u32 low_shadow, high_shadow;
    const u64 low = read_scalar(m, w, in, code, &low_shadow), high = read_scalar(m, w, in, code + 1, &high_shadow);
    *shadow = low_shadow | (u64)high_shadow << 32;
    return low | high << 32;
  }
  if (is_inline_integer(code)) return (u64)(i64)inline_integer(code);
  if (is_inline_float(code)) return FLOAT64[code - 240];
  switch (code) {
    case LITERAL:
      return type == F64 ? (u64)in->literal << 32 : type == I64 ? (u64)(i64)(i32)in->literal : in->literal;
    case 235: return SHARED_APERTURE;
    case 236: return SHARED_APERTURE | 0xffffffff;
    case 237: return PRIVATE_APERTURE;
    case 238: return PRIVATE_APERTURE | 0xffffffff;
  }
  u32 small;
  const u64 value = read_scalar(m, w, in, code, &small);
  *shadow = small;
  return value;
}

void write_scalar(Machine *m, Wave *w, const Inst *in, u32 code, u32 value, u32 shadow) {
  if (code >= 128) fail(m, w, in, ILLEGAL, 0, "operand code %u cannot be written", code);
  check_sgpr(m, w, in, code);
  if (shadow && (code == EXEC || code == EXEC + 1) && (m->checks & CHECK_UNDEFINED))
    fail(m, w, in, UNDEFINED, 0, "which lanes are active (EXEC) depends on an undefined value");
  w->s[code] = value;
  w->s_shadow[code] = shadow;
}

void write_scalar64(Machine *m, Wave *w, const Inst *in, u32 code, u64 value, u64 shadow) {
  write_scalar(m, w, in, code, (u32)value, (u32)shadow);
  write_scalar(m, w, in, code + 1, (u32)(value >> 32), (u32)(shadow >> 32));
}

// -- vector registers -----------------------------------------------------------------------------

static bool is_outstanding(const Wave *w, u32 reg) {
  switch (w->pending[reg]) {
    case BY_VM: return w->pending_at[reg] > w->vm_done;
    case BY_LDS: return w->pending_at[reg] > w->lds_done;
    case BY_FLAT: return w->pending_at[reg] == w->flat_vm_epoch || w->pending_lgkm_at[reg] == w->flat_lgkm_epoch;
  }
  return false;
}

void check_vgpr(Machine *m, Wave *w, const Inst *in, u32 reg) {
  const u32 number = reg % ACC, count = reg < ACC ? m->vgprs : m->agprs;
  if (reg >= VGPRS) fail(m, w, in, ILLEGAL, 0, "a vector register was expected");
  if (number >= count)
    fail(m, w, in, ILLEGAL, 0, "%c%u is beyond the %u registers the kernel asked for", reg < ACC ? 'v' : 'a', number,
         count);
  if (!w->pending[reg]) return;
  if ((m->checks & CHECK_WAITS) && is_outstanding(w, reg))
    fail(m, w, in, MISSING_WAIT, 0, "%c%u is used before the load that writes it was waited for (%s)",
         reg < ACC ? 'v' : 'a', number,
         w->pending[reg] == BY_VM    ? "vmcnt"
         : w->pending[reg] == BY_LDS ? "lgkmcnt"
                                     : "vmcnt(0) and lgkmcnt(0)");
  w->pending[reg] = SETTLED;
}

void check_defined(Machine *m, Wave *w, const Inst *in, const Source *s, int words, u64 lanes, const char *what) {
  if (!s->dirty || !(m->checks & CHECK_UNDEFINED)) return;
  u64 bad = 0;
  for (int lane = 0; lane < LANES; ++lane)
    bad |= (u64)((words == 2 ? s->shadow.q[lane] : s->shadow.u[lane]) != 0) << lane;
  if (bad & lanes) fail(m, w, in, UNDEFINED, bad & lanes, "%s depends on a value nobody defined", what);
}

// `lane_words` (1 or 2) registers from `reg` on, in place where that is possible.
void fetch_registers(Machine *m, Wave *w, const Inst *in, u32 reg, u32 lane_words, u64 lanes, Source *out) {
  check_vgpr(m, w, in, reg);
  u64 dirty = w->undefined[reg];
  if (lane_words == 1) {
    out->value = (const Lanes *)w->v[reg];
    if (dirty) memcpy(out->shadow.u, w->v_shadow[reg], sizeof w->v_shadow[reg]);
  } else {
    check_vgpr(m, w, in, reg + 1);
    dirty |= w->undefined[reg + 1];
    const u32 *low = w->v[reg], *high = w->v[reg + 1];
    for (int i = 0; i < LANES; ++i) out->own.q[i] = low[i] | (u64)high[i] << 32;
    out->value = &out->own;
    if (dirty)
      for (int i = 0; i < LANES; ++i) out->shadow.q[i] = w->v_shadow[reg][i] | (u64)w->v_shadow[reg + 1][i] << 32;
  }
  out->dirty = (dirty & lanes) != 0;
}

void write_vgpr(Machine *m, Wave *w, const Inst *in, u32 reg, const u32 *value, const u32 *shadow, u64 lanes) {
  check_vgpr(m, w, in, reg);
  if (lanes == ~0ull) {
    memcpy(w->v[reg], value, sizeof w->v[reg]);
  } else {
    u32 *to = w->v[reg];
    for (int i = 0; i < LANES; ++i) to[i] = lanes >> i & 1 ? value[i] : to[i];
  }
  if (!shadow) {
    for EACH_LANE(w->undefined[reg] & lanes) w->v_shadow[reg][lane] = 0;
    w->undefined[reg] &= ~lanes;
    return;
  }
  for EACH_LANE(lanes) {
    w->v_shadow[reg][lane] = shadow[lane];
    w->undefined[reg] = (w->undefined[reg] & ~(1ull << lane)) | (u64)(shadow[lane] != 0) << lane;
  }
}

// -- DPP: the value of another lane ---------------------------------------------------------------

// Where lane i reads from, or -1.
static int dpp_source(u32 control, int i) {
  const int row = i & ~15, in_row = i & 15, n = control & 15;
  if (control < 0x100) return (i & ~3) | (control >> 2 * (i & 3) & 3);
  switch (control & 0x1f0) {
    case 0x100: return in_row + n < 16 ? i + n : -1;                       // row_shl
    case 0x110: return in_row - n >= 0 ? i - n : -1;                       // row_shr
    case 0x120: return row | ((in_row - n) & 15);                          // row_ror
    case 0x150: return row | n;                                            // row_newbcast
  }
  switch (control) {
    case 0x130: return i + 1 < LANES ? i + 1 : -1;                         // wave_shl
    case 0x134: return (i + 1) % LANES;                                    // wave_rol
    case 0x138: return i - 1;                                              // wave_shr
    case 0x13c: return (i + LANES - 1) % LANES;                            // wave_ror
    case 0x140: return row | (15 - in_row);                                // row_mirror
    case 0x141: return (i & ~7) | (7 - (i & 7));                           // row_half_mirror
    case 0x142: return i >= 16 ? row - 1 : -1;                             // row_bcast15
    case 0x143: return i >= 32 ? 31 : -1;                                  // row_bcast31
  }
  return -2;
}

static bool dpp_keeps_invalid(const Inst *in) { return !(in->literal >> 19 & 1); }  // bound_ctrl off

static bool dpp_valid(const Wave *w, u32 control, int i) {
  const int from = dpp_source(control, i);
  return from >= 0 && (exec_of(w) >> from & 1);
}

u64 dpp_lanes(const Wave *w, const Inst *in) {
  const u32 control = in->literal >> 8 & 0x1ff, banks = in->literal >> 24 & 15, rows = in->literal >> 28;
  u64 written = 0;
  for (int i = 0; i < LANES; ++i) {
    const bool enabled = (rows >> (i / 16) & 1) && (banks >> (i / 4 % 4) & 1);
    written |= (u64)(enabled && (!dpp_keeps_invalid(in) || dpp_valid(w, control, i))) << i;
  }
  return written;
}

static void permute(Wave *w, const Inst *in, int words, Source *s) {
  const u32 control = in->literal >> 8 & 0x1ff;
  Lanes value, shadow = {0};
  for (int i = 0; i < LANES; ++i) {
    const int from = dpp_source(control, i);
    const bool valid = dpp_valid(w, control, i);
    if (words == 2) {
      value.q[i] = valid ? s->value->q[from] : 0;
      if (s->dirty) shadow.q[i] = valid ? s->shadow.q[from] : 0;
    } else {
      value.u[i] = valid ? s->value->u[from] : 0;
      if (s->dirty) shadow.u[i] = valid ? s->shadow.u[from] : 0;
    }
  }
  s->own = value, s->shadow = shadow, s->value = &s->own;
}

// -- fetching an operand --------------------------------------------------------------------------

static void broadcast(Source *out, u64 value, u64 shadow, int words) {
  out->value = &out->own;
  out->dirty = shadow != 0;
  for (int i = 0; i < LANES; ++i) {
    if (words == 2) out->own.q[i] = value, out->shadow.q[i] = shadow;
    else out->own.u[i] = (u32)value, out->shadow.u[i] = (u32)shadow;
  }
}

// A constant or scalar register; `packed` is set for pairs of 32-bit halves.
static void fetch_scalar(Machine *m, Wave *w, const Inst *in, u32 code, Type type, Source *out) {
  u64 shadow64;
  u32 shadow;
  if (type == BOOL) {  // a mask: a bit for each lane
    const u64 mask = read_scalar64(m, w, in, code, U64, &shadow64);
    out->value = &out->own;
    out->dirty = shadow64 != 0;
    for (int i = 0; i < LANES; ++i) out->own.u[i] = mask >> i & 1, out->shadow.u[i] = shadow64 >> i & 1;
  } else if (words_of(type) == 2) {
    const u64 value = read_scalar64(m, w, in, code, type, &shadow64);
    broadcast(out, value, shadow64, 2);
  } else {
    u32 value = read_scalar(m, w, in, code, &shadow);
    if (is_inline_float(code)) {
      if (type == F16 || type == F16K || type == U16 || type == I16) value = FLOAT16[code - 240];
      if (type == BF16) value = BFLOAT16[code - 240];
    }
    broadcast(out, value, shadow, 1);
  }
}

static Lanes *own_copy(Source *s) {
  if (s->value != &s->own) s->own = *s->value, s->value = &s->own;
  return &s->own;
}

// A byte or half of each lane's word, as SDWA selects it.
static void select_part(Source *s, u32 select, bool extend) {
  if (select == 6) return;
  const int width = select < 4 ? 8 : 16, at = select < 4 ? 8 * (int)select : 16 * ((int)select - 4);
  Lanes *own = own_copy(s);
  for (int i = 0; i < LANES; ++i) {
    const u32 part = own->u[i] << (32 - width - at);
    own->u[i] = extend ? (u32)((i32)part >> (32 - width)) : part >> (32 - width);
    if (s->dirty) s->shadow.u[i] = (s->shadow.u[i] >> at) & ((1u << width) - 1);
  }
}

static void shift_down(Source *s, int by) {
  Lanes *own = own_copy(s);
  for (int i = 0; i < LANES; ++i) own->u[i] >>= by;
  if (s->dirty) for (int i = 0; i < LANES; ++i) s->shadow.u[i] >>= by;
}

static void change_sign(Machine *m, Wave *w, const Inst *in, Source *s, Type type, bool absolute, bool negate) {
  if (!is_float(type) && type != B32) fail(m, w, in, ILLEGAL, 0, "an operand that is no float has a sign modifier");
  Lanes *own = own_copy(s);
  if (type == F64) {
    for (int i = 0; i < LANES; ++i) {
      if (absolute) own->q[i] &= ~(1ull << 63);
      if (negate) own->q[i] ^= 1ull << 63;
    }
  } else {
    const u32 sign = type == F32 || type == B32 ? 1u << 31 : 1u << 15;
    for (int i = 0; i < LANES; ++i) {
      if (absolute) own->u[i] &= ~sign;
      if (negate) own->u[i] ^= sign;
    }
  }
}

static void flush_subnormals(Source *s, Type type) {
  Lanes *own = own_copy(s);
  for (int i = 0; i < LANES; ++i) {
    if (type == F32 && !(own->u[i] & 0x7f800000)) own->u[i] &= 0x80000000;
    if (type == F64 && !(own->q[i] & 0x7ffull << 52)) own->q[i] &= 1ull << 63;
    if ((type == F16 || type == F16K) && !(own->u[i] & 0x7c00)) own->u[i] &= 0x8000;
  }
}

static bool flushes_inputs(const Wave *w, Type type) {
  if (type == F32) return !(w->mode >> 4 & 1);
  return (type == F64 || type == F16 || type == F16K) && !(w->mode >> 6 & 1);
}

// Which halves of a pair VOP3P takes, and of which sign.
static void packed_half(Machine *m, Wave *w, const Inst *in, int which, Type type, u32 half, Source *s) {
  const u32 code = in->src[which];
  const bool high = (half ? in->opsel_hi : in->opsel) >> which & 1;
  const bool negate = (half ? in->abs : in->neg) >> which & 1;
  if (is_half(type)) {
    if (high) shift_down(s, 16);
  } else if (high && code >= 128 && code < VGPR && s->value->u[0] != 0) {
    // A constant fills the low half; what the high half is then, no document says, but of zero it is zero.
    fail(m, w, in, ILLEGAL, 0, "the high half of a 32-bit constant is used");
  }
  if (negate) change_sign(m, w, in, s, type, false, true);
}

static u32 packed_register(const Inst *in, int which, Type type, u32 half) {
  const u32 code = in->src[which];
  const bool high = (half ? in->opsel_hi : in->opsel) >> which & 1;
  return code + (!is_half(type) && high && (code < 128 || code >= VGPR));
}

static void modify(Machine *m, Wave *w, const Inst *in, int which, Type type, Source *s) {
  bool negate = in->neg >> which & 1, absolute = in->abs >> which & 1;
  if (in->variant == SDWA && which < 2) {
    const u32 bits = in->literal >> (which ? 24 : 16) & 0xff;
    select_part(s, bits & 7, bits >> 3 & 1);
    negate = bits >> 4 & 1, absolute = bits >> 5 & 1;
  } else if (in->variant == DPP && which < 2) {
    if (dpp_source(in->literal >> 8 & 0x1ff, 0) == -2) fail(m, w, in, ILLEGAL, 0, "an unknown DPP control");
    if (which == 0) permute(w, in, words_of(type), s);
    negate = in->literal >> (which ? 22 : 20) & 1, absolute = in->literal >> (which ? 23 : 21) & 1;
  } else if (is_half(type) && (in->opsel >> which & 1) && in->src[which] >= VGPR) {
    shift_down(s, 16);
  }
  if (negate || absolute) change_sign(m, w, in, s, type, absolute, negate);
}

// Operand `which` as `type`; of a packed instruction, its `half`.
void fetch(Machine *m, Wave *w, const Inst *in, int which, Type type, u32 half, u64 lanes, Source *out) {
  const bool packed = in->encoding == VOP3P;
  const u32 code = packed ? packed_register(in, which, type, half) : in->src[which];
  if (code < VGPR) fetch_scalar(m, w, in, code, type, out);
  // Another lane's value may be read, whatever EXEC says of it.
  else fetch_registers(m, w, in, code - VGPR, (u32)words_of(type), in->variant == DPP ? ~0ull : lanes, out);
  if (packed) packed_half(m, w, in, which, type, half, out);
  else if (in->variant || in->neg || in->abs || in->opsel) modify(m, w, in, which, type, out);
  if (flushes_inputs(w, type)) flush_subnormals(out, type);
}
