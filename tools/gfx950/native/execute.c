// Runs a launch: workgroups one after another, the waves of one in turns, from barrier to barrier.
#include "operands.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

extern const Operation vector_operations[], scalar_operations[], memory_operations[], lds_operations[],
    cross_lane_operations[], matrix_operations[];

static const u64 TURN =
    20000;  // instructions a wave runs before another gets a turn: some wait for each other in loops

// -- the table of operations ----------------------------------------------------------------------

static const Operation *table[2048];
static u32 table_size = 0;

static void build_table(void) {
  static const Operation *const groups[] = {vector_operations, scalar_operations,     memory_operations,
                                            lds_operations,    cross_lane_operations, matrix_operations};
  static const Operation unknown = {.name = "?"};
  table[table_size++] = &unknown;
  for (u32 g = 0; g < sizeof groups / sizeof *groups; ++g)
    for (const Operation *op = groups[g]; op->name; ++op) table[table_size++] = op;
}

u32 cdna_operation_count(void) {
  if (!table_size) build_table();
  return table_size;
}
const char *cdna_operation_name(u32 index) { return table[index]->name; }
u32 cdna_operation_work(u32 index) { return table[index]->work; }
u32 cdna_record_bytes(void) { return sizeof(Inst); }
u32 cdna_machine_bytes(void) { return sizeof(Machine); }

// -- failing --------------------------------------------------------------------------------------

_Noreturn void fail(Machine *m, const Wave *w, const Inst *in, u32 code, u64 lanes, const char *text, ...) {
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(m->failure.text, sizeof m->failure.text, text, arguments);
  va_end(arguments);
  m->failure.code = code, m->failure.lanes = lanes;
  m->failure.pc = in ? in->pc : ~0u, m->failure.wave = w ? w->id : ~0u;
  memcpy(m->failure.workgroup, m->workgroup, sizeof m->workgroup);
  longjmp(*m->escape, 1);
}

// -- starting a workgroup -------------------------------------------------------------------------

static void forget(Machine *m, Wave *w) {
  const u32 accumulation = m->agprs;
  memset(w, 0, offsetof(Wave, v));
  for (u32 i = 0; i < 128; ++i) w->s[i] = 0xdeadbeef, w->s_shadow[i] = ~0u;
  for (u32 reg = 0; reg < VGPRS; ++reg) {
    if (reg % ACC >= (reg < ACC ? m->vgprs : accumulation)) continue;
    memset(w->v[reg], 0x5a, sizeof w->v[reg]);
    memset(w->v_shadow[reg], 0xff, sizeof w->v_shadow[reg]);
    w->undefined[reg] = ~0ull;
  }
}

static void define_sgpr(Wave *w, u32 index, u32 value) { w->s[index] = value, w->s_shadow[index] = 0; }

static u32 items_per_group(const Machine *m) { return m->block[0] * m->block[1] * m->block[2]; }

// What the hardware leaves in registers when a wave starts: user SGPRs, then workgroup ids, item ids packed in v0.
static void start_wave(Machine *m, Wave *w, u32 id) {
  forget(m, w);
  w->id = id, w->mode = m->mode, w->next = (i64)m->entry;
  u32 at = 0;
  for (; at < m->user_sgpr_count; ++at) define_sgpr(w, at, m->user_sgprs[at]);
  for (u32 d = 0; d < 3; ++d)
    if (m->workgroup_ids >> d & 1) define_sgpr(w, at++, m->workgroup[d]);
  define_sgpr(w, FLAT_SCRATCH, 0), define_sgpr(w, FLAT_SCRATCH + 1, 0);
  u64 exec = 0;
  for (u32 lane = 0; lane < LANES; ++lane) {
    const u32 item = id * LANES + lane;
    if (item >= items_per_group(m)) break;
    exec |= 1ull << lane;
    const u32 x = item % m->block[0], y = item / m->block[0] % m->block[1], z = item / m->block[0] / m->block[1];
    w->v[0][lane] = x | y << 10 | z << 20, w->v_shadow[0][lane] = 0;
  }
  w->undefined[0] = ~exec;
  w->s64[EXEC / 2] = exec;
  w->s_shadow[EXEC] = w->s_shadow[EXEC + 1] = 0;
}

static void start_workgroup(Machine *m) {
  m->wave_count = (items_per_group(m) + LANES - 1) / LANES;
  m->barrier_epoch++;
  for (u32 id = 0; id < m->wave_count; ++id) start_wave(m, &m->waves[id], id);
  memset(m->lds, 0xa5, m->lds_bytes), memset(m->lds_shadow, 0xff, m->lds_bytes);
  const u64 scratch = (u64)m->wave_count * LANES * m->scratch_bytes;
  memset(m->scratch, 0xa5, scratch), memset(m->scratch_shadow, 0xff, scratch);
}

// -- running --------------------------------------------------------------------------------------

static void check_record(Machine *m, Wave *w, const Inst *in) {
  if ((u64)w->next >= m->records) fail(m, w, 0, ILLEGAL, 0, "execution ran off the end of the code");
  if (m->executed >= m->budget)
    fail(m, w, in, BUDGET, exec_of(w), "the instruction budget is used up: an endless loop?");
  if (in->op == 0) fail(m, w, in, UNKNOWN, 0, "an instruction the executor does not know");
}

static void run_wave(Machine *m, Wave *w) {
  for (u64 turn = 0; turn < TURN && !w->ended && !w->at_barrier; ++turn) {
    const Inst *in = &m->code[w->next];
    check_record(m, w, in);
    w->next++;
    const Operation *op = table[in->op];
    m->executed++, m->waves_by_op[in->op]++, m->lanes_by_op[in->op] += (u64)__builtin_popcountll(exec_of(w));
    op->issue(m, w, in, op);
  }
}

static u32 count_waiting(const Machine *m, u32 *running) {
  u32 waiting = 0;
  *running = 0;
  for (u32 i = 0; i < m->wave_count; ++i) {
    waiting += m->waves[i].at_barrier;
    *running += !m->waves[i].ended && !m->waves[i].at_barrier;
  }
  return waiting;
}

static void run_workgroup(Machine *m) {
  start_workgroup(m);
  for (;;) {
    u32 running;
    for (u32 i = 0; i < m->wave_count; ++i) run_wave(m, &m->waves[i]);
    const u32 waiting = count_waiting(m, &running);
    if (running) continue;
    if (!waiting) return;
    m->barrier_epoch++;
    for (u32 i = 0; i < m->wave_count; ++i) m->waves[i].at_barrier = 0;
  }
}

static bool allocate(Machine *m) {
  const u32 waves = (items_per_group(m) + LANES - 1) / LANES;
  const u64 scratch = (u64)waves * LANES * m->scratch_bytes;
  m->waves = aligned_alloc(64, waves * sizeof(Wave) + (64 - waves * sizeof(Wave) % 64) % 64);
  m->lds = malloc(m->lds_bytes + 16), m->lds_shadow = malloc(m->lds_bytes + 16);
  m->scratch = malloc(scratch + 16), m->scratch_shadow = malloc(scratch + 16);
  m->lds_use = calloc(m->lds_bytes + 1, sizeof *m->lds_use);
  return m->waves && m->lds && m->lds_shadow && m->scratch && m->scratch_shadow && m->lds_use;
}

static void release(Machine *m) {
  free(m->waves), free(m->lds), free(m->lds_shadow), free(m->scratch), free(m->scratch_shadow), free(m->lds_use);
}

// Run the launch `m` describes.  0, or the failure's code with m->failure filled in.
u32 cdna_execute(Machine *m) {
  jmp_buf escape;
  if (!table_size) build_table();
  m->escape = &escape, m->last = 0, m->barrier_epoch = 0;
  if (!allocate(m)) {
    release(m);
    snprintf(m->failure.text, sizeof m->failure.text, "no memory for the workgroup's registers");
    return m->failure.code = ILLEGAL;
  }
  if (setjmp(escape)) {
    fesetround(FE_TONEAREST);
    release(m);
    return m->failure.code;
  }
  for (m->workgroup[2] = 0; m->workgroup[2] < m->grid[2]; ++m->workgroup[2])
    for (m->workgroup[1] = 0; m->workgroup[1] < m->grid[1]; ++m->workgroup[1])
      for (m->workgroup[0] = 0; m->workgroup[0] < m->grid[0]; ++m->workgroup[0]) run_workgroup(m);
  release(m);
  return OK;
}
