// Reading operands and writing results: registers, constants, modifiers, and the checks that go with a read.
#pragma once
#include "numbers.h"

// One vector operand: the value of every lane, and which bits of it nobody defined.
typedef struct {
  const Lanes *value;
  bool dirty;      // some lane that counts has undefined bits
  Lanes own;       // where value points unless a register could be used in place
  Lanes shadow;    // meaningful if dirty
} Source;

u32 read_scalar(Machine *m, Wave *w, const Inst *in, u32 code, u32 *shadow);
u64 read_scalar64(Machine *m, Wave *w, const Inst *in, u32 code, Type type, u64 *shadow);
void write_scalar(Machine *m, Wave *w, const Inst *in, u32 code, u32 value, u32 shadow);
void write_scalar64(Machine *m, Wave *w, const Inst *in, u32 code, u64 value, u64 shadow);

void check_vgpr(Machine *m, Wave *w, const Inst *in, u32 reg);    // it exists, and nothing is on its way to it
void check_defined(Machine *m, Wave *w, const Inst *in, const Source *s, int words, u64 lanes, const char *what);
void fetch(Machine *m, Wave *w, const Inst *in, int which, Type type, u32 half, u64 lanes, Source *out);
void fetch_registers(Machine *m, Wave *w, const Inst *in, u32 reg, u32 lane_words, u64 lanes, Source *out);
void write_vgpr(Machine *m, Wave *w, const Inst *in, u32 reg, const u32 *value, const u32 *shadow, u64 lanes);

u64 dpp_lanes(const Wave *w, const Inst *in);  // those that an instruction with DPP writes

static inline int words_of(Type type) { return type == U64 || type == I64 || type == F64 ? 2 : 1; }
static inline bool is_half(Type type) {
  return type == U16 || type == I16 || type == F16 || type == BF16 || type == U16K || type == F16K;
}
static inline bool is_float(Type type) {
  return type == F32 || type == F64 || type == F16 || type == BF16 || type == F16K;
}

// Undefined result bits are those that change when the operation is run again with the undefined bits of its operands
// all zero, all one, or all flipped: exact for bits and selections, and near enough for arithmetic and comparisons.
enum Guess { ALL_ZERO, ALL_ONE, ALL_FLIPPED, GUESSES };

static inline u64 guess(u64 value, u64 shadow, enum Guess how) {
  return how == ALL_ZERO ? value & ~shadow : how == ALL_ONE ? value | shadow : value ^ shadow;
}

#define EACH_LANE(mask) \
  (u64 rest_ = (mask), lane = 0; rest_ && (lane = (u64)__builtin_ctzll(rest_), 1); rest_ &= rest_ - 1)
