// What rows, or groups of them, are normed by, of row.c: sums over columns, and over the last few at the front of `tail`.

INLINE Floats plus_term(Floats sum, Floats a, int squared) { return squared ? fma(a, a, sum) : sum + a; }

// The sum of x - mean over what shares a statistic from column `first` on, as far as whole steps go, or of its squares.
INLINE float total_of(const Site *site, i64 first, float mean, int squared) {
  const i64 end = first + STATISTIC_LENGTH;
  Floats sums[4] = {{0}, {0}, {0}, {0}};
  for (i64 column = first; column + 2 * STEP <= end; column += 2 * STEP) {
    Pair a = centred(input(site, column), mean), b = centred(input(site, column + STEP), mean);
    sums[0] = plus_term(sums[0], a.even, squared);
    sums[1] = plus_term(sums[1], a.odd, squared);
    sums[2] = plus_term(sums[2], b.even, squared);
    sums[3] = plus_term(sums[3], b.odd, squared);
  }
#if STATISTIC_LENGTH / STEP % 2
  Pair last = centred(input(site, first + STATISTIC_LENGTH / STEP * STEP - STEP), mean);
  sums[0] = plus_term(sums[0], last.even, squared);
  sums[1] = plus_term(sums[1], last.odd, squared);
#endif
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

#if TAIL
// The same sum over the last TAIL columns, which `tail` has at its front.
INLINE float total_of_tail(const Site *tail, float mean, int squared) {
  Pair p = centred(input(tail, 0), mean);
#if CENTRED
  for (int i = 0; i < LANES; ++i) {  // what lies beyond the end is no longer zero
    p.even[i] = 2 * i < TAIL ? p.even[i] : 0.0f;
    p.odd[i] = 2 * i + 1 < TAIL ? p.odd[i] : 0.0f;
  }
#endif
  return lane_sum(squared ? fma(p.even, p.even, p.odd * p.odd) : p.even + p.odd);
}
#endif

// The sum over all that shares a statistic.
INLINE float total_from(const Site *site, const Site *tail, i64 first, float mean, int squared) {
  float total = total_of(site, first, mean, squared);
#if TAIL
  total += total_of_tail(tail, mean, squared);
#endif
  return total;
}

// Of the row, or of the group of it that starts at column `first`.
INLINE Statistic statistic_of(const Site *site, const Site *tail, i64 first) {
  Statistic by = {0};
#if NORM
#if CENTRED
  by.mean = total_from(site, tail, first, 0.0f, 0) / STATISTIC_LENGTH;
#endif
  by.rstd = inverse_rms(total_from(site, tail, first, by.mean, 1));
#endif
  return by;
}

// What the elements from `column` on are normed by, given what those before are.
INLINE Statistic statistic_at(const Site *site, i64 column, Statistic before) {
#if STATISTIC_GROUP
  if (column % STATISTIC_GROUP == 0) return statistic_of(site, 0, column);
#endif
  return before;
}
