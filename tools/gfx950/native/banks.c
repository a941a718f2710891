// LDS banks: how many turns an instruction takes beyond those it has to.
//
// LDS is made of banks of dwords.  An instruction takes a fixed number of turns, each for some of the lanes, and a turn
// as many more as the bank that is asked for most has different dwords to give, less one; lanes that read the same dword
// share it.  Which lanes have a turn together was measured on an MI355X and an MI300X by others, for accesses of 8 and 16
// bytes (HipKittens' phase solver; AMD's article on CK-Tile and bank conflicts); those of 4 and fewer are taken to follow.
//   reads of gfx950     64 banks: of 16 bytes the quads of 32 lanes with an even and an odd number of bits; of 8 bytes
//                       32 lanes; of less, all
//   reads of gfx942     32 banks: of 16 bytes quad q and q ^ 5 of 32 lanes; of 8 bytes 16 lanes; of less, 32
//   writes              32 banks: of 16 bytes 8 lanes, of 8 bytes 16, of less 32
#include "access.h"

enum { TURNS = 8, BANKS = 64 };

static u32 turn_of(u32 lane, u32 bytes, bool write, bool gfx942) {
  const u32 half = lane / 32, quad = lane % 32 / 4;
  if (write) return bytes > 8 ? lane / 8 : bytes > 4 ? lane / 16 : half;
  if (bytes <= 8) return gfx942 ? (bytes > 4 ? lane / 16 : half) : (bytes > 4 ? half : 0);
  if (gfx942) return half * 4 + (quad < 4 ? quad : quad ^ 5);
  return half * 2 + (u32)__builtin_popcount(quad) % 2;
}

typedef struct {
  u32 dwords[TURNS][BANKS][LANES];  // the different ones asked for
  u32 count[TURNS][BANKS];
} Asked;

static void ask(Asked *asked, u32 turn, u32 dword, u32 banks) {
  u32 *count = &asked->count[turn][dword % banks], *dwords = asked->dwords[turn][dword % banks];
  for (u32 i = 0; i < *count; ++i)
    if (dwords[i] == dword) return;
  if (*count < LANES) dwords[(*count)++] = dword;
}

void count_conflicts(Machine *m, const Inst *in, const Operation *op, const Addresses *a, bool write) {
  static _Thread_local Asked asked;
  const u32 banks = write || m->fnuz ? 32 : 64;
  memset(asked.count, 0, sizeof asked.count);
  for EACH_LANE(a->lanes)
    for (u64 at = a->address[lane] / 4; at * 4 < a->address[lane] + op->bytes; ++at)
      ask(&asked, turn_of((u32)lane, op->bytes, write, m->fnuz), (u32)at, banks);
  for (u32 turn = 0; turn < TURNS; ++turn) {
    u32 most = 1;
    for (u32 bank = 0; bank < banks; ++bank) most = asked.count[turn][bank] > most ? asked.count[turn][bank] : most;
    m->conflicts_by_op[in->op] += most - 1;
  }
}
