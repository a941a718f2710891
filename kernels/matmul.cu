// The scaled product on NVIDIA GPUs: out[m, n] = bias[n] + the sum over the blocks g of 128 codes along K of
// a_scale[m, g] * b_scale[n / 128, g] times the product of block g of row m of a and row n of b.  WHOLE: the sum over
// all of K is scaled instead, by a_scale[m] (ONE_A: by one scale for all m) and b_scale[n / B_ROWS]; of INTEGERS, whose
// sums are exact, it is that alone.  HAS_RESIDUAL: residual[m, n] is added to the rounded result.
//
// Weights come in tiles of 128 rows x 128 codes, each contiguous and swizzled, so one bulk copy brings a tile that a
// matrix product can read.
//
//   thread groups  one of 128 threads copies blocks of both operands and their scales into the stages of a ring; two
//                  multiply, scale what a block sums up to, and add it.
//   few tokens     weights are the left operand, 64 rows for each of the two groups, and the tokens are the columns of the
//                  right one: 8 of them cost no idle rows.
//   128 tokens     are the left operand, 64 rows for each group: a thread has two rows and needs two scales of a block.
//   units          128 columns x TOKENS rows of the result.  As many workgroups as the machine holds go through them,
//                  and copies run ahead from one unit into the next.
//   teams          neighbours in a cluster, of one unit each, that `share` weights: each copies a part of a tile to
//                  all; or of one unit, that `split` K and add up their sums in the order of their ranks.
//
// Which plan (TOKENS, split, share) serves how many rows is said by PLANS, a list of P(up to rows, tokens, split,
// share); like all other macros that specialise this file it comes from lowering/families/matmul/cuda.py.

#define THREADS 384
#define INTEGERS (A_CODES == 3)
#include "mma.h"

#define BF16 1
#define F16 2
#define F32 3
#define ROW 0
#define COLUMN_TMA 1
#define COLUMN 2

constexpr int CREW = 128;             // threads that work together
constexpr int BLOCK = 128;            // codes along K that are summed up before they are scaled, and rows of weights
static_assert(WHOLE || (GROUP == BLOCK && B_ROWS == BLOCK), "a block is a row of shared memory");
constexpr int BLOCKS = K / BLOCK;
constexpr int WEIGHT_BYTES = BLOCK * BLOCK;
constexpr int COLUMN_TILES = (N + BLOCK - 1) / BLOCK;
constexpr int HALF = 64;              // rows of the left operand of one multiplying group
constexpr int PITCH = HALF + 4;       // floats between rows of sums: no two lanes in one bank when they write
constexpr int BAND = 8;               // tiles of tokens whose units come before all others

// Constants all: as values that a kernel picks they cost up to a tenth at few rows.
template <int TOKENS_, int SPLIT_, int SHARE_> struct Plan {
  static constexpr int TOKENS = TOKENS_, SPLIT = SPLIT_, SHARE = SHARE_;
  static constexpr int TEAM = SPLIT > SHARE ? SPLIT : SHARE;
  static_assert(SPLIT == 1 || SHARE == 1, "K is split, or weights are shared");
};

struct Product {
  const u8 *a, *b;
  const float *a_scale, *b_scale;
  const u8 *bias, *residual;
  u8 *out;
  int rows;

  METHOD bool aligned() const { return (u64)a % 16 == 0; }
};

// Where what lies in shared memory.
template <int TOKENS> struct Ring {
  static constexpr bool MANY = TOKENS > 64;            // the tokens are the left operand
  static constexpr int WIDTH = MANY ? BLOCK : TOKENS;  // columns of the right one
  static constexpr int TOKEN_BYTES = TOKENS * BLOCK;
  static constexpr int SCALES = TOKENS + 4;  // of the tokens, then that of the weights
  static constexpr int PASS = MANY ? HALF : TOKENS;  // tokens whose sums lie there at once, with 64 columns each
  static constexpr int SUMS = PASS * PITCH;
  static constexpr int STAGE = WEIGHT_BYTES + TOKEN_BYTES + 4 * SCALES + 2 * sizeof(Barrier);
  static constexpr int FIXED = 2 * 4 * SUMS + 4 * sizeof(Barrier);
  static constexpr int FITTING = (SHARED - FIXED) / STAGE;
  static constexpr int STAGES = FITTING < MOST_STAGES ? FITTING : MOST_STAGES;
  static_assert(STAGES >= 2, "the copies need to run ahead");

  u8 *memory;

  METHOD u8 *weights(u32 stage) const { return memory + stage * WEIGHT_BYTES; }
  METHOD u8 *tokens(u32 stage) const { return weights(STAGES) + stage * TOKEN_BYTES; }
  METHOD float *scales(u32 stage) const { return (float *)tokens(STAGES) + stage * SCALES; }
  METHOD float *sums(u32 half) const { return scales(STAGES) + half * SUMS; }
  METHOD Barrier *full(u32 stage) const { return (Barrier *)sums(2) + stage; }
  METHOD Barrier *empty(u32 stage) const { return full(STAGES) + stage; }
  METHOD Barrier *summed(u32 half) const { return empty(STAGES) + half; }
  METHOD Barrier *read(u32 half) const { return summed(2) + half; }
};

// Goes around the ring; the parity changes with every round.
template <int STAGES> struct Slot {
  u32 stage = 0, parity = 0;
  METHOD void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <class PLAN> using RingSlot = Slot<Ring<PLAN::TOKENS>::STAGES>;

template <typename T> struct alignas(16) Four {
  T x, y, z, w;
};

struct Unit {
  int column, token;  // of the result, the first
};

// This workgroup's part in the whole.
template <class PLAN> struct Team {
  u32 rank, base;    // among its team, and of the team's first in the cluster
  int first, units;  // units are first, first + step ..
  int step;
  int token_groups;

  // A cluster has as many teams as fit; who is in none has no units.
  METHOD Team(int rows) {
    constexpr int TEAMS = CLUSTER / PLAN::TEAM, TOKENS = PLAN::SHARE * PLAN::TOKENS;
    const int team = block() % CLUSTER / PLAN::TEAM;
    rank = block() % CLUSTER % PLAN::TEAM, base = team * PLAN::TEAM;
    token_groups = (rows + TOKENS - 1) / TOKENS, units = token_groups * COLUMN_TILES;
    first = team < TEAMS ? block() / CLUSTER * TEAMS + team : units;
    step = blocks() / CLUSTER * TEAMS;
  }
  // Bands of tokens that the L2 holds meet all weights, one tile of these after another.
  METHOD Unit unit(int index) const {
    const int band = index / (BAND * COLUMN_TILES), place = index % (BAND * COLUMN_TILES);
    const int left = token_groups - band * BAND, width = left < BAND ? left : BAND;
    const int group = band * BAND + place % width;
    return {place / width * BLOCK, (group * PLAN::SHARE + (PLAN::SHARE > 1 ? (int)rank : 0)) * PLAN::TOKENS};
  }
  METHOD int first_block() const { return PLAN::SPLIT > 1 ? rank * BLOCKS / PLAN::SPLIT : 0; }
  METHOD int last_block() const { return PLAN::SPLIT > 1 ? (rank + 1) * BLOCKS / PLAN::SPLIT : BLOCKS; }
};

// -- the group that copies -------------------------------------------------------------------------------------------

constexpr int CHUNKS = BLOCK / 16, STEP = CREW / CHUNKS;  // a thread copies a chunk of every STEP-th token

// Where this thread reads what it copies of a unit's next block.
struct Source {
  const u8 *tokens, *weights;
  const float *scale, *weight_scale;
  int left;  // tokens of the result from this thread's first on

  METHOD Source(const Product &p, Unit unit, int block) {
    const int row = thread() / CHUNKS, token = unit.token + thread();
    tokens = p.a + (u64)(unit.token + row) * K + block * BLOCK + thread() % CHUNKS * 16;
    weights = p.b + ((u64)unit.column / BLOCK * BLOCKS + block) * WEIGHT_BYTES;
    scale = p.a_scale + (A_SCALE_LAYOUT == ROW ? (u64)token * BLOCKS + block : (u64)block * pitch(p) + token);
    weight_scale = p.b_scale + unit.column / BLOCK * BLOCKS + block;
    left = p.rows - unit.token - row;
  }
  // Between the scales of one block and the next.
  static METHOD u32 pitch(const Product &p) {
    return A_SCALE_LAYOUT == ROW ? 1 : A_SCALE_LAYOUT == COLUMN ? p.rows : (p.rows + 3) / 4 * 4;
  }
  METHOD void next(u32 pitch) { tokens += BLOCK, weights += WEIGHT_BYTES, scale += pitch, ++weight_scale; }
};

template <int TOKENS> DEVICE void copy_tokens(const Source &source, u8 *to) {
  if (thread() >= TOKENS * CHUNKS) return;
  UNROLL for (int i = 0; i < TOKENS; i += STEP) copy16(to + i * BLOCK, source.tokens + (u64)i * K, i < source.left);
}

// What starts at no multiple of 16 goes through registers.
template <int TOKENS> DEVICE void copy_unaligned_tokens(const Source &source, u8 *to) {
  if (thread() >= TOKENS * CHUNKS) return;
  ROLLED for (int i = 0; i < TOKENS; i += STEP)
    for (int byte = 0; byte < 16; ++byte) to[i * BLOCK + byte] = i < source.left ? source.tokens[(u64)i * K + byte] : 0;
}

template <class PLAN> DEVICE void copy_weights(const Team<PLAN> &team, const u8 *from, u8 *to, Barrier *done) {
  arrive_expecting(done, WEIGHT_BYTES);
  if constexpr (PLAN::SHARE == 1) {
    copy_bulk(to, from, WEIGHT_BYTES, done);
  } else {
    constexpr u32 PART = WEIGHT_BYTES / PLAN::SHARE;
    const u32 start = team.rank * PART;
    copy_bulk_to(((1u << PLAN::SHARE) - 1) << team.base, to + start, from + start, PART, done);
  }
}

template <class PLAN> DEVICE void produce(const Product &p, const Team<PLAN> &team, Ring<PLAN::TOKENS> ring) {
  constexpr int TOKENS = PLAN::TOKENS;
  const u32 row = thread() / CHUNKS, place = row * BLOCK + (thread() % CHUNKS ^ row % 8) * 16, pitch = Source::pitch(p);
  const bool aligned = p.aligned();
  Slot<Ring<TOKENS>::STAGES> slot;
  ROLLED for (int index = team.first; index < team.units; index += team.step) {
    const Unit unit = team.unit(index);
    const bool there = unit.token + (int)thread() < p.rows;
    Source source(p, unit, team.first_block());
    ROLLED for (int block = team.first_block(); block < team.last_block(); ++block, slot.next(), source.next(pitch)) {
      Barrier *full = ring.full(slot.stage);
      float *scales = ring.scales(slot.stage);
      wait(ring.empty(slot.stage), slot.parity ^ 1);
      if (thread() == 0) copy_weights(team, source.weights, ring.weights(slot.stage), full);
      if (aligned) copy_tokens<TOKENS>(source, ring.tokens(slot.stage) + place);
      else copy_unaligned_tokens<TOKENS>(source, ring.tokens(slot.stage) + place);
      if (!WHOLE && thread() < TOKENS) copy4(scales + thread(), source.scale, there);
      if (!WHOLE && thread() == CREW - 1) copy4(scales + TOKENS, source.weight_scale, true);
      arrive_after_copies(full);
      if (!aligned) arrive(full);
    }
  }
}

// -- the groups that multiply ----------------------------------------------------------------------------------------

// partial = this thread's part of 64 rows times WIDTH columns, both of one block.
#if HAS_WGMMA
template <int WIDTH> DEVICE void begin_multiply(Sum *partial, const u8 *rows, const u8 *columns) {
  const u64 a = descriptor(rows), b = descriptor(columns);
  order_for_wgmma();
  wgmma_begin();
  UNROLL for (int k = 0; k < BLOCK / 32; ++k) wgmma<WIDTH>(partial, a + 2 * k, b + 2 * k, k > 0);
  wgmma_commit();
}
// Until that is done; `after` more have begun.
template <int WIDTH> DEVICE void end_multiply(Sum *partial, int after) { wgmma_wait<WIDTH / 2>(partial, after); }
#else
DEVICE const u8 *chunk_of(const u8 *tile, int row, int chunk) { return tile + row * BLOCK + (chunk ^ row % 8) * 16; }

template <int WIDTH> DEVICE void begin_multiply(Sum *partial, const u8 *rows, const u8 *columns) {
  const int lane = thread() % WAVE, wave = thread() % CREW / WAVE;
  UNROLL for (int i = 0; i < WIDTH / 2; ++i) partial[i] = 0;
  UNROLL for (int k = 0; k < BLOCK / 16; k += 4) {
    u32 a[2][4];
    UNROLL for (int i = 0; i < 2; ++i)
      load_matrices(chunk_of(rows, 16 * wave + lane % 16, k + 2 * i + lane / 16), a[i]);
    UNROLL for (int j = 0; j < WIDTH / 8; ++j) {
      u32 b[4];
      load_matrices(chunk_of(columns, 8 * j + lane % 8, k + lane / 8), b);
      multiply_add(partial + 4 * j, a[0], b);
      multiply_add(partial + 4 * j, a[1], b + 2);
    }
  }
}
template <int WIDTH> DEVICE void end_multiply(Sum *, int) {}
#endif

#include "finish.h"

// A stage may be written again: by those who write it, which are all that share weights.
template <class PLAN> DEVICE void release(Barrier *empty, const Team<PLAN> &team) {
  const u32 lane = thread() % WAVE;
  wave_barrier();
  if constexpr (PLAN::SHARE == 1) {
    if (lane == 0) arrive(empty);
  } else if (lane < PLAN::SHARE) {
    arrive_at_rank(empty, team.base + lane);
  }
}

template <int TOKENS>
DEVICE void begin_block(const Ring<TOKENS> &ring, Slot<Ring<TOKENS>::STAGES> slot, Sum *partial) {
  const u32 rows = (thread() / CREW - 1) * HALF * BLOCK;
  const u8 *weights = ring.weights(slot.stage), *tokens = ring.tokens(slot.stage);
  wait(ring.full(slot.stage), slot.parity);
  if constexpr (Ring<TOKENS>::MANY) begin_multiply<BLOCK>(partial, tokens + rows, weights);
  else begin_multiply<TOKENS>(partial, weights + rows, tokens);
}

// The scales of what a thread has of a block: of its two rows, or of its columns.
template <int TOKENS> DEVICE void load_scales(const float *scales, float *scale) {
  const u32 lane = thread() % WAVE;
  if constexpr (WHOLE) {
    UNROLL for (int i = 0; i < (Ring<TOKENS>::MANY ? 2 : TOKENS / 4); ++i) scale[i] = 1;
  } else if constexpr (Ring<TOKENS>::MANY) {
    const u32 row = (thread() / CREW - 1) * HALF + thread() % CREW / WAVE * 16 + lane / 4;
    scale[0] = scales[row] * scales[TOKENS], scale[1] = scales[row + 8] * scales[TOKENS];
  } else {
    UNROLL for (int i = 0; i < TOKENS / 4; i += 2) load2(scales + 4 * i + lane % 4 * 2, scale + i);
    UNROLL for (int i = 0; i < TOKENS / 4; ++i) scale[i] *= scales[TOKENS];
  }
}

// partial * scale + sum; of integers, which have no scales of blocks, partial + sum.
DEVICE Sum added(Sum partial, float scale, Sum sum) {
#if INTEGERS
  return partial + sum;
#else
  return fma(partial, scale, sum);
#endif
}

// Scale what a block sums up to and add it; `after` blocks more are being multiplied.
template <class PLAN>
DEVICE void end_block(const Team<PLAN> &team, const Ring<PLAN::TOKENS> &ring, u32 stage, int after, Sum *partial,
                      Sum *sums) {
  constexpr int TOKENS = PLAN::TOKENS, WIDTH = Ring<TOKENS>::WIDTH;
  float scale[Ring<TOKENS>::MANY ? 2 : TOKENS / 4];
  load_scales<TOKENS>(ring.scales(stage), scale);
  end_multiply<WIDTH>(partial, after);
  release(ring.empty(stage), team);
  UNROLL for (int i = 0; i < WIDTH / 2; ++i)
    sums[i] = added(partial[i], scale[Ring<TOKENS>::MANY ? i / 2 % 2 : i / 4 * 2 + i % 2], sums[i]);
}

// The next COUNT blocks; all are multiplied while the first is scaled.
template <int COUNT, class PLAN>
DEVICE void add_blocks(const Team<PLAN> &team, const Ring<PLAN::TOKENS> &ring, RingSlot<PLAN> &slot, Sum *sums) {
  Sum partial[COUNT][Ring<PLAN::TOKENS>::WIDTH / 2];
  u32 stage[COUNT];
  UNROLL for (int i = 0; i < COUNT; ++i, slot.next()) {
    stage[i] = slot.stage;
    begin_block(ring, slot, partial[i]);
  }
  UNROLL for (int i = 0; i < COUNT; ++i) end_block(team, ring, stage[i], COUNT - 1 - i, partial[i], sums);
}

#if HAS_WGMMA
// Begin the block after, and scale and add this one in between, once it is multiplied.
template <class PLAN>
DEVICE void add_and_begin(const Team<PLAN> &team, const Ring<PLAN::TOKENS> &ring, RingSlot<PLAN> &slot, Sum *partial,
                          Sum *next, Sum *sums) {
  const u32 rows = (thread() / CREW - 1) * HALF * BLOCK, stage = slot.stage;
  float scale[2];
  load_scales<PLAN::TOKENS>(ring.scales(stage), scale);
  end_multiply<BLOCK>(partial, 0);
  release(ring.empty(stage), team);
  slot.next();
  wait(ring.full(slot.stage), slot.parity);
  const u64 a = descriptor(ring.tokens(slot.stage) + rows), b = descriptor(ring.weights(slot.stage));
  order_for_wgmma();
  wgmma_begin();
  UNROLL for (int k = 0; k < BLOCK / 32; ++k) {
    wgmma<BLOCK>(next, a + 2 * k, b + 2 * k, k > 0);
    UNROLL for (int i = 16 * k; i < 16 * (k + 1); ++i) sums[i] = kept(added(partial[i], scale[i / 2 % 2], sums[i]));
  }
  wgmma_commit();
}

// `count` blocks, each added while the next is multiplied.
template <class PLAN>
DEVICE void add_overlapped(const Team<PLAN> &team, const Ring<PLAN::TOKENS> &ring, int count, RingSlot<PLAN> &slot,
                           Sum *sums) {
  Sum even[BLOCK / 2], odd[BLOCK / 2];
  begin_block(ring, slot, even);
  ROLLED for (; count > 2; count -= 2) {
    add_and_begin(team, ring, slot, even, odd, sums);
    add_and_begin(team, ring, slot, odd, even, sums);
  }
  if (count == 2) {
    add_and_begin(team, ring, slot, even, odd, sums);
    end_block(team, ring, slot.stage, 0, odd, sums);
  } else {
    end_block(team, ring, slot.stage, 0, even, sums);
  }
  slot.next();
}
#endif

template <class PLAN> DEVICE void consume(const Product &p, const Team<PLAN> &team, Ring<PLAN::TOKENS> ring) {
  constexpr int TOKENS = PLAN::TOKENS;
  constexpr int AT_ONCE = !HAS_WGMMA || TOKENS > 64 ? 1 : TOKENS > 32 ? 2 : 4;  // as registers suffice
  static_assert(AT_ONCE <= Ring<TOKENS>::STAGES, "their stages are all in use");
  RingSlot<PLAN> slot;
  u32 parity = 0;  // of the meetings of a team
  ROLLED for (int index = team.first; index < team.units; index += team.step) {
    Sum sums[Ring<TOKENS>::WIDTH / 2] = {};
    int left = team.last_block() - team.first_block();
#if HAS_WGMMA
    if constexpr (Ring<TOKENS>::MANY) add_overlapped(team, ring, left, slot, sums), left = 0;
#endif
    ROLLED for (; left >= AT_ONCE; left -= AT_ONCE) add_blocks<AT_ONCE>(team, ring, slot, sums);
    ROLLED for (; AT_ONCE > 1 && left > 0; --left) add_blocks<1>(team, ring, slot, sums);
    const Unit unit = team.unit(index);
    const int half = (thread() / CREW - 1) * HALF;
    if constexpr (Ring<TOKENS>::MANY) {
      const Finish<PLAN> left_columns(p, team, {unit.column, unit.token + half});
      const Finish<PLAN> right_columns(p, team, {unit.column + HALF, unit.token + half});
      finish(p, team, ring, left_columns, parity, sums);
      finish(p, team, ring, right_columns, parity ^ 1, sums + HALF / 2);
    } else {
      finish(p, team, ring, Finish<PLAN>(p, team, {unit.column + half, unit.token}), parity, sums);
      parity ^= 1;
    }
  }
}

// -- the entry -----------------------------------------------------------------------------------------------------

template <class PLAN> DEVICE void make_barriers(const Product &p, Ring<PLAN::TOKENS> ring) {
  for (int stage = 0; stage < Ring<PLAN::TOKENS>::STAGES; ++stage) {
    barrier_init(ring.full(stage), CREW * (p.aligned() ? 1 : 2) + 1);
    barrier_init(ring.empty(stage), 2 * CREW / WAVE * PLAN::SHARE);
  }
  for (u32 half = 0; half < 2; ++half)
    barrier_init(ring.summed(half), PLAN::SPLIT), barrier_init(ring.read(half), PLAN::SPLIT);
  barriers_made();
}

// The others' barriers are there.
DEVICE void meet_cluster() {
  if constexpr (CLUSTER > 1) cluster_wait();
}

template <class PLAN> DEVICE void run(const Product &p) {
  const Ring<PLAN::TOKENS> ring = {shared_memory()};
  const Team<PLAN> team(p.rows);
  if (thread() == 0) make_barriers<PLAN>(p, ring);
  barrier();
  if constexpr (CLUSTER > 1) cluster_arrive();
  if (thread() < CREW) {
    give_registers<40>();
    if constexpr (PLAN::SHARE > 1) meet_cluster();  // else it need not wait for anyone
    produce(p, team, ring);
    if constexpr (PLAN::SHARE == 1) meet_cluster();
  } else {
    take_registers<232>();
    meet_cluster();
    consume(p, team, ring);
  }
  // Shared memory stays until nobody reads or writes it any more.
  if constexpr (CLUSTER > 1) cluster_arrive(), cluster_wait();
}

KERNEL(ENTRY)(const u8 *a, const u8 *b, const float *a_scale, const float *b_scale,
#if HAS_BIAS
              const u8 *bias,
#endif
#if HAS_RESIDUAL
              const u8 *residual,
#endif
              u8 *out, int rows) {
#if !HAS_BIAS
  const u8 *bias = nullptr;
#endif
#if !HAS_RESIDUAL
  const u8 *residual = nullptr;
#endif
  if (rows <= 0) return;
  const Product product = {a, b, a_scale, b_scale, bias, residual, out, rows};
#define P(up_to, tokens, split, share) \
  if (rows <= up_to) return run<Plan<tokens, split, share>>(product);
  PLANS
#undef P
}
