// The state of a CDNA compute unit that runs one workgroup, and what every part of the executor shares.
//
// Names: a wave has 64 lanes; v[] are its vector registers (0..255 VGPRs, 256..511 accumulation registers), s[] its
// scalar ones under their encoding (VCC 106, M0 124, EXEC 126).  A shadow has a one for every bit that nobody has
// defined; registers and memory that were never written start all ones.
#pragma once
#include <fenv.h>
#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;

enum { LANES = 64, VGPRS = 512, ACC = 256, MAX_WAVES = 16 };
enum { FLAT_SCRATCH = 102, VCC = 106, M0 = 124, EXEC = 126, LITERAL = 255, VGPR = 256 };

// -- decoded instructions (decode.py writes them) -------------------------------------------------

enum Encoding {
  SOP1, SOP2, SOPK, SOPC, SOPP, SMEM, VOP1, VOP2, VOPC, VOP3, VOP3SD, VOP3P, MFMA, DS, FLAT, GLOBAL, SCRATCH,
  MUBUF
};
enum Variant { PLAIN, DPP, SDWA };
enum Flags {
  SC0 = 1, NT = 2, SC1 = 4, TO_LDS = 8, OFFEN = 16, IDXEN = 32, SOFFSET = 64, HAS_SADDR = 128, IN_ACC = 256,
  GDS = 1024
};

typedef struct {
  u32 pc;        // byte offset in the code
  u16 op;        // index in the table of operations, 0 for one nobody knows
  u8 encoding, dwords;
  u16 src[3];    // operand codes; VGPR + n for vector registers
  u16 dst, sdst; // a VGPR number (or a scalar code, in scalar instructions); a scalar code
  u16 flags;
  u8 neg, abs, opsel, opsel_hi;  // one bit per source; in VOP3P abs is neg_hi
  u8 clamp, omod, variant, acc;  // acc of MFMA: 1 A, 2 B, 4 C and D are accumulation registers
  i32 imm;       // offset, immediate, or what a branch adds to the index of the next record
  u32 literal;   // a literal constant, or the second word of DPP and SDWA
  u16 scale[2];  // operand codes of an MFMA's block scales
} Inst;

// -- values of all lanes --------------------------------------------------------------------------

typedef union {
  u32 u[LANES];
  i32 i[LANES];
  float f[LANES];
  u64 q[LANES];
  i64 l[LANES];
  double d[LANES];
} Lanes;

// What an operand is: its width, how a modifier changes its sign, how a constant is extended.
// B32 are bits whose sign a modifier may change; K keeps the rest of the register; BYTE is one byte of it.
typedef enum { NONE, U32, B32, I32, F32, U64, I64, F64, U16, I16, F16, BF16, U24, I24, BOOL, U16K, F16K, BYTE } Type;

typedef struct Wave Wave;
typedef struct Machine Machine;
typedef struct Operation Operation;

// One lane-wise call: a, b, c to d; what does not fit there is in the context.
typedef struct {
  Wave *wave;
  const Inst *inst;
  u32 carry[LANES];  // a bit per lane, out
  int round16;       // rounding mode of float16 results
  int ulp;           // what approximations are off by
  bool fnuz;         // the part's 8-bit floats
} Context;

typedef void (*Lanewise)(const Lanes *restrict a, const Lanes *restrict b, const Lanes *restrict c, Lanes *restrict d,
                         Context *x);
typedef void (*Issue)(Machine *, Wave *, const Inst *, const Operation *);
typedef void (*Scalar)(u64 a, u64 b, u64 old, u64 *d, u32 *scc);

struct Operation {
  const char *name;
  Issue issue;
  Lanewise lanewise;
  Scalar scalar;
  u8 dst, src[3];  // Types
  u8 work;         // enum Work
  u8 bytes;        // of a memory access, per lane
  u8 detail;       // enum of the file that implements it
  u8 sources;      // how many of src are operands
};

// What statistics are kept by.
enum Work {
  SALU, BRANCH, SYNC, SMEM_LOAD, VALU, PACKED, CONVERT, TRANSCENDENTAL, CROSS_LANE, MATRIX, LDS, LOAD, STORE,
  ATOMIC, WORKS
};

// -- memory ---------------------------------------------------------------------------------------

typedef struct {
  u64 base, size;
  u8 *shadow;  // a byte for each byte, or null where all is defined
  u32 writable;
  u32 reserved;
} Allocation;

// -- errors ---------------------------------------------------------------------------------------

enum Error {
  OK, OUT_OF_BOUNDS, MISALIGNED, UNDEFINED, LDS_RACE, MISSING_WAIT, BUDGET, UNKNOWN, ILLEGAL, READ_ONLY, DEADLOCK
};

typedef struct {
  u32 code, pc, wave, workgroup[3];
  u64 lanes, address, bytes;
  char text[160];
} Failure;

// -- a wave, a workgroup, a launch ----------------------------------------------------------------

// Outstanding results: VM in order, LDS in order, SMEM in any order, FLAT counts as both and comes in any order.
enum Pending { SETTLED, BY_VM, BY_LDS, BY_FLAT, BY_SMEM };

struct Wave {
  union { u32 s[128]; u64 s64[64]; };
  u32 s_shadow[128];
  u32 scc, scc_shadow;
  u32 mode;
  u32 id;
  i64 next;  // index of the next record
  u32 ended, at_barrier;
  u32 vm_issued, vm_done, lds_issued, lds_done, lds_stored, smem_epoch, flat_vm_epoch, flat_lgkm_epoch;
  u32 smem_outstanding, flat_outstanding;
  u32 s_pending[128];  // smem_epoch + 1 of the load that writes it
  u8 pending[VGPRS];
  u32 pending_at[VGPRS], pending_lgkm_at[VGPRS];
  u64 undefined[VGPRS];  // lanes whose shadow is not zero
  u32 v[VGPRS][LANES];
  u32 v_shadow[VGPRS][LANES];
};

typedef struct {
  u32 epoch, writer, read_epoch, readers;
} LdsUse;

struct Machine {
  // What to run.
  const Inst *code;
  u64 records;
  const i32 *record_at;  // by pc / 4, -1 inside an instruction
  u64 code_bytes, code_address;
  const Allocation *allocations;
  u64 allocation_count;
  u32 grid[3], block[3];
  u32 vgprs, agprs, lds_bytes, scratch_bytes;
  u32 user_sgprs[32], user_sgpr_count;
  u32 workgroup_ids, mode;  // bit per dimension; initial MODE
  u64 entry;                // record
  u64 budget;
  i32 ulp;                  // what approximate instructions are off by
  u32 fnuz;                 // the part's 8-bit floats
  u32 checks;               // enum Checks
  // What comes of it.
  u64 executed, bytes_loaded, bytes_stored;
  u64 *waves_by_op, *lanes_by_op, *conflicts_by_op;
  Failure failure;
  // The workgroup at hand.
  u32 workgroup[3], wave_count, barrier_epoch;
  Wave *waves;
  u8 *lds, *lds_shadow, *scratch, *scratch_shadow;
  LdsUse *lds_use;
  const Allocation *last;
  jmp_buf *escape;
};

enum Checks { CHECK_UNDEFINED = 1, CHECK_RACES = 2, CHECK_WAITS = 4 };

static const u64 SHARED_APERTURE = 0x0001000000000000ull, PRIVATE_APERTURE = 0x0002000000000000ull;

static inline u64 exec_of(const Wave *w) { return w->s64[EXEC / 2]; }
static inline u32 shadow_of(u64 bits) { return bits ? ~0u : 0; }

_Noreturn void fail(Machine *m, const Wave *w, const Inst *in, u32 code, u64 lanes, const char *text, ...);

