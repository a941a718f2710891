// The product of floats with packed integers on AMD GPUs of the CDNA line, wave64: out[m, n] = bias[n] + the sum over k
// of a[m, k] * w[n, k], w = (code - zero) * scale, rounded to the dtype of the scales and then to that of a.
// HAS_RESIDUAL: residual[m, n] is added to the rounded result.
//
// As in kernels/packed.cu codes go from global memory straight to the registers they are multiplied from: of b, as
// shuffle_weight(b, (16, 16)) lays its bytes out, 16 rows of four chunks of 16 bytes are 1 KiB in the order of lanes.
//
//   columns     the rows of b are the rows of a matrix instruction, tokens its columns: a lane then holds 4 neighbours in
//               a row of the result.  Where k lies does not matter as long as both agree: of a block a lane multiplies a
//               chunk of its own, and a chunk lies in one group.
//   unit        COLUMNS of the result x up to 64 rows, a workgroup's.  ACROSS waves stand beside each other; ALONG of
//               them take every so-manieth block of K, and their sums meet in LDS.
//
// The macros that specialise this file come from lowering/families/packed.py.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f2 __attribute__((ext_vector_type(2)));
typedef float f4 __attribute__((ext_vector_type(4)));
typedef u32 u2 __attribute__((ext_vector_type(2)));
typedef u32 u4 __attribute__((ext_vector_type(4)));
typedef u32 loose_u2 __attribute__((ext_vector_type(2), aligned(1)));
typedef u32 loose_u4 __attribute__((ext_vector_type(4), aligned(1)));
typedef __bf16 bf16x2 __attribute__((ext_vector_type(2)));
typedef _Float16 f16x2 __attribute__((ext_vector_type(2)));

constexpr int WAVE = 64, THREADS = WAVE * ACROSS * ALONG;

#define DEVICE static __attribute__((device, always_inline)) inline
#define SHARED_MEMORY static __attribute__((shared))
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name) extern "C" __attribute__((global, amdgpu_flat_work_group_size(THREADS, THREADS))) void name

enum { BF16 = 1, F16 = 2, F32 = 3 };  // OUT_DTYPE, SCALE_DTYPE

constexpr int SIDE = 16;                           // rows and columns of a matrix instruction
constexpr int CODES = 128 / BITS;                  // of a chunk
constexpr int CHUNKS = 4, BLOCK = CHUNKS * CODES;  // of a row, read together
constexpr int BLOCKS = K / BLOCK, ROW_BYTES = K / 8 * BITS;
constexpr int COLUMNS = SIDE * TILES * ACROSS;
constexpr int COLUMN_GROUPS = (N + COLUMNS - 1) / COLUMNS, COLUMN_TILES = (N + SIDE - 1) / SIDE;
constexpr int PITCH = COLUMNS + 4;                 // floats between rows of sums
static_assert(K % BLOCK == 0 && SCALED % CODES == 0, "a chunk lies in a group");
static_assert(TILES <= COLUMN_TILES, "a wave has whole tiles");

struct Product {
  const u8 *a, *b, *scale, *zero, *bias, *residual;
  u8 *out;
  int rows;
};

DEVICE int thread() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE int lane() { return thread() % WAVE; }
DEVICE int wave() { return __builtin_amdgcn_readfirstlane(thread() / WAVE); }
DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

DEVICE u32 pack(f2 both, int dtype) {
  if (dtype == BF16) return __builtin_bit_cast(u32, __builtin_convertvector(both, bf16x2));
  return __builtin_bit_cast(u32, __builtin_convertvector(both, f16x2));
}
DEVICE float value(u16 half, int dtype) {
  return dtype == BF16 ? as_float((u32)half << 16) : (float)__builtin_bit_cast(_Float16, half);
}

// -- weights -------------------------------------------------------------------------------------------------------

// Of a block and TILES times 16 columns: row lane % 16, the chunk lane / 16; its scale and zero point.
struct Stage {
  u4 codes[TILES];
  float scale[TILES], zero[TILES];
};

DEVICE float scale_at(const Product &p, u64 at) {
  return SCALE_DTYPE == F32 ? ((const float *)p.scale)[at] : value(((const u16 *)p.scale)[at], SCALE_DTYPE);
}

DEVICE Stage load_stage(const Product &p, int tile, int block) {
  Stage stage;
  const int chunk = block * CHUNKS + lane() / SIDE;
  const u8 *codes = p.b + (u64)tile * (SIDE * ROW_BYTES) + block * (CHUNKS * 256) + lane() * 16;
  UNROLL for (int j = 0; j < TILES; ++j) {
    const u64 at = (u64)(chunk * CODES / SCALED) * N + least((tile + j) * SIDE + lane() % SIDE, N - 1);
    stage.codes[j] = *(const u4 *)(codes + j * (SIDE * ROW_BYTES));
    stage.scale[j] = scale_at(p, at);
    stage.zero[j] = HAS_ZERO ? p.zero[at] : 1 << (BITS - 1);
  }
  return stage;
}

// Eight codes are a word of four bits each or two words of eight.
constexpr int OCTETS = CODES / 8, WORDS = BITS / 4;

// Codes 2 * pair and the next of eight.
DEVICE f2 pair_of_codes(u4 words, int octet, int pair) {
  if constexpr (BITS == 4) {
    const u32 even = words[octet] & 0x0f0f0f0f, odd = words[octet] >> 4 & 0x0f0f0f0f;
    return f2{(float)(even >> 8 * pair & 255), (float)(odd >> 8 * pair & 255)};
  } else {
    const u32 both = words[octet * WORDS + pair / 2] >> 16 * (pair % 2);
    return f2{(float)(both & 255), (float)(both >> 8 & 255)};
  }
}

// The weights of eight codes, rounded.
DEVICE u4 weights(u4 words, int octet, float zero, float scale) {
  u4 pairs;
  UNROLL for (int pair = 0; pair < 4; ++pair) {
    f2 both = (pair_of_codes(words, octet, pair) - zero) * scale;
    if constexpr (SCALE_DTYPE != F32 && SCALE_DTYPE != OUT_DTYPE) {
      const u32 rounded = pack(both, SCALE_DTYPE);
      both = f2{value(rounded, SCALE_DTYPE), value(rounded >> 16, SCALE_DTYPE)};
    }
    pairs[pair] = pack(both, OUT_DTYPE);
  }
  return pairs;
}

// -- products --------------------------------------------------------------------------------------------------------

// sums[i] belongs to row lane % 16 of the tokens and row 4 * (lane / 16) + i of b.
DEVICE f4 multiply_add(u4 b, u4 a, f4 sums) {
  typedef __bf16 bf16x8 __attribute__((ext_vector_type(8)));
  typedef _Float16 f16x8 __attribute__((ext_vector_type(8)));
  typedef short i16x4 __attribute__((ext_vector_type(4)));
  typedef _Float16 f16x4 __attribute__((ext_vector_type(4)));
#ifdef __gfx950__
  if constexpr (OUT_DTYPE == BF16)
    return __builtin_amdgcn_mfma_f32_16x16x32_bf16(__builtin_bit_cast(bf16x8, b), __builtin_bit_cast(bf16x8, a), sums,
                                                   0, 0, 0);
  else
    return __builtin_amdgcn_mfma_f32_16x16x32_f16(__builtin_bit_cast(f16x8, b), __builtin_bit_cast(f16x8, a), sums, 0,
                                                  0, 0);
#else
  UNROLL for (int i = 0; i < 4; i += 2) {
    const u2 x = {b[i], b[i + 1]}, y = {a[i], a[i + 1]};
    if constexpr (OUT_DTYPE == BF16)
      sums = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(i16x4, x), __builtin_bit_cast(i16x4, y), sums,
                                                       0, 0, 0);
    else
      sums = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(f16x4, x), __builtin_bit_cast(f16x4, y), sums, 0,
                                                   0, 0);
  }
  return sums;
#endif
}

// sums += the products of a block; of TOKEN_TILES times 16 tokens, the row lane % 16 of each.
template <int TOKEN_TILES>
DEVICE void add_block(const Product &p, const Stage &stage, int block, const u32 *tokens, f4 sums[TILES][TOKEN_TILES]) {
  const int first = (block * CHUNKS + lane() / SIDE) * CODES;
  UNROLL for (int octet = 0; octet < OCTETS; ++octet) {
    u4 right[TOKEN_TILES];
    UNROLL for (int i = 0; i < TOKEN_TILES; ++i)
      right[i] = *(const loose_u4 *)(p.a + ((u64)tokens[i] * K + first + 8 * octet) * 2);
    UNROLL for (int j = 0; j < TILES; ++j) {
      const u4 left = weights(stage.codes[j], octet, stage.zero[j], stage.scale[j]);
      UNROLL for (int i = 0; i < TOKEN_TILES; ++i) sums[j][i] = multiply_add(left, right[i], sums[j][i]);
    }
  }
}

// -- results ---------------------------------------------------------------------------------------------------------

// 4 neighbours of a row; those beyond the last column are dropped.
DEVICE void store(const Product &p, int row, int column, f4 sums) {
  if (row >= p.rows || column >= N) return;
  if constexpr (HAS_BIAS)
    UNROLL for (int i = 0; i < 4; ++i) sums[i] += value(((const u16 *)p.bias)[least(column + i, N - 1)], OUT_DTYPE);
  const u64 at = (u64)row * N + column;
  u2 words = {pack(sums.xy, OUT_DTYPE), pack(sums.zw, OUT_DTYPE)};
#if HAS_RESIDUAL
  UNROLL for (int i = 0; i < 4; ++i)
    sums[i] = value(words[i / 2] >> 16 * (i % 2) & 0xffff, OUT_DTYPE) +
              value(((const u16 *)p.residual)[at + least(i, N - 1 - column)], OUT_DTYPE);
  words = {pack(sums.xy, OUT_DTYPE), pack(sums.zw, OUT_DTYPE)};
#endif
  u16 *to = (u16 *)p.out + at;
  if (N % 4 == 0 || column + 4 <= N) {
    *(loose_u2 *)to = words;
  } else {
    UNROLL for (int i = 0; i < 3; ++i)
      if (column + i < N) to[i] = words[i / 2] >> 16 * (i % 2);
  }
}

// The sums of 16 tokens from `token` on and all columns of the unit, those of the waves in their order.
DEVICE void finish(const Product &p, int token, int column, const float *lds) {
  barrier();
  ROLLED for (int item = thread(); item < SIDE * COLUMNS / 4; item += THREADS) {
    const int row = item / (COLUMNS / 4), place = item % (COLUMNS / 4) * 4;
    f4 total = *(const f4 *)(lds + row * PITCH + place);
    UNROLL for (int part = 1; part < ALONG; ++part) total += *(const f4 *)(lds + (part * SIDE + row) * PITCH + place);
    store(p, token + row, column + place, total);
  }
  barrier();
}

template <int TOKEN_TILES> DEVICE void run(const Product &p, float *lds) {
  const int unit = __builtin_amdgcn_workgroup_id_x(), across = wave() % ACROSS, along = wave() / ACROSS;
  const int column = unit % COLUMN_GROUPS * COLUMNS, token = unit / COLUMN_GROUPS * (SIDE * TOKEN_TILES);
  // The last waves have tiles of those before them as well, rather than fewer.
  const int tile = least(column / SIDE + across * TILES, COLUMN_TILES - TILES);
  u32 tokens[TOKEN_TILES];
  UNROLL for (int i = 0; i < TOKEN_TILES; ++i)
    tokens[i] = least(token + SIDE * i + lane() % SIDE, p.rows - 1);  // of the last nobody stores what comes of it
  f4 sums[TILES][TOKEN_TILES] = {};
  Stage stage = load_stage(p, tile, least(along, BLOCKS - 1));
  ROLLED for (int block = along; block < BLOCKS; block += ALONG) {
    const Stage next = load_stage(p, tile, least(block + ALONG, BLOCKS - 1));
    add_block<TOKEN_TILES>(p, stage, block, tokens, sums);
    stage = next;
  }
  UNROLL for (int i = 0; i < TOKEN_TILES; ++i) {
    UNROLL for (int j = 0; j < TILES; ++j) {
      int place = (tile + j) * SIDE - column;
      if (place < across * TILES * SIDE) continue;  // another wave's
      __asm__("" : "+s"(place));  // else it is what comes before LDS, and an offset
      *(f4 *)(lds + (along * SIDE + lane() % SIDE) * PITCH + place + lane() / SIDE * 4) = sums[j][i];
    }
    finish(p, token + SIDE * i, column, lds);
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
  SHARED_MEMORY f4 lds[ALONG * SIDE * PITCH / 4];
  if (rows <= 0) return;
  const Product product = {a, b, scale, zero, bias, residual, out, rows};
  if (rows <= SIDE) run<1>(product, (float *)lds);
  else if (rows <= 2 * SIDE) run<2>(product, (float *)lds);
  else run<4>(product, (float *)lds);
}
