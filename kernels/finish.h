// How kernels/matmul.cu, which includes this behind what it stands on, finishes the sums of a unit: they meet in shared
// memory, are scaled where scales are of whole rows, get the bias and the residual, and are stored.

// An element of the dtype of the result.
DEVICE float element(const u8 *from, u64 index) {
#if OUT_DTYPE == F32
  return ((const float *)from)[index];
#elif OUT_DTYPE == F16
  return f16_value(((const u16 *)from)[index]);
#else
  return bf16_value(((const u16 *)from)[index]);
#endif
}

// As the dtype of the result has it.
DEVICE float as_stored(float value) {
#if OUT_DTYPE == F32
  return value;
#elif OUT_DTYPE == F16
  return f16_value(pack_f16(value, value));
#else
  return bf16_value(pack_bf16(value, value));
#endif
}

// What a thread multiplies and adds to the sums that it stores: of its eight columns, which are the same in every row,
// and of its rows.  Loaded all at once, before sums are exchanged, so that nothing is stored late for them.
template <class PLAN> struct Finish {
  static constexpr int PASS = Ring<PLAN::TOKENS>::PASS, ITEMS = PASS * HALF / 8, STEP = CREW * PLAN::SPLIT;
  static constexpr int TURNS = (ITEMS + STEP - 1) / STEP;
  static_assert(STEP % 8 == 0, "a thread stays in its columns");

  float column_scales[8], bias[8], token_scales[TURNS];
  Unit unit;  // of PASS tokens and 64 columns
  u32 first;  // the item this thread begins with
  int column, count;

  METHOD Finish(const Product &p, const Team<PLAN> &team, Unit unit_) {
    unit = unit_, first = thread() % CREW * PLAN::SPLIT + (PLAN::SPLIT > 1 ? team.rank : 0);
    column = unit.column + first % 8 * 8, count = N - column < 8 ? N - column : 8;
    if constexpr (WHOLE) load_scales(p);
    UNROLL for (int i = 0; i < 8; ++i) bias[i] = HAS_BIAS && i < count ? element(p.bias, column + i) : 0;
  }
  METHOD int token(int turn) const { return (first + turn * STEP) / 8; }
  METHOD bool there(const Product &p, int turn) const {
    return first + turn * STEP < ITEMS && unit.token + token(turn) < p.rows && count > 0;
  }

  METHOD void load_scales(const Product &p) {
    const float *from = p.b_scale + column;
    UNROLL for (int i = 0; i < TURNS; ++i)
      token_scales[i] = ONE_A ? p.a_scale[0] : there(p, i) ? p.a_scale[unit.token + token(i)] : 0;
    if (B_ROWS == 1 && count == 8 && (u64)from % 16 == 0) {
      UNROLL for (int i = 0; i < 8; i += 4) {
        const auto four = *(const Four<float> *)(from + i);
        column_scales[i] = four.x, column_scales[i + 1] = four.y;
        column_scales[i + 2] = four.z, column_scales[i + 3] = four.w;
      }
    } else {
      UNROLL for (int i = 0; i < 8; ++i) column_scales[i] = i < count ? p.b_scale[(column + i) / B_ROWS] : 0;
    }
  }

  // Round eight neighbours in a row and add the residual's from `from` on.
  METHOD void add_residual(const u8 *from, float *values) const {
    constexpr int BYTES = OUT_DTYPE == F32 ? 4 : 2;
    u32 words[2 * BYTES];
    if (count == 8 && (u64)from % 16 == 0) {
      UNROLL for (int i = 0; i < 2 * BYTES; i += 4) load16(from + 4 * i, words + i);
      UNROLL for (int i = 0; i < 8; ++i) values[i] = as_stored(values[i]) + element((const u8 *)words, i);
    } else {
      UNROLL for (int i = 0; i < 8; ++i)
        if (i < count) values[i] = as_stored(values[i]) + element(from, i);
    }
  }

  // Eight neighbours in a row of the result, of which as many are stored as there are.
  METHOD void store8(const Product &p, int turn, const Sum *sums) const {
    constexpr int BYTES = OUT_DTYPE == F32 ? 4 : 2;
    const u64 at = ((u64)(unit.token + token(turn)) * N + column) * BYTES;
    u8 *to = p.out + at;
    float values[8];
    u32 words[2 * BYTES];
    UNROLL for (int i = 0; i < 8; ++i) {
      values[i] = sums[i];
      if (WHOLE) values[i] = values[i] * token_scales[turn] * column_scales[i];
#if BIAS_TWICE
      values[i] = as_stored(values[i]);
#endif
      if (HAS_BIAS) values[i] += bias[i];
    }
#if HAS_RESIDUAL
    add_residual(p.residual + at, values);
#endif
#if OUT_DTYPE == F32
    UNROLL for (int i = 0; i < 8; ++i) words[i] = as_bits(values[i]);
#else
    UNROLL for (int i = 0; i < 4; ++i)
      words[i] = (OUT_DTYPE == BF16 ? pack_bf16 : pack_f16)(values[2 * i], values[2 * i + 1]);
#endif
    if (count == 8 && (u64)to % 16 == 0) {
      UNROLL for (int i = 0; i < 2 * BYTES; i += 4) store16(to + 4 * i, words + i);
    } else {
      UNROLL for (int i = 0; i < 8; ++i) {
        if (i >= count) break;
        if (OUT_DTYPE == F32) ((u32 *)to)[i] = words[i];
        else ((u16 *)to)[i] = words[i / 2] >> 16 * (i % 2);
      }
    }
  }
};

// The sums of PASS tokens and 64 columns, through shared memory, since neighbours in a row of the result lie in different
// lanes.  A team that split K meets before it reads each other's, and again before these may be overwritten.
template <class PLAN>
DEVICE void finish(const Product &p, const Team<PLAN> &team, const Ring<PLAN::TOKENS> &ring, const Finish<PLAN> &by,
                   u32 parity, const Sum *sums) {
  constexpr int PASS = Ring<PLAN::TOKENS>::PASS, SPLIT = PLAN::SPLIT;
  const u32 half = thread() / CREW - 1, lane = thread() % WAVE, wave = thread() % CREW / WAVE;
  Sum *mine = (Sum *)ring.sums(half);
  if constexpr (SPLIT > 1) wait(ring.read(half), parity ^ 1);
  else group_barrier(1 + half);
  UNROLL for (int i = 0; i < PASS / 2; ++i) {
    const u32 row = 16 * wave + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    mine[Ring<PLAN::TOKENS>::MANY ? row * PITCH + column : column * PITCH + row] = sums[i];
  }
  group_barrier(1 + half);
  if constexpr (SPLIT > 1) {
    if (thread() % CREW < SPLIT) publish_at_rank(ring.summed(half), team.base + thread() % CREW);
    wait_for_cluster(ring.summed(half), parity);
  }
  UNROLL for (int turn = 0; turn < Finish<PLAN>::TURNS; ++turn) {
    if (!by.there(p, turn)) continue;
    Sum values[8] = {};
    for (int r = 0; r < SPLIT; ++r) {
      const Sum *from = SPLIT > 1 ? at_rank(mine, team.base + r) : mine;
      UNROLL for (int i = 0; i < 8; i += 4) {
        const auto four = *(const Four<Sum> *)(from + by.token(turn) * PITCH + by.first % 8 * 8 + i);
        values[i] += four.x, values[i + 1] += four.y, values[i + 2] += four.z, values[i + 3] += four.w;
      }
    }
    by.store8(p, turn, values);
  }
  if constexpr (SPLIT > 1) {
    group_barrier(1 + half);
    if (thread() % CREW < SPLIT) arrive_at_rank(ring.read(half), team.base + thread() % CREW);
  }
}
