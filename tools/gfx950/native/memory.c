// FLAT, GLOBAL, SCRATCH, buffer and scalar memory instructions: how each forms its addresses.
#include "access.h"

static u32 data_register(const Inst *in) { return in->src[1] + (in->flags & IN_ACC ? ACC : 0u); }
static u32 result_register(const Inst *in) { return in->dst + (in->flags & IN_ACC ? ACC : 0u); }

// -- addresses ------------------------------------------------------------------------------------

static void add_vector(Machine *m, Wave *w, const Inst *in, u32 reg, int words, Addresses *a) {
  Source s;
  fetch_registers(m, w, in, reg, (u32)words, a->lanes, &s);
  check_defined(m, w, in, &s, words, a->lanes, "an address");
  for EACH_LANE(a->lanes) a->address[lane] += words == 2 ? s.value->q[lane] : s.value->u[lane];
}

static u64 scalar_base(Machine *m, Wave *w, const Inst *in, u32 code, int words) {
  u64 shadow;
  u32 shadow32 = 0;
  const u64 base = words == 2 ? read_scalar64(m, w, in, code, U64, &shadow) : read_scalar(m, w, in, code, &shadow32);
  if ((words == 2 ? shadow : shadow32) && (m->checks & CHECK_UNDEFINED))
    fail(m, w, in, UNDEFINED, 0, "an address depends on scalar registers nobody defined");
  return base;
}

static void start(const Wave *w, Space space, u64 base, Addresses *a) {
  a->lanes = exec_of(w), a->beyond = 0;
  memset(a->within, 255, sizeof a->within);
  for (int i = 0; i < LANES; ++i) a->address[i] = base, a->space[i] = space;
}

static void global_addresses(Machine *m, Wave *w, const Inst *in, Addresses *a) {
  const bool scalar = in->flags & HAS_SADDR;
  start(w, IN_MEMORY, (scalar ? scalar_base(m, w, in, in->sdst, 2) : 0) + (u64)(i64)in->imm, a);
  add_vector(m, w, in, in->src[0], scalar ? 1 : 2, a);
}

static void scratch_addresses(Machine *m, Wave *w, const Inst *in, Addresses *a) {
  const u64 base = in->flags & HAS_SADDR ? scalar_base(m, w, in, in->sdst, 1) : 0;
  start(w, IN_SCRATCH, base + (u64)(i64)in->imm, a);
  if (in->flags & OFFEN) add_vector(m, w, in, in->src[0], 1, a);
  for (int i = 0; i < LANES; ++i) a->address[i] &= 0xffffffff;
}

// A FLAT address names memory, or LDS or scratch through an aperture.
static void flat_addresses(Machine *m, Wave *w, const Inst *in, Addresses *a) {
  start(w, IN_MEMORY, (u64)(i64)in->imm, a);
  add_vector(m, w, in, in->src[0], 2, a);
  for EACH_LANE(a->lanes) {
    const u64 aperture = a->address[lane] & ~0xffffffffull;
    if (aperture != SHARED_APERTURE && aperture != PRIVATE_APERTURE) continue;
    a->space[lane] = aperture == SHARED_APERTURE ? IN_LDS : IN_SCRATCH;
    a->address[lane] &= 0xffffffff;
  }
}

static void issue_atomic(Machine *m, Wave *w, const Inst *in, const Operation *op);

typedef struct { u64 base; u32 stride, records; bool swizzled; } Buffer;

static Buffer buffer_of(Machine *m, Wave *w, const Inst *in, u32 code) {
  const u64 low = scalar_base(m, w, in, code, 2), high = scalar_base(m, w, in, code + 2, 2);
  return (Buffer){(u64)((i64)(low << 16) >> 16), (u32)(low >> 48) & 0x3fff, (u32)high, low >> 63};
}

// Bytes of an access that a buffer's bounds leave: all or nothing where it counts records or the access is an atomic,
// else whole dwords.
static u32 bytes_within(const Buffer *b, const Inst *in, const Operation *op, u32 index, u64 offset) {
  if (in->flags & IDXEN && b->stride) return index < b->records ? op->bytes : 0;
  const u64 left = offset < b->records ? b->records - offset : 0;
  if (left >= op->bytes) return op->bytes;
  return op->bytes < 4 || op->issue == issue_atomic ? 0 : (u32)left & ~3u;
}

static void buffer_addresses(Machine *m, Wave *w, const Inst *in, const Operation *op, Addresses *a) {
  const Buffer b = buffer_of(m, w, in, in->sdst);
  const u64 scalar = (u32)scalar_base(m, w, in, in->src[2], 1);
  if (b.swizzled) fail(m, w, in, ILLEGAL, 0, "a swizzled buffer is not implemented");
  Addresses index;
  start(w, IN_MEMORY, 0, &index);
  start(w, IN_MEMORY, (u32)in->imm, a);
  if (in->flags & IDXEN) add_vector(m, w, in, in->src[0], 1, &index);
  if (in->flags & OFFEN) add_vector(m, w, in, in->src[0] + (in->flags & IDXEN ? 1u : 0), 1, a);
  for EACH_LANE(a->lanes) {
    // The offsets of the lane and of the instruction wrap at 32 bits before the scalar one is added.
    const u64 offset = (u32)a->address[lane] + scalar;
    const u32 within = bytes_within(&b, in, op, (u32)index.address[lane], offset);
    a->within[lane] = (u8)within, a->beyond |= (u64)(within == 0) << lane;
    a->address[lane] = b.base + offset + index.address[lane] * b.stride;
  }
}

enum Family { BY_GLOBAL, BY_SCRATCH, BY_FLAT_ADDRESS, BY_BUFFER };

static enum Family family_of(const Inst *in) {
  return in->encoding == GLOBAL    ? BY_GLOBAL
         : in->encoding == SCRATCH ? BY_SCRATCH
         : in->encoding == FLAT    ? BY_FLAT_ADDRESS
                                   : BY_BUFFER;
}

static void addresses_of(Machine *m, Wave *w, const Inst *in, const Operation *op, Addresses *a) {
  switch (family_of(in)) {
    case BY_GLOBAL: global_addresses(m, w, in, a); return;
    case BY_SCRATCH: scratch_addresses(m, w, in, a); return;
    case BY_FLAT_ADDRESS: flat_addresses(m, w, in, a); return;
    case BY_BUFFER: buffer_addresses(m, w, in, op, a); return;
  }
}

// -- loads, stores, atomics -----------------------------------------------------------------------

static void count(Wave *w, const Inst *in) {
  if (in->encoding != FLAT) w->vm_issued++;
}

static enum Pending pending_of(const Inst *in) { return in->encoding == FLAT ? BY_FLAT : BY_VM; }

static u32 register_count(const Operation *op) { return op->bytes < 4 ? 1 : op->bytes / 4; }

// Straight into LDS: each lane's bytes follow those of the lane before it, from M0 on.
static void load_to_lds(Machine *m, Wave *w, const Inst *in, const Operation *op, const Addresses *from) {
  const u64 base = scalar_base(m, w, in, M0, 1) + (in->encoding == MUBUF ? (u32)in->imm : (u64)(i64)in->imm);
  const u32 step = op->bytes < 4 ? 4 : op->bytes;
  for EACH_LANE(from->lanes) {
    u8 value[16] = {0}, shadow[16] = {0};
    if (!(from->beyond >> lane & 1)) {
      const u32 bytes = within(from, (u32)lane, op);
      const Place source = locate(m, w, in, from->space[lane], (u32)lane, from->address[lane], bytes, false);
      memcpy(value, source.at, bytes);
      if (source.shadow) memcpy(shadow, source.shadow, bytes);
      m->bytes_loaded += bytes;
    }
    const Place to = locate(m, w, in, IN_LDS, (u32)lane, (base + lane * step) & 0xffffffff, step, true);
    memcpy(to.at, value, step);
    memcpy(to.shadow, shadow, step);
  }
}

static void issue_load(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Addresses a;
  addresses_of(m, w, in, op, &a);
  count(w, in);
  if (in->flags & TO_LDS) {
    load_to_lds(m, w, in, op, &a);
    return;
  }
  load_lanes(m, w, in, op, &a, result_register(in));
  mark_pending(m, w, result_register(in), register_count(op), pending_of(in));
}

static void issue_store(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Addresses a;
  addresses_of(m, w, in, op, &a);
  store_lanes(m, w, in, op, &a, data_register(in));
  count(w, in);
}

static void issue_atomic(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Addresses a;
  addresses_of(m, w, in, op, &a);
  const bool returns = in->flags & SC0, compares = op->detail == A_CMPSWAP;
  const u32 data = data_register(in), words = op->bytes / 4u;
  // A buffer atomic returns into its data register.
  const u32 result = in->encoding == MUBUF ? data : result_register(in);
  atomic_lanes(m, w, in, op, &a, data, compares ? data + words : NO_REGISTER, returns ? result : NO_REGISTER);
  count(w, in);
  if (returns) mark_pending(m, w, result, words, pending_of(in));
}

static void issue_cache(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)m, (void)op;
  count(w, in);
}

// -- scalar loads ---------------------------------------------------------------------------------

static void issue_scalar_load(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  const bool buffer = op->detail;
  const u64 offset = (u64)(i64)in->imm + (in->flags & SOFFSET ? (u32)scalar_base(m, w, in, in->src[1], 1) : 0);
  const Buffer b =
      buffer ? buffer_of(m, w, in, in->src[0]) : (Buffer){scalar_base(m, w, in, in->src[0], 2), 0, 0, false};
  if ((b.base + offset) % 4)
    fail(m, w, in, MISALIGNED, 0, "a scalar load at 0x%llx, which is no multiple of 4",
         (unsigned long long)(b.base + offset));
  for (u32 i = 0; i < op->bytes / 4u; ++i) {
    u32 value = 0, shadow = 0;
    if (!buffer || offset + 4 * i + 4 <= (b.stride ? (u64)b.stride * b.records : b.records)) {
      const Place place = locate(m, w, in, IN_MEMORY, 0, b.base + offset + 4 * i, 4, false);
      memcpy(&value, place.at, 4);
      if (place.shadow) memcpy(&shadow, place.shadow, 4);
    }
    write_scalar(m, w, in, in->dst + i, value, shadow);
    w->s_pending[in->dst + i] = w->smem_epoch + 1;
  }
  m->bytes_loaded += op->bytes;
}

static void issue_time(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  write_scalar64(m, w, in, in->dst, m->executed, 0);
  w->s_pending[in->dst] = w->s_pending[in->dst + 1] = w->smem_epoch + 1;
}

// -- operations -----------------------------------------------------------------------------------

#define MEMORY(NAME, ISSUE, WORK, BYTES, DETAIL) \
  {.name = #NAME, .issue = ISSUE, .work = WORK, .bytes = BYTES, .detail = DETAIL},
#define LOADS(P)                                                               \
  MEMORY(P##_LOAD_UBYTE, issue_load, LOAD, 1, 0)                               \
  MEMORY(P##_LOAD_SBYTE, issue_load, LOAD, 1, SIGN_EXTENDED)                   \
  MEMORY(P##_LOAD_USHORT, issue_load, LOAD, 2, 0)                              \
  MEMORY(P##_LOAD_SSHORT, issue_load, LOAD, 2, SIGN_EXTENDED)                  \
  MEMORY(P##_LOAD_DWORD, issue_load, LOAD, 4, 0)                               \
  MEMORY(P##_LOAD_DWORDX2, issue_load, LOAD, 8, 0)                             \
  MEMORY(P##_LOAD_DWORDX3, issue_load, LOAD, 12, 0)                            \
  MEMORY(P##_LOAD_DWORDX4, issue_load, LOAD, 16, 0)                            \
  MEMORY(P##_LOAD_UBYTE_D16, issue_load, LOAD, 1, HALF_KEPT)                   \
  MEMORY(P##_LOAD_UBYTE_D16_HI, issue_load, LOAD, 1, HALF_KEPT | HIGH_HALF)    \
  MEMORY(P##_LOAD_SBYTE_D16, issue_load, LOAD, 1, HALF_KEPT | SIGN_EXTENDED)   \
  MEMORY(P##_LOAD_SBYTE_D16_HI, issue_load, LOAD, 1, HALF_KEPT | HIGH_HALF | SIGN_EXTENDED) \
  MEMORY(P##_LOAD_SHORT_D16, issue_load, LOAD, 2, HALF_KEPT)                   \
  MEMORY(P##_LOAD_SHORT_D16_HI, issue_load, LOAD, 2, HALF_KEPT | HIGH_HALF)
#define STORES(P)                                                              \
  MEMORY(P##_STORE_BYTE, issue_store, STORE, 1, 0)                             \
  MEMORY(P##_STORE_BYTE_D16_HI, issue_store, STORE, 1, HIGH_HALF)              \
  MEMORY(P##_STORE_SHORT, issue_store, STORE, 2, 0)                            \
  MEMORY(P##_STORE_SHORT_D16_HI, issue_store, STORE, 2, HIGH_HALF)             \
  MEMORY(P##_STORE_DWORD, issue_store, STORE, 4, 0)                            \
  MEMORY(P##_STORE_DWORDX2, issue_store, STORE, 8, 0)                          \
  MEMORY(P##_STORE_DWORDX3, issue_store, STORE, 12, 0)                         \
  MEMORY(P##_STORE_DWORDX4, issue_store, STORE, 16, 0)
#define TO_LDS_LOADS(P)                                                        \
  MEMORY(P##_LOAD_LDS_UBYTE, issue_load, LOAD, 1, 0)                           \
  MEMORY(P##_LOAD_LDS_USHORT, issue_load, LOAD, 2, 0)                          \
  MEMORY(P##_LOAD_LDS_DWORD, issue_load, LOAD, 4, 0)                           \
  MEMORY(P##_LOAD_LDS_DWORDX3, issue_load, LOAD, 12, 0)                        \
  MEMORY(P##_LOAD_LDS_DWORDX4, issue_load, LOAD, 16, 0)
#define INTEGER_ATOMICS(P, X, BYTES)                                           \
  MEMORY(P##_ATOMIC_SWAP##X, issue_atomic, ATOMIC, BYTES, A_SWAP)              \
  MEMORY(P##_ATOMIC_CMPSWAP##X, issue_atomic, ATOMIC, BYTES, A_CMPSWAP)        \
  MEMORY(P##_ATOMIC_ADD##X, issue_atomic, ATOMIC, BYTES, A_ADD)                \
  MEMORY(P##_ATOMIC_SUB##X, issue_atomic, ATOMIC, BYTES, A_SUB)                \
  MEMORY(P##_ATOMIC_SMIN##X, issue_atomic, ATOMIC, BYTES, A_SMIN)              \
  MEMORY(P##_ATOMIC_UMIN##X, issue_atomic, ATOMIC, BYTES, A_UMIN)              \
  MEMORY(P##_ATOMIC_SMAX##X, issue_atomic, ATOMIC, BYTES, A_SMAX)              \
  MEMORY(P##_ATOMIC_UMAX##X, issue_atomic, ATOMIC, BYTES, A_UMAX)              \
  MEMORY(P##_ATOMIC_AND##X, issue_atomic, ATOMIC, BYTES, A_AND)                \
  MEMORY(P##_ATOMIC_OR##X, issue_atomic, ATOMIC, BYTES, A_OR)                  \
  MEMORY(P##_ATOMIC_XOR##X, issue_atomic, ATOMIC, BYTES, A_XOR)                \
  MEMORY(P##_ATOMIC_INC##X, issue_atomic, ATOMIC, BYTES, A_INC)                \
  MEMORY(P##_ATOMIC_DEC##X, issue_atomic, ATOMIC, BYTES, A_DEC)
#define ATOMICS(P)                                                             \
  INTEGER_ATOMICS(P, , 4)                                                      \
  INTEGER_ATOMICS(P, _X2, 8)                                                   \
  MEMORY(P##_ATOMIC_ADD_F32, issue_atomic, ATOMIC, 4, A_ADD_F)                 \
  MEMORY(P##_ATOMIC_PK_ADD_F16, issue_atomic, ATOMIC, 4, A_PK_ADD_F16)         \
  MEMORY(P##_ATOMIC_PK_ADD_BF16, issue_atomic, ATOMIC, 4, A_PK_ADD_BF16)       \
  MEMORY(P##_ATOMIC_ADD_F64, issue_atomic, ATOMIC, 8, A_ADD_F)                 \
  MEMORY(P##_ATOMIC_MIN_F64, issue_atomic, ATOMIC, 8, A_MIN_F)                 \
  MEMORY(P##_ATOMIC_MAX_F64, issue_atomic, ATOMIC, 8, A_MAX_F)
#define SCALAR_LOADS(P, BUFFER)                                                \
  MEMORY(P##_DWORD, issue_scalar_load, SMEM_LOAD, 4, BUFFER)                   \
  MEMORY(P##_DWORDX2, issue_scalar_load, SMEM_LOAD, 8, BUFFER)                 \
  MEMORY(P##_DWORDX4, issue_scalar_load, SMEM_LOAD, 16, BUFFER)                \
  MEMORY(P##_DWORDX8, issue_scalar_load, SMEM_LOAD, 32, BUFFER)                \
  MEMORY(P##_DWORDX16, issue_scalar_load, SMEM_LOAD, 64, BUFFER)
const Operation memory_operations[] = {
    LOADS(GLOBAL) STORES(GLOBAL) ATOMICS(GLOBAL) TO_LDS_LOADS(GLOBAL)
    LOADS(FLAT) STORES(FLAT) ATOMICS(FLAT)
    LOADS(SCRATCH) STORES(SCRATCH)
    LOADS(BUFFER) STORES(BUFFER) ATOMICS(BUFFER)
    SCALAR_LOADS(S_LOAD, 0) SCALAR_LOADS(S_BUFFER_LOAD, 1)
    MEMORY(S_MEMTIME, issue_time, SMEM_LOAD, 8, 0)
    MEMORY(S_MEMREALTIME, issue_time, SMEM_LOAD, 8, 0)
    MEMORY(BUFFER_WBL2, issue_cache, SYNC, 0, 0)
    MEMORY(BUFFER_INV, issue_cache, SYNC, 0, 0)
    {0}};
