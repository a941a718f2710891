// Memory as instructions see it: checked bytes of an address space, and moves between them and registers.
#pragma once
#include "operands.h"

typedef enum { IN_MEMORY, IN_SCRATCH, IN_LDS } Space;
typedef struct { u8 *at, *shadow; } Place;  // shadow null: all is defined

// How registers and memory correspond.
enum Layout { SIGN_EXTENDED = 1, HALF_KEPT = 2, HIGH_HALF = 4 };

typedef struct {
  u64 address[LANES];
  Space space[LANES];
  u64 lanes;        // that take part
  u64 beyond;       // those of them a buffer's bounds exclude: loads give zeros, stores do nothing
  u8 within[LANES]; // bytes that its bounds leave of the others' loads and stores, which they cut by the dword
} Addresses;

// Bytes that an access of a lane moves.
static inline u32 within(const Addresses *a, u32 lane, const Operation *op) {
  return a->within[lane] < op->bytes ? a->within[lane] : op->bytes;
}

Place locate(Machine *m, Wave *w, const Inst *in, Space space, u32 lane, u64 address, u32 bytes, bool write);
void load_lanes(Machine *m, Wave *w, const Inst *in, const Operation *op, const Addresses *a, u32 reg);
void store_lanes(Machine *m, Wave *w, const Inst *in, const Operation *op, const Addresses *a, u32 reg);
void atomic_lanes(Machine *m, Wave *w, const Inst *in, const Operation *op, const Addresses *a, u32 data, u32 compare,
                  u32 result);
// Adds the turns that lanes lose to each other at LDS banks.
void count_conflicts(Machine *m, const Inst *in, const Operation *op, const Addresses *a, bool write);
void mark_pending(Machine *m, Wave *w, u32 reg, u32 count, enum Pending by);

static const u32 NO_REGISTER = ~0u;

enum Atomic {
  A_SWAP, A_CMPSWAP, A_ADD, A_SUB, A_RSUB, A_SMIN, A_UMIN, A_SMAX, A_UMAX, A_AND, A_OR, A_XOR, A_INC, A_DEC,
  A_ADD_F, A_MIN_F, A_MAX_F, A_PK_ADD_F16, A_PK_ADD_BF16
};
