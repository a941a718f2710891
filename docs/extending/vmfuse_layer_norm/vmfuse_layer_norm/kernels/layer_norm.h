// LayerNorm of rows x [T, HIDDEN] and the float8_e4m3fn quantization of each, on GPUs: a workgroup has a row, in
// registers.
//
// What belongs here is the arithmetic and the order of things; what differs between machines is in the .cu and .hip
// files that include this.  The macros that specialise it come from family.py: HIDDEN, THREADS, X_DTYPE, WEIGHT_DTYPE and
// BIAS_DTYPE (0: there is none), WRITES_Y, EPS, SHARE (1/HIDDEN), and the bits of AMAX_FLOOR and SCALE_FLOOR.

constexpr int PER_THREAD = (HIDDEN + THREADS - 1) / THREADS, WAVES = THREADS / WAVE;

template <int DTYPE> DEVICE float element(const u8 *base, long long at) {
  if constexpr (DTYPE == F32) return ((const float *)base)[at];
  else return widened<DTYPE>(((const u16 *)base)[at]);
}

DEVICE float rounded(float value) {
  if constexpr (X_DTYPE == F32) return value;
  else return widened<X_DTYPE>(narrowed<X_DTYPE>(value));
}

DEVICE void store(u8 *base, long long at, float value) {  // which is rounded
  if constexpr (X_DTYPE == F32) ((float *)base)[at] = value;
  else ((u16 *)base)[at] = narrowed<X_DTYPE>(value);
}

// What all threads of the workgroup have, put together: in each wave by exchanges, between waves in shared memory.
SHARED double sums[WAVES];
SHARED u32 largest[WAVES];

DEVICE double total(double value) {
  UNROLL for (int k = 1; k < WAVE; k *= 2) {
    const u64 bits = bits_of(value);
    value += double_of((u64)neighbour((u32)(bits >> 32), k) << 32 | neighbour((u32)bits, k));
  }
  if (WAVES == 1) return value;
  barrier();  // the sums before have been read
  if (thread() % WAVE == 0) sums[thread() / WAVE] = value;
  barrier();
  value = 0.0;
  for (int wave = 0; wave < WAVES; ++wave) value += sums[wave];
  return value;
}

DEVICE u32 maximum(u32 value) {
  UNROLL for (int k = 1; k < WAVE; k *= 2) {
    const u32 other = neighbour(value, k);
    value = value > other ? value : other;
  }
  if (WAVES == 1) return value;
  if (thread() % WAVE == 0) largest[thread() / WAVE] = value;
  barrier();
  for (int wave = 0; wave < WAVES; ++wave) value = value > largest[wave] ? value : largest[wave];
  return value;
}

DEVICE float clamped(float value) { return value > 448.0f ? 448.0f : value < -448.0f ? -448.0f : value; }

#if WEIGHT_DTYPE
#define WEIGHT const u8 *weight,
#else
#define WEIGHT
#endif
#if BIAS_DTYPE
#define BIAS const u8 *bias,
#else
#define BIAS
#endif
#if WRITES_Y
#define Y u8 *y,
#else
#define Y
#endif

KERNEL(ENTRY)(const u8 *x, WEIGHT BIAS Y u8 *q, float *scales, int rows) {
  const long long row = block(), first = row * HIDDEN;
  if (row >= rows) return;  // the whole workgroup
  float values[PER_THREAD];
  double sum = 0.0, squares = 0.0;
  UNROLL for (int i = 0; i < PER_THREAD; ++i) {
    const int at = i * THREADS + thread();
    values[i] = at < HIDDEN ? element<X_DTYPE>(x, first + at) : 0.0f;
    sum += values[i];
  }
  const float mean = (float)(total(sum) * SHARE);
  UNROLL for (int i = 0; i < PER_THREAD; ++i) {
    const double off = (double)values[i] - (double)mean;
    if (i * THREADS + thread() < HIDDEN) squares += off * off;
  }
  const float rstd = divide(1.0f, square_root((float)(total(squares) * SHARE) + EPS));

  // The bits of magnitudes order as they do, with NaN on top.
  u32 amax = 0;
  UNROLL for (int i = 0; i < PER_THREAD; ++i) {
    const int at = i * THREADS + thread();
    if (at >= HIDDEN) continue;
    float value = (values[i] - mean) * rstd;
#if WEIGHT_DTYPE
    value *= element<WEIGHT_DTYPE>(weight, at);
#endif
#if BIAS_DTYPE
    value += element<BIAS_DTYPE>(bias, at);
#endif
    values[i] = rounded(value);
#if WRITES_Y
    store(y, first + at, values[i]);
#endif
    const u32 magnitude = as_bits(values[i]) & 0x7fffffffu;
    amax = amax > magnitude ? amax : magnitude;
  }
  amax = maximum(amax);
  const u32 bits = as_bits(divide(as_float(amax > AMAX_FLOOR ? amax : AMAX_FLOOR), 448.0f));
  const float scale = as_float(bits > SCALE_FLOOR ? bits : SCALE_FLOOR);
  UNROLL for (int i = 0; i < PER_THREAD; ++i) {
    const int at = i * THREADS + thread();
    if (at < HIDDEN) q[first + at] = code_of(clamped(divide(values[i], scale)));
  }
  if (thread() == 0) scales[row] = scale;
}
