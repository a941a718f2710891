// The product of floats with packed integers on NVIDIA GPUs: out[m, n] = bias[n] + the sum over k of a[m, k] * w[n, k],
// w = (code - zero) * scale, rounded to the dtype of the scales and then to that of a.  HAS_RESIDUAL: residual[m, n] is
// added to the rounded result.
//
// Few rows take as long as the codes do to arrive, so these go from global memory straight to the registers they are
// multiplied from, and all else fits beside: b as shuffle_weight(b, (16, 16)) lays its bytes out has 16 bytes of a row in
// one piece, which a lane unpacks by itself.
//
//   columns     weights are the left operand of a matrix instruction, 16 rows of b; the tokens, 8 to TOKENS of them, are
//               the columns of the right one.  Where k lies does not matter as long as both agree: of a block a lane
//               multiplies a chunk of its own, and a chunk lies in one group.
//   tokens      of more than 8, up to STAGED_TOKENS, a wave copies to shared memory, a block ahead: lines of them arrive
//               whole, and lanes, which each want another chunk, read from all banks at once.
//   unit        COLUMNS of the result x TOKENS rows, a workgroup's.  ACROSS waves stand beside each other; ALONG of
//               them, and the workgroups of a TEAM, take every so-manieth block of K, and add up their sums in the
//               order of their ranks.  Up to MOST_SPLIT rows a team is a cluster, beyond there are workgroups enough.
//
// The macros that specialise this file come from lowering/families/packed.py.

#define THREADS (32 * ACROSS * ALONG)
#include "mma.h"

#define BF16 1
#define F16 2
#define F32 3

constexpr int SIDE = 16;                         // rows of b in an instruction
constexpr int CODES = 128 / BITS;                // of a chunk
constexpr int CHUNKS = 4, BLOCK = CHUNKS * CODES;  // of a row, read together
constexpr int BLOCKS = K / BLOCK;
constexpr int ROW_BYTES = K / 8 * BITS;
constexpr int COLUMNS = SIDE * TILES * ACROSS;
constexpr int COLUMN_GROUPS = (N + COLUMNS - 1) / COLUMNS, COLUMN_TILES = (N + SIDE - 1) / SIDE;
constexpr int MOST_SPLIT = 32, STAGED_TOKENS = 16;
constexpr int PITCH = COLUMNS + 4;               // floats between rows of sums: no two lanes in one bank when they write
constexpr int BAND = 8;                          // groups of tokens whose units come before all others
static_assert(K % BLOCK == 0 && SCALED % CODES == 0, "a chunk lies in a group");
static_assert(TILES <= COLUMN_TILES, "a wave has whole tiles");

// Values are unpacked in pairs of 16 bits where that rounds as it should, else in float32.
constexpr bool IN_PAIRS = SCALE_DTYPE == OUT_DTYPE && (BITS == 4 || OUT_DTYPE == F16);

struct Product {
  const u8 *a, *b, *scale, *zero, *bias, *residual;
  u8 *out;
  int rows;
};

// -- weights -------------------------------------------------------------------------------------------------------

// What the codes of a lane's chunk have in common: pairs of 16 bits, or floats.
struct Grid {
  u32 scale, zero;
};

// Of a block and TILES times 16 columns: rows lane / 4 of b and the ones 8 below, the chunk lane % 4.  A zero point lies
// above a scale of 16 bits.
struct Stage {
  u32 codes[TILES][2][4];
  u32 scale[TILES][2], zero[TILES][2];

  METHOD u32 scale_of(int j, int i) const { return SCALE_DTYPE == F32 ? scale[j][i] : scale[j][i] & 0xffff; }
  METHOD u32 zero_of(int j, int i) const { return SCALE_DTYPE == F32 ? zero[j][i] : scale[j][i] >> 16; }
};

DEVICE u32 twice(u32 half) { return half | half << 16; }
DEVICE u32 pack(float low, float high, int dtype) { return dtype == BF16 ? pack_bf16(low, high) : pack_f16(low, high); }
DEVICE float value(u32 half, int dtype) { return dtype == BF16 ? bf16_value(half) : f16_value(half); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

// A code beside these bits is a number: 128 or 1024 and the code, or 2^23 and the code.
constexpr u32 PAIR = OUT_DTYPE == BF16 ? 0x43004300 : 0x64006400, SINGLE = 0x4b000000;
constexpr float BASE = !IN_PAIRS ? 8388608 : OUT_DTYPE == BF16 ? 128 : 1024;
// Whether the base and a zero point are one 16-bit number.
constexpr bool ZERO_APART = HAS_ZERO && OUT_DTYPE == BF16;

DEVICE Grid grid_of(u32 scale, u32 zero) {
  const float least = HAS_ZERO ? zero : 1 << (BITS - 1);
  if constexpr (IN_PAIRS) {
    const float off = ZERO_APART ? least : BASE + least;
    return {twice(scale), pack(off, off, OUT_DTYPE)};
  } else {
    return {SCALE_DTYPE == F32 ? scale : as_bits(value(scale, SCALE_DTYPE)), as_bits(BASE + least)};
  }
}

DEVICE Stage load_stage(const Product &p, int tile, int block) {
  Stage stage;
  const int lane = thread() % WAVE, chunk = block * CHUNKS + lane % CHUNKS;
  const u8 *codes = p.b + (u64)tile * (SIDE * ROW_BYTES) + chunk * 256 + lane / CHUNKS * 16;
  const int first = tile * SIDE + lane / CHUNKS;
  const u64 group = (u64)(chunk * CODES / SCALED) * N + first;
  UNROLL for (int j = 0; j < TILES; ++j) {
    UNROLL for (int i = 0; i < 2; ++i) load16_once(codes + j * (SIDE * ROW_BYTES) + 128 * i, stage.codes[j][i]);
    UNROLL for (int i = 0; i < 2; ++i) {
      const int n = SIDE * j + 8 * i;  // those beyond the last column have the last one's
      const u64 at = group + (N % SIDE == 0 || first + n < N ? n : N - 1 - first);
      const u32 zero = HAS_ZERO ? p.zero[at] : 0;
      if constexpr (SCALE_DTYPE == F32) stage.scale[j][i] = ((const u32 *)p.scale)[at], stage.zero[j][i] = zero;
      else stage.scale[j][i] = ((const u16 *)p.scale)[at] | zero << 16;
    }
  }
  return stage;
}

// Eight codes are a word of four bits each, whose pairs are 4 apart, or two words of eight, whose pairs are neighbours.
constexpr int OCTETS = CODES / 8, WORDS = BITS / 4;

DEVICE u32 pair_of_codes(const u32 *words, int pair) {
  if constexpr (BITS == 4) return (words[0] >> 4 * pair & 0x000f000f) | PAIR;
  else return bytes_of(words[pair / 2], PAIR, pair % 2 ? 0x5352 : 0x5150);
}

DEVICE float single_code(const u32 *words, int pair, int which) {
  if constexpr (BITS == 4) return as_float((words[0] >> 4 * (pair + 4 * which) & 15) | SINGLE);
  else return as_float(bytes_of(words[pair / 2], SINGLE, 0x7440 + pair % 2 * 2 + which));
}

// Pair `pair` of the weights of eight codes.
DEVICE u32 weights(const u32 *words, int pair, Grid grid) {
  if constexpr (IN_PAIRS && OUT_DTYPE == BF16) {
    u32 codes = pair_of_codes(words, pair);
    if constexpr (ZERO_APART) codes = subtract_bf16(codes, PAIR);
    return multiply_bf16(subtract_bf16(codes, grid.zero), grid.scale);
  } else if constexpr (IN_PAIRS) {
    return multiply_f16(subtract_f16(pair_of_codes(words, pair), grid.zero), grid.scale);
  } else {
    float both[2];
    UNROLL for (int i = 0; i < 2; ++i)
      both[i] = (single_code(words, pair, i) - as_float(grid.zero)) * as_float(grid.scale);
    if constexpr (SCALE_DTYPE != F32 && SCALE_DTYPE != OUT_DTYPE) {
      const u32 rounded = pack(both[0], both[1], SCALE_DTYPE);
      both[0] = value(rounded & 0xffff, SCALE_DTYPE), both[1] = value(rounded >> 16, SCALE_DTYPE);
    }
    return pack(both[0], both[1], OUT_DTYPE);
  }
}

// -- tokens ----------------------------------------------------------------------------------------------------------

// Eight elements of a token, in the pairs of the weights.
DEVICE void pair_up(const u32 *words, u32 *pairs) {
  UNROLL for (int pair = 0; pair < 4; ++pair)
    pairs[pair] = BITS == 8 ? words[pair] : bytes_of(words[pair / 2], words[pair / 2 + 2], pair % 2 ? 0x7632 : 0x5410);
}

// Those of a token from k on.
template <bool ALIGNED> DEVICE void load_token(const Product &p, int token, int k, u32 *pairs) {
  const u8 *from = p.a + ((u64)token * K + k) * 2;
  u32 words[4];
  if constexpr (ALIGNED) load16(from, words);
  else UNROLL for (int i = 0; i < 4; ++i) words[i] = ((const u16 *)from)[2 * i] | ((const u16 *)from)[2 * i + 1] << 16;
  pair_up(words, pairs);
}

// A wave's tokens of a block: 16 bytes are a piece, of which a token has PIECES.
constexpr int PIECES = CHUNKS * OCTETS, TOKENS_AT_ONCE = WAVE / PIECES;

DEVICE u8 *staged_tokens() { return shared_memory() + thread() / WAVE * (STAGED_TOKENS * PIECES * 16); }

// Where a token has a piece: lanes 0 to 7, which read together, have 2 tokens and 4 chunks, and find them in 8 places.
DEVICE int place_of(int token, int piece) { return (token * PIECES + (piece ^ piece / 8 * 2 ^ token % 2)) * 16; }

// Begin to copy the tokens of a block, zeros for those that are not there.
template <int TOKENS> DEVICE void copy_tokens(const Product &p, int first, int block) {
  const int lane = thread() % WAVE, piece = lane % PIECES, begin = lane / PIECES;
  const u8 *from = p.a + ((u64)(first + begin) * K + block * BLOCK) * 2 + piece * 16;
  UNROLL for (int i = 0; i < TOKENS; i += TOKENS_AT_ONCE)
    copy16(staged_tokens() + place_of(begin + i, piece), from + (u64)i * K * 2, first + begin + i < p.rows);
}

// An octet of the chunk and of the token, counted from the first, that this lane multiplies.
DEVICE void load_staged(int token, int octet, u32 *pairs) {
  u32 words[4];
  load16_shared(staged_tokens() + place_of(token, thread() % CHUNKS * OCTETS + octet), words);
  pair_up(words, pairs);
}

DEVICE void add_products(float *sums, const u32 *columns, const u32 *tokens) {
  if constexpr (OUT_DTYPE == BF16) multiply_add_bf16(sums, columns, tokens);
  else multiply_add_f16(sums, columns, tokens);
}

// sums += the products of an octet of a block with TOKEN_TILES times 8 tokens, lane / 4 of each.
template <int TOKEN_TILES>
DEVICE void add_octet(const Stage &stage, int octet, const u32 right[TOKEN_TILES][4],
                      float sums[TILES][TOKEN_TILES][4]) {
  UNROLL for (int j = 0; j < TILES; ++j) {
    Grid grid[2];
    UNROLL for (int i = 0; i < 2; ++i) grid[i] = grid_of(stage.scale_of(j, i), stage.zero_of(j, i));
    UNROLL for (int half = 0; half < 2; ++half) {
      u32 left[4];
      UNROLL for (int i = 0; i < 4; ++i)
        left[i] = weights(stage.codes[j][i % 2] + octet * WORDS, 2 * half + i / 2, grid[i % 2]);
      UNROLL for (int i = 0; i < TOKEN_TILES; ++i) add_products(sums[j][i], left, right[i] + 2 * half);
    }
  }
}

// -- results ---------------------------------------------------------------------------------------------------------

DEVICE float *sums_of(int part) { return (float *)shared_memory() + part * (8 * PITCH); }

// Two neighbours in a row of the result, of which as many are stored as there are.
DEVICE void store2(const Product &p, int token, int n, float low, float high) {
  if (token >= p.rows || n >= N) return;
  const bool both = n + 1 < N;
  if constexpr (HAS_BIAS) {
    low += value(((const u16 *)p.bias)[n], OUT_DTYPE);
    if (both) high += value(((const u16 *)p.bias)[n + 1], OUT_DTYPE);
  }
  u32 word = pack(low, high, OUT_DTYPE);
  const u64 at = (u64)token * N + n;
#if HAS_RESIDUAL
  const u16 *from = (const u16 *)p.residual + at;
  low = value(word & 0xffff, OUT_DTYPE) + value(from[0], OUT_DTYPE);
  if (both) high = value(word >> 16, OUT_DTYPE) + value(from[1], OUT_DTYPE);
  word = pack(low, high, OUT_DTYPE);
#endif
  u16 *to = (u16 *)p.out + at;
  if (both && (u64)to % 4 == 0) {
    *(u32 *)to = word;
  } else {
    to[0] = word;
    if (both) to[1] = word >> 16;
  }
}

// The sums of 8 tokens from `token` on and all columns of the unit, those of the waves first, then those of a team.
template <int TEAM> DEVICE void finish(const Product &p, int token, int column) {
  constexpr int PAIRS = 8 * COLUMNS / 2;
  barrier();
  ROLLED for (int item = thread(); item < PAIRS; item += THREADS) {
    const int at = item / (COLUMNS / 2) * PITCH + item % (COLUMNS / 2) * 2;
    float low = sums_of(0)[at], high = sums_of(0)[at + 1];
    UNROLL for (int part = 1; part < ALONG; ++part) low += sums_of(part)[at], high += sums_of(part)[at + 1];
    if constexpr (TEAM > 1) sums_of(0)[at] = low, sums_of(0)[at + 1] = high;
    else store2(p, token + item / (COLUMNS / 2), column + item % (COLUMNS / 2) * 2, low, high);
  }
  if constexpr (TEAM > 1) {
    cluster_arrive(), cluster_wait();
    ROLLED for (int item = thread() * TEAM + block() % TEAM; item < PAIRS; item += THREADS * TEAM) {
      const int at = item / (COLUMNS / 2) * PITCH + item % (COLUMNS / 2) * 2;
      float low = 0, high = 0;
      UNROLL for (int rank = 0; rank < TEAM; ++rank) {
        const float *there = at_rank(sums_of(0), rank) + at;
        low += there[0], high += there[1];
      }
      store2(p, token + item / (COLUMNS / 2), column + item % (COLUMNS / 2) * 2, low, high);
    }
    cluster_arrive(), cluster_wait();
  } else {
    barrier();
  }
}

// -- the entry -------------------------------------------------------------------------------------------------------

struct Unit {
  int column, token;  // of the result, the first
};

// Bands of tokens that the L2 holds meet all weights, one group of columns after another.
DEVICE Unit unit_of(int team, int groups, int tokens) {
  const int band = team / (BAND * COLUMN_GROUPS);
  const int place = team % (BAND * COLUMN_GROUPS), left = groups - band * BAND, width = left < BAND ? left : BAND;
  return {place / width * COLUMNS, (band * BAND + place % width) * tokens};
}

template <int TOKEN_TILES, bool ALIGNED, int TEAM> DEVICE void run(const Product &p) {
  constexpr int TOKENS = 8 * TOKEN_TILES, PARTS = TEAM * ALONG;
  // With few sums there are registers for two stages, and for more octets of tokens than one.
  constexpr bool AHEAD = TILES * TOKEN_TILES <= 4, STAGED = ALIGNED && TOKENS > 8 && TOKENS <= STAGED_TOKENS;
  constexpr int AT_ONCE = TOKEN_TILES < 4 ? OCTETS : 1;
  const int lane = thread() % WAVE, wave = thread() / WAVE, across = wave % ACROSS, along = wave / ACROSS;
  const int groups = (p.rows + TOKENS - 1) / TOKENS, team = block() / TEAM;
  if (team >= groups * COLUMN_GROUPS) return;
  const Unit unit = unit_of(team, groups, TOKENS);
  // The last waves have tiles of those before them as well, rather than fewer.
  const int end = unit.column / SIDE + across * TILES, most = COLUMN_TILES - TILES, tile = end < most ? end : most;
  const int part = block() % TEAM * ALONG + along;
  int tokens[TOKEN_TILES];
  UNROLL for (int i = 0; i < TOKEN_TILES; ++i) {
    const int token = unit.token + 8 * i + lane / 4;
    tokens[i] = token < p.rows ? token : p.rows - 1;  // nobody stores what comes of it
  }
  float sums[TILES][TOKEN_TILES][4] = {};
  Stage stage;
  if (STAGED && part < BLOCKS) copy_tokens<TOKENS>(p, unit.token, part);
  if (AHEAD && part < BLOCKS) stage = load_stage(p, tile, part);
  ROLLED for (int block = part; block < BLOCKS; block += PARTS) {
    Stage next;
    const bool last = block + PARTS >= BLOCKS;
    if (AHEAD) next = load_stage(p, tile, last ? block : block + PARTS);
    else stage = load_stage(p, tile, block);
    u32 rights[AT_ONCE][TOKEN_TILES][4];
    if constexpr (STAGED) {
      wait_for_copies(), wave_barrier();
      UNROLL for (int octet = 0; octet < OCTETS; ++octet)
        UNROLL for (int i = 0; i < TOKEN_TILES; ++i) load_staged(8 * i + lane / CHUNKS, octet, rights[octet][i]);
      wave_barrier();
      if (!last) copy_tokens<TOKENS>(p, unit.token, block + PARTS);
    }
    UNROLL for (int octet = 0; octet < OCTETS; ++octet) {
      if (!STAGED && octet % AT_ONCE == 0) {
        const int k = (block * CHUNKS + lane % CHUNKS) * CODES + 8 * octet;
        UNROLL for (int more = 0; more < AT_ONCE; ++more)
          UNROLL for (int i = 0; i < TOKEN_TILES; ++i) load_token<ALIGNED>(p, tokens[i], k + 8 * more, rights[more][i]);
      }
      add_octet<TOKEN_TILES>(stage, octet, rights[octet % AT_ONCE], sums);
    }
    if (AHEAD) stage = next;
  }
  if (STAGED) barrier();  // the sums lie where the tokens did
  UNROLL for (int i = 0; i < TOKEN_TILES; ++i) {
    UNROLL for (int j = 0; j < TILES; ++j) {
      const int column = (tile + j) * SIDE - unit.column;
      if (column < across * TILES * SIDE) continue;  // another wave's
      float *mine = sums_of(along) + column + lane / 4;
      UNROLL for (int r = 0; r < 4; ++r) mine[(lane % 4 * 2 + r % 2) * PITCH + r / 2 * 8] = sums[j][i][r];
    }
    finish<TEAM>(p, unit.token + 8 * i, unit.column);
  }
}

KERNEL(ENTRY)(const u8 *a, const u8 *b, const u8 *scale,
#if HAS_ZERO
              const u8 *zero,
#endif
#if HAS_BIAS
              const u8 *bias,
#endif
#if HAS_RESIDUAL
              const u8 *residual,
#endif
              u8 *out, int rows) {
#if !HAS_ZERO
  const u8 *zero = nullptr;
#endif
#if !HAS_BIAS
  const u8 *bias = nullptr;
#endif
#if !HAS_RESIDUAL
  const u8 *residual = nullptr;
#endif
  if (rows <= 0) return;
  const Product product = {a, b, scale, zero, bias, residual, out, rows};
  if ((u64)a % 16) run<4, false, 1>(product);
  else if (rows <= 8) run<1, true, CLUSTER>(product);
  else if (rows <= 16) run<2, true, CLUSTER>(product);
  else if (rows <= MOST_SPLIT) run<4, true, CLUSTER>(product);
  else run<4, true, 1>(product);
}
