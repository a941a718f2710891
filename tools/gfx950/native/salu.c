// Scalar instructions: arithmetic (sop.def), branches, waits, barriers, and the MODE register.
#include "operands.h"

static u32 field32(u32 a, u32 at, u32 width, int sign) {
  if (width == 0) return 0;
  if (width + at >= 32) return sign ? (u32)((i32)a >> at) : a >> at;
  const u32 up = a << (32 - at - width);
  return sign ? (u32)((i32)up >> (32 - width)) : up >> (32 - width);
}
static u64 field64(u64 a, u32 at, u32 width, int sign) {
  if (width == 0) return 0;
  if (width + at >= 64) return sign ? (u64)((i64)a >> at) : a >> at;
  const u64 up = a << (64 - at - width);
  return sign ? (u64)((i64)up >> (64 - width)) : up >> (64 - width);
}
static u64 mirrored(u64 a, int bits) {
  u64 d = 0;
  for (int i = 0; i < bits; ++i) d |= (a >> i & 1) << (bits - 1 - i);
  return d;
}
static u64 quads(u64 a, int bits, u64 fill) {
  u64 d = 0;
  for (int i = 0; i < bits; i += 4) d |= a >> i & 15 ? fill << i : 0;
  return d;
}

// -- arithmetic -----------------------------------------------------------------------------------

typedef struct { u64 value[3], shadow[3]; } Evaluation;  // a, b and old d

static void evaluate(const Operation *op, const u64 in[3], u32 scc, u64 *d, u32 *scc_out) {
  *d = 0, *scc_out = scc;
  op->scalar(in[0], in[1], in[2], d, scc_out);
}

static u64 read_source(Machine *m, Wave *w, const Inst *in, Type type, u32 code, u64 *shadow) {
  if (words_of(type) == 2) return read_scalar64(m, w, in, code, type, shadow);
  u32 small;
  const u32 value = read_scalar(m, w, in, code, &small);
  *shadow = small;
  return value;
}

static bool reads_old(const Operation *op) { return op->detail & 1; }
static bool is_immediate(const Inst *in, int which) { return in->encoding == SOPK && in->src[which] == LITERAL; }

static void read_all(Machine *m, Wave *w, const Inst *in, const Operation *op, Evaluation *e) {
  memset(e, 0, sizeof *e);
  for (int i = 0; i < op->sources; ++i) {
    if (is_immediate(in, i)) e->value[i] = op->src[i] == U32 ? (u16)in->imm : (u32)in->imm;
    else e->value[i] = read_source(m, w, in, (Type)op->src[i], in->src[i], &e->shadow[i]);
  }
  if (reads_old(op)) e->value[2] = read_source(m, w, in, (Type)op->dst, in->dst, &e->shadow[2]);
}

static void issue_salu(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  Evaluation e;
  u64 d, d_shadow = 0;
  u32 scc, scc_shadow = 0;
  read_all(m, w, in, op, &e);
  evaluate(op, e.value, w->scc, &d, &scc);
  const bool dirty = e.shadow[0] | e.shadow[1] | e.shadow[2] | w->scc_shadow;
  for (enum Guess how = ALL_ZERO; dirty && how < GUESSES; ++how) {
    u64 in[3], other;
    u32 other_scc;
    for (int i = 0; i < 3; ++i) in[i] = guess(e.value[i], e.shadow[i], how);
    evaluate(op, in, (u32)guess(w->scc, w->scc_shadow, how), &other, &other_scc);
    scc_shadow |= scc ^ other_scc, d_shadow |= d ^ other;
  }
  w->scc = scc, w->scc_shadow = scc_shadow;
  if (op->dst == NONE) return;
  if (words_of((Type)op->dst) == 2) write_scalar64(m, w, in, in->dst, d, d_shadow);
  else write_scalar(m, w, in, in->dst, (u32)d, (u32)d_shadow);
}

static void issue_saveexec(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  u64 shadow, d;
  u32 scc = 0;
  const u64 exec = exec_of(w), a = read_scalar64(m, w, in, in->src[0], U64, &shadow);
  op->scalar(a, exec, 0, &d, &scc);
  write_scalar64(m, w, in, EXEC, d, shadow);
  write_scalar64(m, w, in, in->dst, op->detail ? d : exec, 0);  // S_..._WREXEC returns what it wrote
  w->scc = d != 0, w->scc_shadow = 0;
}

// -- control flow ---------------------------------------------------------------------------------

enum Branch { ALWAYS, IF_SCC0, IF_SCC1, IF_VCCZ, IF_VCCNZ, IF_EXECZ, IF_EXECNZ };

static void check_condition(Machine *m, Wave *w, const Inst *in, u64 shadow) {
  if (shadow && (m->checks & CHECK_UNDEFINED))
    fail(m, w, in, UNDEFINED, 0, "where the program goes depends on an undefined value");
}

static bool taken(Machine *m, Wave *w, const Inst *in, u8 when) {
  u64 shadow;
  switch (when) {
    case ALWAYS: return true;
    case IF_SCC0: case IF_SCC1: check_condition(m, w, in, w->scc_shadow); return (w->scc != 0) == (when == IF_SCC1);
    case IF_EXECZ: case IF_EXECNZ: return (exec_of(w) != 0) == (when == IF_EXECNZ);
  }
  const u64 vcc = read_scalar64(m, w, in, VCC, U64, &shadow);
  if (!(vcc & ~shadow)) check_condition(m, w, in, shadow);
  return (vcc != 0) == (when == IF_VCCNZ);
}

static void issue_branch(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  if (taken(m, w, in, op->detail)) w->next += in->imm;
}

static u64 pc_after(const Machine *m, const Inst *in) { return m->code_address + in->pc + 4u * in->dwords; }

static void jump(Machine *m, Wave *w, const Inst *in, u64 address) {
  const u64 offset = address - m->code_address;
  if (offset >= m->code_bytes || offset % 4 || m->record_at[offset / 4] < 0)
    fail(m, w, in, ILLEGAL, 0, "a jump to 0x%llx, which is no instruction of this code object",
         (unsigned long long)address);
  w->next = m->record_at[offset / 4];
}

enum Jump { GETPC, SETPC, SWAPPC, CALL };

static void issue_jump(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  u64 shadow = 0, target = 0;
  if (op->detail == CALL) target = pc_after(m, in) + (u64)(4 * (i64)in->imm);
  else if (op->detail != GETPC) target = read_scalar64(m, w, in, in->src[0], U64, &shadow);
  check_condition(m, w, in, shadow);
  if (op->detail != SETPC) write_scalar64(m, w, in, in->dst, pc_after(m, in), 0);
  if (op->detail != GETPC) jump(m, w, in, target);
}

static void issue_end(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)m, (void)in, (void)op;
  w->ended = 1;
}

static void issue_barrier(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  if (m->wave_count > 1 && w->lds_stored > w->lds_done && (m->checks & CHECK_WAITS))
    fail(m, w, in, MISSING_WAIT, 0, "a barrier before the wave's own LDS stores were waited for (lgkmcnt)");
  w->at_barrier = 1;
}

static void issue_nothing(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)m, (void)w, (void)in, (void)op;
}

// -- waiting --------------------------------------------------------------------------------------
// Loads and stores of one kind finish in order, so a counter of n leaves the n latest outstanding; scalar loads
// finish in any order, and so do FLAT accesses, which are memory's or LDS's: of those only 0 says anything.

static void wait_vm(Wave *w, u32 count) {
  if (count == 0) w->flat_vm_epoch++, w->vm_done = w->vm_issued;
  else if (w->vm_issued > count && w->vm_issued - count > w->vm_done) w->vm_done = w->vm_issued - count;
}

static void wait_lgkm(Wave *w, u32 count) {
  if (count == 0) w->flat_lgkm_epoch++, w->smem_epoch++, w->lds_done = w->lds_issued;
  else if (w->lds_issued > count && w->lds_issued - count > w->lds_done) w->lds_done = w->lds_issued - count;
}

static void issue_wait(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)m, (void)op;
  const u32 bits = (u32)in->imm & 0xffff, vm = (bits & 15) | (bits >> 14 & 3) << 4, lgkm = bits >> 8 & 15;
  if (vm < 63) wait_vm(w, vm);
  if (lgkm < 15) wait_lgkm(w, lgkm);
}

// -- hardware registers ---------------------------------------------------------------------------

static void issue_setreg(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  const u32 id = (u32)in->imm & 63, at = (u32)in->imm >> 6 & 31, width = ((u32)in->imm >> 11 & 31) + 1;
  const u32 mask = (u32)((1ull << width) - 1) << at;
  u32 shadow = 0;
  const u32 value = op->detail ? in->literal : read_scalar(m, w, in, in->dst, &shadow);
  check_condition(m, w, in, shadow);
  if (id != 1) fail(m, w, in, ILLEGAL, 0, "hardware register %u cannot be written here; only MODE can", id);
  w->mode = (w->mode & ~mask) | (value << at & mask);
}

static void issue_getreg(Machine *m, Wave *w, const Inst *in, const Operation *op) {
  (void)op;
  const u32 id = (u32)in->imm & 63, at = (u32)in->imm >> 6 & 31, width = ((u32)in->imm >> 11 & 31) + 1;
  if (id != 1) fail(m, w, in, ILLEGAL, 0, "hardware register %u cannot be read here; only MODE can", id);
  write_scalar(m, w, in, in->dst, w->mode >> at & (u32)((1ull << width) - 1), 0);
}

// -- operations -----------------------------------------------------------------------------------

typedef u32 S_NONE, S_U32;
typedef i32 S_I32;
typedef u64 S_U64;
typedef i64 S_I64;

#define STATEMENT(NAME, D, A, B, ...)                                    \
  static void run_##NAME(u64 a_, u64 b_, u64 old_, u64 *d_, u32 *scc_) { \
    const S_##A a = (S_##A)a_;                                           \
    const S_##B b = (S_##B)b_;                                           \
    const S_##D old = (S_##D)old_;                                       \
    S_##D d = 0;                                                         \
    u32 scc = *scc_;                                                     \
    (void)a, (void)b, (void)old;                                         \
    __VA_ARGS__;                                                         \
    *d_ = sizeof d == 4 ? (u32)d : (u64)d;                               \
    *scc_ = scc;                                                         \
  }
#define S1(NAME, D, A, ...) STATEMENT(NAME, D, A, NONE, __VA_ARGS__)
#define SR(NAME, D, A, ...) STATEMENT(NAME, D, A, NONE, __VA_ARGS__)
#define S2(NAME, D, A, B, ...) STATEMENT(NAME, D, A, B, __VA_ARGS__)
#define SX(NAME, ...) STATEMENT(NAME, U64, U64, U64, const u64 exec = b; d = __VA_ARGS__)
#define SW(NAME, ...) SX(NAME, __VA_ARGS__)
#include "sop.def"
#undef S1
#undef SR
#undef S2
#undef SX
#undef SW

#define ROW(NAME, ISSUE, D, A, B, COUNT, DETAIL) \
  {.name = #NAME,                                \
   .issue = ISSUE,                               \
   .scalar = run_##NAME,                         \
   .dst = D,                                     \
   .src = {A, B},                                \
   .sources = COUNT,                             \
   .work = SALU,                                 \
   .detail = DETAIL},
#define S1(NAME, D, A, ...) ROW(NAME, issue_salu, D, A, NONE, 1, 0)
#define SR(NAME, D, A, ...) ROW(NAME, issue_salu, D, A, NONE, 1, 1)
#define S2(NAME, D, A, B, ...) ROW(NAME, issue_salu, D, A, B, 2, 0)
#define SX(NAME, ...) ROW(NAME, issue_saveexec, U64, U64, NONE, 1, 0)
#define SW(NAME, ...) ROW(NAME, issue_saveexec, U64, U64, NONE, 1, 1)
#define CONTROL(NAME, ISSUE, WORK, DETAIL) {.name = #NAME, .issue = ISSUE, .work = WORK, .detail = DETAIL},
const Operation scalar_operations[] = {
#include "sop.def"
    CONTROL(S_BRANCH, issue_branch, BRANCH, ALWAYS)
    CONTROL(S_CBRANCH_SCC0, issue_branch, BRANCH, IF_SCC0)
    CONTROL(S_CBRANCH_SCC1, issue_branch, BRANCH, IF_SCC1)
    CONTROL(S_CBRANCH_VCCZ, issue_branch, BRANCH, IF_VCCZ)
    CONTROL(S_CBRANCH_VCCNZ, issue_branch, BRANCH, IF_VCCNZ)
    CONTROL(S_CBRANCH_EXECZ, issue_branch, BRANCH, IF_EXECZ)
    CONTROL(S_CBRANCH_EXECNZ, issue_branch, BRANCH, IF_EXECNZ)
    CONTROL(S_GETPC_B64, issue_jump, SALU, GETPC)
    CONTROL(S_SETPC_B64, issue_jump, BRANCH, SETPC)
    CONTROL(S_SWAPPC_B64, issue_jump, BRANCH, SWAPPC)
    CONTROL(S_CALL_B64, issue_jump, BRANCH, CALL)
    CONTROL(S_ENDPGM, issue_end, SYNC, 0)
    CONTROL(S_BARRIER, issue_barrier, SYNC, 0)
    CONTROL(S_WAITCNT, issue_wait, SYNC, 0)
    CONTROL(S_NOP, issue_nothing, SYNC, 0)
    CONTROL(S_SLEEP, issue_nothing, SYNC, 0)
    CONTROL(S_SETPRIO, issue_nothing, SYNC, 0)
    CONTROL(S_SETHALT, issue_nothing, SYNC, 0)
    CONTROL(S_ICACHE_INV, issue_nothing, SYNC, 0)
    CONTROL(S_DCACHE_INV, issue_nothing, SYNC, 0)
    CONTROL(S_DCACHE_WB, issue_nothing, SYNC, 0)
    CONTROL(S_SETREG_B32, issue_setreg, SALU, 0)
    CONTROL(S_SETREG_IMM32_B32, issue_setreg, SALU, 1)
    CONTROL(S_GETREG_B32, issue_getreg, SALU, 0)
    {0}};
