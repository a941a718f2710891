// How the lanes of a row combine what each has of it: sums, and the largest value.  Included by tile.h, in its namespace.

struct Sum {
  DEVICE u32 of(u32 a, u32 b) { return as_bits(as_float(a) + as_float(b)); }
};
struct Largest {
  DEVICE u32 of(u32 a, u32 b) { return max_u32(a, b); }
};
// The same with memory of its own: where the mean is subtracted first a row has two sums.
struct SumForMean : Sum {};

// What the waves of a row leave for each other, filled up with zeros: up to 8 are combined by every lane, of more a lane
// takes four, and its neighbours the others.
constexpr int PARTS = ROW_WAVES > 16 ? 32 : ROW_WAVES > 8 ? 16 : 8;

template <class Combine> DEVICE u32 over_parts(const u32 *parts) {
  constexpr int own = PARTS > 8 ? 4 : 8;
  const u32 *from = parts + (PARTS > 8 ? thread() * own % PARTS : 0);
  u32 part[own];
  UNROLL for (int i = 0; i < own; ++i) part[i] = from[i];
  UNROLL for (int step = own / 2; step > 0; step /= 2)
    UNROLL for (int i = 0; i < step; ++i) part[i] = Combine::of(part[i], part[i + step]);
  if constexpr (PARTS > 8) part[0] = Combine::of(part[0], fold<1>(part[0]));
  if constexpr (PARTS > 8) part[0] = Combine::of(part[0], fold<2>(part[0]));
  if constexpr (PARTS > 16) part[0] = Combine::of(part[0], fold<4>(part[0]));
  return part[0];
}

// The parts of LANES neighbouring lanes, a power of two of them, combined.  fold<K>(v) is v in the neighbouring block of
// K lanes, where all lanes of a block agree already.
template <class Combine, int LANES> DEVICE u32 over_lanes(u32 part) {
  if constexpr (LANES > 1) part = Combine::of(part, fold<1>(part));
  if constexpr (LANES > 2) part = Combine::of(part, fold<2>(part));
  if constexpr (LANES > 4) part = Combine::of(part, fold<4>(part));
  if constexpr (LANES > 8) part = Combine::of(part, fold<8>(part));
  if constexpr (LANES > 16) part = Combine::of(part, fold<16>(part));
  if constexpr (LANES > 32) part = Combine::of(part, fold<32>(part));
  return part;
}

// The parts of the lanes of one row, combined.
template <class Combine> DEVICE u32 over_row(u32 part, u32 turn) {
  part = over_lanes<Combine, (ROW_LANES < WAVE ? ROW_LANES : WAVE)>(part);
  if constexpr (ROW_WAVES > 1) {
    // Two, used in turn: with one barrier a row the parts of the last row may still be read.
    SHARED u32 partials[2][PARTS];
    u32 *partial = partials[LOOPS ? turn % 2 : 0];
    if (thread() % WAVE == 0) partial[wave()] = part;
    if (PARTS > ROW_WAVES && thread() < PARTS - ROW_WAVES) partial[ROW_WAVES + thread()] = 0;
    barrier();
    part = over_parts<Combine>(partial);
  }
  return part;
}

#if STATISTIC_GROUP
// For each vector of a lane the sum of its group's parts.  Neighbouring lanes, as many as a power of two and the wave
// allow, combine theirs; where a group has more they leave them for each other, and each lane adds up its group's.
template <class Combine> DEVICE Statistics over_groups(Statistics parts, u32 turn) {
  constexpr int vectors = STATISTIC_LENGTH / VECTOR, even = vectors & -vectors;
  constexpr int widest = ROW_LANES < WAVE ? ROW_LANES : WAVE, lanes = even < widest ? even : widest;
  constexpr int shares = vectors / lanes, all_shares = HIDDEN / VECTOR / lanes;
  static_assert(shares == 1 || ROWS == 1, "a barrier is for all rows of a block");
  u32 sum[VECTORS];
  UNROLL for (int v = 0; v < VECTORS; ++v)
    sum[v] = over_lanes<Combine, lanes>(as_bits(parts.of[v].x + parts.of[v].y));
  if constexpr (shares > 1) {
    SHARED u32 memory[2][all_shares];
    u32 *share = memory[LOOPS ? turn % 2 : 0];
    UNROLL for (int v = 0; v < VECTORS; ++v) {
      const u32 number = v * ROW_LANES + thread();
      if (number % lanes == 0 && number < HIDDEN / VECTOR) share[number / lanes] = sum[v];
    }
    barrier();
    UNROLL for (int v = 0; v < VECTORS; ++v) {
      const u32 number = v * ROW_LANES + thread();
      if (number >= HIDDEN / VECTOR) continue;
      const u32 *from = share + number / vectors * shares;
      sum[v] = from[0];
      ROLLED for (int i = 1; i < shares; ++i) sum[v] = Combine::of(sum[v], from[i]);
    }
  }
  UNROLL for (int v = 0; v < VECTORS; ++v) parts.of[v].x = as_float(sum[v]);
  return parts;
}
#endif

// The sums, as x, of which a lane has these parts: of the row, or of the group of each vector.
template <class Combine> DEVICE Statistics sums_of_row(Statistics parts, u32 turn) {
#if STATISTIC_GROUP
  return over_groups<Combine>(parts, turn);
#else
  parts.of[0].x = as_float(over_row<Combine>(as_bits(parts.of[0].x + parts.of[0].y), turn));
  return parts;
#endif
}
