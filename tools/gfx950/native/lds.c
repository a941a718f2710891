// LDS instructions, and those that exchange values between lanes through LDS hardware without touching its memory.
#include "access.h"

static u32 result_register(const Inst *in) { return in->dst + (in->flags & IN_ACC ? ACC : 0u); }
static u32 data_register(const Inst *in, int which) { return in->src[which] + (in->flags & IN_ACC ? ACC : 0u); }
static u32 register_count(const Operation *op) { return op->bytes < 4 ? 1 : op->bytes / 4; }

static void addresses_of(Machine *m, Wave *w, const Inst *in, u32 offset, Addresses *a) {
  Source s;
  if (in->flags & GDS) fail(m, w, in, ILLEGAL, 0, "this part has no global data share");
  a->lanes = exec_of(w), a->beyond = 0;
  memset(a->within, 255, sizeof a->within);
  fetch_registers(m, w, in, in->src[0], 1, a->lanes, &s);
  check_defined(m, w, in, &s, 1, a->lanes, "an LDS address");
  for (int i = 0; i < LANES; ++i) a->address[i] = (u64)s.value->u[i] + offset, a->space[i] = IN_LDS;
}

static u32 one_offset(const Inst *in) { return (u32)in->imm & 0xffff; }
static u32 offset_of_pair(const Inst *in, const Operation *op, int which, u32 stride) {
  return ((u32)in->imm >> 8 * which & 255) * op->bytes * stride;
}
static u32 stride_of(const Operation *op) { return op->src[0]; }  // 1 or 64, for the instructions with two offsets

static void issue_read(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Addresses a;
  addresses_of(m, w, in, one_offset(in), &a);
  count_conflicts(m, in, op, &a, false);
  load_lanes(m, w, in, op, &a, result_register(in));
  w->lds_issued++;
  mark_pending(m, w, result_register(in), register_count(op), BY_LDS);
}

static void issue_read2(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Addresses a[2];  // both before a result may overwrite the register they come from
  for (int which = 0; which < 2; ++which)
    addresses_of(m, w, in, offset_of_pair(in, op, which, stride_of(op)), &a[which]);
  for (int which = 0; which < 2; ++which) {
    count_conflicts(m, in, op, &a[which], false);
    load_lanes(m, w, in, op, &a[which], result_register(in) + (u32)which * register_count(op));
  }
  w->lds_issued++;
  mark_pending(m, w, result_register(in), 2 * register_count(op), BY_LDS);
}

// Each row of 16 lanes reads a matrix whose rows are 16 elements of op->detail bits, as many of them as fit 64 bits;
// lane i gets its column i.
static void issue_read_transposed(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  const u32 bits = op->detail, count = 64 / bits, lanes_per_row = 16 / count;
  u32 value[2][LANES] = {0}, shadow[2][LANES] = {0};
  u64 read[LANES] = {0}, read_shadow[LANES] = {0};
  Addresses a;
  addresses_of(m, w, in, one_offset(in), &a);
  count_conflicts(m, in, op, &a, false);
  for EACH_LANE(a.lanes) {
    const Place place = locate(m, w, in, IN_LDS, (u32)lane, a.address[lane], 8, false);
    memcpy(&read[lane], place.at, 8), memcpy(&read_shadow[lane], place.shadow, 8);
  }
  bool dirty = false;
  for (u32 i = 0; i < LANES; ++i) {
    u64 column = 0, column_shadow = 0;
    for (u32 row = 0; row < count; ++row) {
      const u32 from = (i & ~15u) + lanes_per_row * row + i % 16 / count, at = bits * (i % count);
      const u64 mask = (1ull << bits) - 1;
      column |= (read[from] >> at & mask) << bits * row, column_shadow |= (read_shadow[from] >> at & mask)
                                                                          << bits * row;
    }
    value[0][i] = (u32)column, value[1][i] = (u32)(column >> 32);
    shadow[0][i] = (u32)column_shadow, shadow[1][i] = (u32)(column_shadow >> 32), dirty |= column_shadow != 0;
  }
  for (u32 k = 0; k < 2; ++k) write_vgpr(m, w, in, result_register(in) + k, value[k], dirty ? shadow[k] : 0, a.lanes);
  w->lds_issued++;
  mark_pending(m, w, result_register(in), 2, BY_LDS);
}

static void stored(Wave *w) { w->lds_stored = ++w->lds_issued; }

static void issue_write(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Addresses a;
  addresses_of(m, w, in, one_offset(in), &a);
  count_conflicts(m, in, op, &a, true);
  store_lanes(m, w, in, op, &a, data_register(in, 1));
  stored(w);
}

static void issue_write2(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  for (int which = 0; which < 2; ++which) {
    Addresses a;
    addresses_of(m, w, in, offset_of_pair(in, op, which, stride_of(op)), &a);
    count_conflicts(m, in, op, &a, true);
    store_lanes(m, w, in, op, &a, data_register(in, 1 + which));
  }
  stored(w);
}

static void issue_atomic(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Addresses a;
  const bool returns = op->src[0], compares = op->detail == A_CMPSWAP;
  addresses_of(m, w, in, one_offset(in), &a);
  // Compare and store: what is expected comes first.
  atomic_lanes(m, w, in, op, &a, data_register(in, compares ? 2 : 1), compares ? data_register(in, 1) : NO_REGISTER,
               returns ? result_register(in) : NO_REGISTER);
  stored(w);
  if (returns) mark_pending(m, w, result_register(in), op->bytes / 4u, BY_LDS);
}

// -- exchanges ------------------------------------------------------------------------------------

static void exchange(Machine *m, Wave *w, const Inst *in, u32 data, const i32 from[LANES], u64 lanes) {
  u32 value[LANES], shadow[LANES];
  check_vgpr(m, w, in, data);
  for (int i = 0; i < LANES; ++i) {
    const bool valid = from[i] >= 0 && (exec_of(w) >> from[i] & 1);  // an inactive lane gives zero
    value[i] = valid ? w->v[data][from[i]] : 0;
    shadow[i] = valid ? w->v_shadow[data][from[i]] : 0;
  }
  write_vgpr(m, w, in, in->dst, value, w->undefined[data] ? shadow : 0, lanes);
  w->lds_issued++;
  mark_pending(m, w, in->dst, 1, BY_LDS);
}

static void lane_numbers(Machine *m, Wave *w, const Inst *in, u32 lane_of[LANES]) {
  Source s;
  fetch_registers(m, w, in, in->src[0], 1, exec_of(w), &s);
  check_defined(m, w, in, &s, 1, exec_of(w), "a lane number");
  for (int i = 0; i < LANES; ++i) lane_of[i] = (s.value->u[i] + one_offset(in)) / 4 % LANES;
}

static void issue_bpermute(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  u32 lane_of[LANES];
  i32 from[LANES];
  (void)op;
  lane_numbers(m, w, in, lane_of);
  for (int i = 0; i < LANES; ++i) from[i] = (i32)lane_of[i];
  exchange(m, w, in, in->src[1], from, exec_of(w));
}

static void issue_permute(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  u32 lane_of[LANES];
  i32 from[LANES];
  (void)op;
  lane_numbers(m, w, in, lane_of);
  for (int i = 0; i < LANES; ++i) from[i] = -1;
  for EACH_LANE(exec_of(w)) from[lane_of[lane]] = (i32)lane;
  exchange(m, w, in, in->src[1], from, exec_of(w));
}

static i32 swizzled(u32 pattern, i32 i) {
  const i32 in_block = i & 31, block = i & 32;
  if (pattern & 0x8000) return (i & ~3) | (i32)(pattern >> 2 * (i & 3) & 3);
  return block | (i32)((((u32)in_block & (pattern & 31)) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31));
}

static void issue_swizzle(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  const u32 pattern = one_offset(in);
  i32 from[LANES];
  (void)op;
  if (pattern >= 0xc000) fail(m, w, in, ILLEGAL, 0, "the rotating and transforming swizzles are not implemented");
  for (int i = 0; i < LANES; ++i) from[i] = swizzled(pattern, i);
  exchange(m, w, in, in->src[0], from, exec_of(w));
}

// -- operations -----------------------------------------------------------------------------------

#define MEMORY(NAME, ISSUE, WORK, BYTES, DETAIL, EXTRA) \
  {.name = #NAME, .issue = ISSUE, .work = WORK, .bytes = BYTES, .detail = DETAIL, .src = {EXTRA}},
#define ATOMIC_PAIR(NAME, RTN, BYTES, KIND)               \
  MEMORY(NAME, issue_atomic, LDS, BYTES, KIND, 0)         \
  MEMORY(RTN, issue_atomic, LDS, BYTES, KIND, 1)
#define INTEGER_ATOMICS(T, B, BYTES)                                            \
  ATOMIC_PAIR(DS_ADD_U##T, DS_ADD_RTN_U##T, BYTES, A_ADD)                       \
  ATOMIC_PAIR(DS_SUB_U##T, DS_SUB_RTN_U##T, BYTES, A_SUB)                       \
  ATOMIC_PAIR(DS_RSUB_U##T, DS_RSUB_RTN_U##T, BYTES, A_RSUB)                    \
  ATOMIC_PAIR(DS_INC_U##T, DS_INC_RTN_U##T, BYTES, A_INC)                       \
  ATOMIC_PAIR(DS_DEC_U##T, DS_DEC_RTN_U##T, BYTES, A_DEC)                       \
  ATOMIC_PAIR(DS_MIN_I##T, DS_MIN_RTN_I##T, BYTES, A_SMIN)                      \
  ATOMIC_PAIR(DS_MAX_I##T, DS_MAX_RTN_I##T, BYTES, A_SMAX)                      \
  ATOMIC_PAIR(DS_MIN_U##T, DS_MIN_RTN_U##T, BYTES, A_UMIN)                      \
  ATOMIC_PAIR(DS_MAX_U##T, DS_MAX_RTN_U##T, BYTES, A_UMAX)                      \
  ATOMIC_PAIR(DS_AND_B##T, DS_AND_RTN_B##T, BYTES, A_AND)                       \
  ATOMIC_PAIR(DS_OR_B##T, DS_OR_RTN_B##T, BYTES, A_OR)                          \
  ATOMIC_PAIR(DS_XOR_B##T, DS_XOR_RTN_B##T, BYTES, A_XOR)                       \
  ATOMIC_PAIR(DS_CMPST_B##T, DS_CMPST_RTN_B##T, BYTES, A_CMPSWAP)               \
  ATOMIC_PAIR(DS_ADD_F##T, DS_ADD_RTN_F##T, BYTES, A_ADD_F)                     \
  ATOMIC_PAIR(DS_MIN_F##T, DS_MIN_RTN_F##T, BYTES, A_MIN_F)                     \
  ATOMIC_PAIR(DS_MAX_F##T, DS_MAX_RTN_F##T, BYTES, A_MAX_F)                     \
  MEMORY(DS_WRXCHG_RTN_B##T, issue_atomic, LDS, BYTES, A_SWAP, 1)
const Operation lds_operations[] = {
    MEMORY(DS_READ_U8, issue_read, LDS, 1, 0, 0)
    MEMORY(DS_READ_I8, issue_read, LDS, 1, SIGN_EXTENDED, 0)
    MEMORY(DS_READ_U16, issue_read, LDS, 2, 0, 0)
    MEMORY(DS_READ_I16, issue_read, LDS, 2, SIGN_EXTENDED, 0)
    MEMORY(DS_READ_B32, issue_read, LDS, 4, 0, 0)
    MEMORY(DS_READ_B64, issue_read, LDS, 8, 0, 0)
    MEMORY(DS_READ_B96, issue_read, LDS, 12, 0, 0)
    MEMORY(DS_READ_B128, issue_read, LDS, 16, 0, 0)
    MEMORY(DS_READ_B64_TR_B16, issue_read_transposed, LDS, 8, 16, 0)
    MEMORY(DS_READ_B64_TR_B8, issue_read_transposed, LDS, 8, 8, 0)
    MEMORY(DS_READ_B64_TR_B4, issue_read_transposed, LDS, 8, 4, 0)
    MEMORY(DS_READ_U8_D16, issue_read, LDS, 1, HALF_KEPT, 0)
    MEMORY(DS_READ_U8_D16_HI, issue_read, LDS, 1, HALF_KEPT | HIGH_HALF, 0)
    MEMORY(DS_READ_I8_D16, issue_read, LDS, 1, HALF_KEPT | SIGN_EXTENDED, 0)
    MEMORY(DS_READ_I8_D16_HI, issue_read, LDS, 1, HALF_KEPT | HIGH_HALF | SIGN_EXTENDED, 0)
    MEMORY(DS_READ_U16_D16, issue_read, LDS, 2, HALF_KEPT, 0)
    MEMORY(DS_READ_U16_D16_HI, issue_read, LDS, 2, HALF_KEPT | HIGH_HALF, 0)
    MEMORY(DS_READ2_B32, issue_read2, LDS, 4, 0, 1)
    MEMORY(DS_READ2_B64, issue_read2, LDS, 8, 0, 1)
    MEMORY(DS_READ2ST64_B32, issue_read2, LDS, 4, 0, 64)
    MEMORY(DS_READ2ST64_B64, issue_read2, LDS, 8, 0, 64)
    MEMORY(DS_WRITE_B8, issue_write, LDS, 1, 0, 0)
    MEMORY(DS_WRITE_B16, issue_write, LDS, 2, 0, 0)
    MEMORY(DS_WRITE_B8_D16_HI, issue_write, LDS, 1, HIGH_HALF, 0)
    MEMORY(DS_WRITE_B16_D16_HI, issue_write, LDS, 2, HIGH_HALF, 0)
    MEMORY(DS_WRITE_B32, issue_write, LDS, 4, 0, 0)
    MEMORY(DS_WRITE_B64, issue_write, LDS, 8, 0, 0)
    MEMORY(DS_WRITE_B96, issue_write, LDS, 12, 0, 0)
    MEMORY(DS_WRITE_B128, issue_write, LDS, 16, 0, 0)
    MEMORY(DS_WRITE2_B32, issue_write2, LDS, 4, 0, 1)
    MEMORY(DS_WRITE2_B64, issue_write2, LDS, 8, 0, 1)
    MEMORY(DS_WRITE2ST64_B32, issue_write2, LDS, 4, 0, 64)
    MEMORY(DS_WRITE2ST64_B64, issue_write2, LDS, 8, 0, 64)
    INTEGER_ATOMICS(32, 32, 4) INTEGER_ATOMICS(64, 64, 8)
    ATOMIC_PAIR(DS_PK_ADD_F16, DS_PK_ADD_RTN_F16, 4, A_PK_ADD_F16)
    ATOMIC_PAIR(DS_PK_ADD_BF16, DS_PK_ADD_RTN_BF16, 4, A_PK_ADD_BF16)
    MEMORY(DS_BPERMUTE_B32, issue_bpermute, CROSS_LANE, 0, 0, 0)
    MEMORY(DS_PERMUTE_B32, issue_permute, CROSS_LANE, 0, 0, 0)
    MEMORY(DS_SWIZZLE_B32, issue_swizzle, CROSS_LANE, 0, 0, 0)
    {0}};
