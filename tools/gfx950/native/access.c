#include "access.h"

// -- where an address leads -----------------------------------------------------------------------

static const Allocation *find(const Machine *m, u64 address) {
  u64 low = 0, high = m->allocation_count;
  while (low < high) {
    const u64 middle = (low + high) / 2;
    if (m->allocations[middle].base <= address) low = middle + 1;
    else high = middle;
  }
  return low ? &m->allocations[low - 1] : 0;
}

static bool holds(const Allocation *a, u64 address, u32 bytes) {
  return a && address >= a->base && bytes <= a->size && address - a->base <= a->size - bytes;
}

static _Noreturn void out_of_bounds(Machine *m, Wave *w, const Inst *in, u32 lane, u64 address, u32 bytes, bool write,
                                    const Allocation *near) {
  m->failure.address = address, m->failure.bytes = bytes;
  const char *what = write ? "a store" : "a load";
  if (near && address >= near->base)
    fail(m, w, in, OUT_OF_BOUNDS, 1ull << lane,
         "%s of %u bytes at 0x%llx, %lld bytes past the start of the nearest allocation of %llu", what, bytes,
         (unsigned long long)address, (long long)(address - near->base), (unsigned long long)near->size);
  fail(m, w, in, OUT_OF_BOUNDS, 1ull << lane, "%s of %u bytes at 0x%llx, which is in no allocation", what, bytes,
       (unsigned long long)address);
}

static Place in_memory(Machine *m, Wave *w, const Inst *in, u32 lane, u64 address, u32 bytes, bool write) {
  if (!holds(m->last, address, bytes)) m->last = find(m, address);
  if (!holds(m->last, address, bytes)) out_of_bounds(m, w, in, lane, address, bytes, write, m->last);
  const u64 offset = address - m->last->base;
  if (write && !m->last->writable)
    fail(m, w, in, READ_ONLY, 1ull << lane, "a store at 0x%llx, to memory that may only be read",
         (unsigned long long)address);
  return (Place){(u8 *)(uintptr_t)address, m->last->shadow ? m->last->shadow + offset : 0};
}

// A race: two waves touch a byte between barriers, and one of them writes it.
static void check_race(Machine *m, Wave *w, const Inst *in, u32 lane, u64 address, u32 bytes, bool write) {
  for (u32 i = 0; i < bytes; ++i) {
    LdsUse *use = &m->lds_use[address + i];
    const bool others_wrote = use->epoch == m->barrier_epoch && use->writer != w->id;
    const bool others_read = use->read_epoch == m->barrier_epoch && (use->readers & ~(1u << w->id));
    if (others_wrote || (write && others_read))
      fail(m, w, in, LDS_RACE, 1ull << lane, "wave %u %s LDS byte %llu, which another wave %s since the last barrier",
           w->id, write ? "writes" : "reads", (unsigned long long)(address + i), others_wrote ? "wrote" : "read");
    if (write) {
      use->epoch = m->barrier_epoch, use->writer = w->id;
    } else {
      if (use->read_epoch != m->barrier_epoch) use->readers = 0;
      use->read_epoch = m->barrier_epoch, use->readers |= 1u << w->id;
    }
  }
}

static Place in_lds(Machine *m, Wave *w, const Inst *in, u32 lane, u64 address, u32 bytes, bool write) {
  if (address + bytes > m->lds_bytes)
    fail(m, w, in, OUT_OF_BOUNDS, 1ull << lane, "%u bytes at LDS address %llu; the workgroup has %u bytes", bytes,
         (unsigned long long)address, m->lds_bytes);
  if (m->wave_count > 1 && (m->checks & CHECK_RACES)) check_race(m, w, in, lane, address, bytes, write);
  return (Place){m->lds + address, m->lds_shadow + address};
}

Place locate(Machine *m, Wave *w, const Inst *in, Space space, u32 lane, u64 address, u32 bytes, bool write) {
  if (space == IN_MEMORY) return in_memory(m, w, in, lane, address, bytes, write);
  if (space == IN_LDS) return in_lds(m, w, in, lane, address, bytes, write);
  if (address + bytes > m->scratch_bytes)
    fail(m, w, in, OUT_OF_BOUNDS, 1ull << lane, "%u bytes at scratch address %llu; a lane has %u bytes", bytes,
         (unsigned long long)address, m->scratch_bytes);
  const u64 at = ((u64)w->id * LANES + lane) * m->scratch_bytes + address;
  return (Place){m->scratch + at, m->scratch_shadow + at};
}

// -- registers ------------------------------------------------------------------------------------

void mark_pending(Machine *m, Wave *w, u32 reg, u32 count, enum Pending by) {
  (void)m;
  for (u32 i = 0; i < count; ++i) {
    w->pending[reg + i] = (u8)by;
    w->pending_at[reg + i] = by == BY_VM ? w->vm_issued : by == BY_LDS ? w->lds_issued : w->flat_vm_epoch;
    w->pending_lgkm_at[reg + i] = w->flat_lgkm_epoch;
  }
}

typedef struct { u32 value[4][LANES], shadow[4][LANES]; bool dirty; } Words;

static u32 words_of_bytes(u32 bytes) { return bytes < 4 ? 1 : bytes / 4; }

static u32 extended(u32 word, u32 bytes, u8 layout) {
  if (!(layout & SIGN_EXTENDED)) return word;
  return bytes == 1 ? (u32)(i32)(i8)word : (u32)(i32)(i16)word;
}

// The first `bytes` of what `op` loads; the rest are zeros.
static void read_place(Words *words, Place place, u32 lane, u32 bytes, const Operation *op) {
  const u8 layout = op->detail;
  u32 value[4] = {0}, shadow[4] = {0};
  memcpy(value, place.at, bytes);
  if (place.shadow) memcpy(shadow, place.shadow, bytes);
  value[0] = bytes < 4 ? extended(value[0], bytes, layout) : value[0];
  if (bytes < 4 && shadow[0] && (layout & SIGN_EXTENDED)) shadow[0] = extended(shadow[0], bytes, layout);
  for (u32 i = 0; i < words_of_bytes(op->bytes); ++i) {
    words->value[i][lane] = value[i], words->shadow[i][lane] = shadow[i];
    words->dirty |= shadow[i] != 0;
  }
}

// A 16-bit result that leaves the other half of the register alone.
static void keep_half(const Wave *w, u32 reg, u8 layout, Words *words) {
  const int at = layout & HIGH_HALF ? 16 : 0;
  const u32 mask = 0xffffu << at;
  words->dirty |= w->undefined[reg] != 0;
  for (int i = 0; i < LANES; ++i) {
    words->value[0][i] = (w->v[reg][i] & ~mask) | (words->value[0][i] << at & mask);
    words->shadow[0][i] = (w->v_shadow[reg][i] & ~mask) | (words->shadow[0][i] << at & mask);
  }
}

void load_lanes(Machine *m, Wave *w, const Inst *in, const Operation *op, const Addresses *a, u32 reg) {
  Words words;
  words.dirty = false;
  for EACH_LANE(a->lanes) {
    if (a->beyond >> lane & 1) {
      for (u32 i = 0; i < words_of_bytes(op->bytes); ++i) words.value[i][lane] = words.shadow[i][lane] = 0;
      continue;
    }
    const u32 bytes = within(a, (u32)lane, op);
    const Place place = locate(m, w, in, a->space[lane], (u32)lane, a->address[lane], bytes, false);
    read_place(&words, place, (u32)lane, bytes, op);
    if (a->space[lane] == IN_MEMORY) m->bytes_loaded += bytes;
  }
  if (op->detail & HALF_KEPT) check_vgpr(m, w, in, reg), keep_half(w, reg, op->detail, &words);
  for (u32 i = 0; i < words_of_bytes(op->bytes); ++i)
    write_vgpr(m, w, in, reg + i, words.value[i], words.dirty ? words.shadow[i] : 0, a->lanes);
}

static void check_stored(Machine *m, Wave *w, const Inst *in, const u32 *shadow, u32 bytes, u32 lane) {
  for (u32 i = 0; i < bytes; ++i)
    if ((shadow[i / 4] >> 8 * (i % 4) & 255) && (m->checks & CHECK_UNDEFINED))
      fail(m, w, in, UNDEFINED, 1ull << lane, "what is stored to memory was never defined (byte %u of %u)", i, bytes);
}

void store_lanes(Machine *m, Wave *w, const Inst *in, const Operation *op, const Addresses *a, u32 reg) {
  const int down = op->detail & HIGH_HALF ? 16 : 0;
  const u32 count = words_of_bytes(op->bytes);
  for (u32 i = 0; i < count; ++i) check_vgpr(m, w, in, reg + i);
  for EACH_LANE(a->lanes & ~a->beyond) {
    u32 value[4], shadow[4];
    for (u32 i = 0; i < count; ++i)
      value[i] = w->v[reg + i][lane] >> down, shadow[i] = w->v_shadow[reg + i][lane] >> down;
    const u32 bytes = within(a, (u32)lane, op);
    const Place place = locate(m, w, in, a->space[lane], (u32)lane, a->address[lane], bytes, true);
    memcpy(place.at, value, bytes);
    if (place.shadow) memcpy(place.shadow, shadow, bytes);
    if (a->space[lane] != IN_MEMORY) continue;
    check_stored(m, w, in, shadow, bytes, (u32)lane);
    m->bytes_stored += bytes;
  }
}

// -- atomics --------------------------------------------------------------------------------------

static u64 pair_added(Format f, u64 a, u64 b) {
  u64 d = 0;
  for (int at = 0; at < 32; at += 16)
    d |= (u64)encode(f, decode(f, a >> at & 0xffff) + decode(f, b >> at & 0xffff), NEAREST_EVEN, false) << at;
  return d;
}

static u64 float_result(enum Atomic kind, u64 old, u64 data, u32 bytes) {
  const double a = bytes == 4 ? (double)bits_float((u32)old) : bits_double(old);
  const double b = bytes == 4 ? (double)bits_float((u32)data) : bits_double(data);
  const double least = isnan(a) || b < a ? b : a, most = isnan(a) || b > a ? b : a;
  const double d = kind == A_ADD_F ? a + b : kind == A_MIN_F ? least : most;
  return bytes == 4 ? float_bits((float)d) : double_bits(d);
}

static u64 atomic_result(enum Atomic kind, u64 old, u64 data, u64 compare, u32 bytes) {
  const i64 a = bytes == 4 ? (i32)old : (i64)old, b = bytes == 4 ? (i32)data : (i64)data;
  switch (kind) {
    case A_SWAP: return data;
    case A_CMPSWAP: return old == compare ? data : old;
    case A_ADD: return old + data;
    case A_SUB: return old - data;
    case A_RSUB: return data - old;
    case A_SMIN: return a < b ? old : data;
    case A_UMIN: return old < data ? old : data;
    case A_SMAX: return a > b ? old : data;
    case A_UMAX: return old > data ? old : data;
    case A_AND: return old & data;
    case A_OR: return old | data;
    case A_XOR: return old ^ data;
    case A_INC: return old >= data ? 0 : old + 1;
    case A_DEC: return old == 0 || old > data ? data : old - 1;
    case A_PK_ADD_F16: return pair_added(HALF, old, data);
    case A_PK_ADD_BF16: return pair_added(BFLOAT, old, data);
    default: return float_result(kind, old, data, bytes);
  }
}

static u64 register_value(Machine *m, Wave *w, const Inst *in, u32 reg, u32 lane, u32 bytes) {
  check_vgpr(m, w, in, reg);
  u64 shadow = w->v_shadow[reg][lane], value = w->v[reg][lane];
  if (bytes == 8) {
    check_vgpr(m, w, in, reg + 1);
    value |= (u64)w->v[reg + 1][lane] << 32, shadow |= w->v_shadow[reg + 1][lane];
  }
  if (shadow && (m->checks & CHECK_UNDEFINED))
    fail(m, w, in, UNDEFINED, 1ull << lane, "an atomic operand was never defined");
  return value;
}

void atomic_lanes(Machine *m, Wave *w, const Inst *in, const Operation *op, const Addresses *a, u32 data, u32 compare,
                  u32 result) {
  u32 low[LANES], high[LANES];
  for EACH_LANE(a->lanes & ~a->beyond) {
    if (a->address[lane] % op->bytes)
      fail(m, w, in, MISALIGNED, 1ull << lane, "an atomic of %u bytes at 0x%llx, which is no multiple of that",
           op->bytes, (unsigned long long)a->address[lane]);
    const Place place = locate(m, w, in, a->space[lane], (u32)lane, a->address[lane], op->bytes, true);
    const u64 operand = register_value(m, w, in, data, (u32)lane, op->bytes);
    const u64 expected = compare == NO_REGISTER ? 0 : register_value(m, w, in, compare, (u32)lane, op->bytes);
    u64 old = 0;
    for (u32 i = 0; place.shadow && i < op->bytes; ++i)
      if (place.shadow[i] && (m->checks & CHECK_UNDEFINED))
        fail(m, w, in, UNDEFINED, 1ull << lane, "an atomic on memory nobody defined");
    memcpy(&old, place.at, op->bytes);
    const u64 now = atomic_result((enum Atomic)op->detail, old, operand, expected, op->bytes);
    memcpy(place.at, &now, op->bytes);
    low[lane] = (u32)old, high[lane] = (u32)(old >> 32);
    if (a->space[lane] == IN_MEMORY) m->bytes_loaded += op->bytes, m->bytes_stored += op->bytes;
  }
  if (result == NO_REGISTER) return;
  write_vgpr(m, w, in, result, low, 0, a->lanes & ~a->beyond);
  if (op->bytes == 8) write_vgpr(m, w, in, result + 1, high, 0, a->lanes & ~a->beyond);
}
