// The scaled product on AMD GPUs of the CDNA line, wave64: out[m, n] = the sum over the blocks g of 128 along K
// of a_scale[m, g] * b_scale[n / 128, g] times the product of block g of row m of a and row n of b (+ bias[n]);
// a [rows, K] of 8-bit floats, b as shuffle_weight(w, (16, 16)) lays it out.  WHOLE: the sum over all of K is scaled
// instead, by a_scale[m] (ONE_A: by one scale for all m) and b_scale[n / B_ROWS]; of INTEGERS, whose sums are exact, it is
// that alone.  HAS_RESIDUAL: residual[m, n] is added to the rounded result.
//
//   few rows    a wave multiplies up to 64 rows by FEW_COLUMNS columns and takes every WAVES-th block of K; both
//               operands come from global memory in the very registers they are multiplied in; the waves' sums meet
//               in LDS.
//   many rows   a workgroup multiplies ROWS rows by COLUMNS columns, each wave all the rows by its columns; a goes
//               through LDS, b straight to registers.
//
// There are as many workgroups as are at work at once, and each takes one such unit after another.
//
// The rows of b are the rows of a matrix instruction, the rows of a its columns: a lane then holds 4 neighbours in a
// row of the result, and one scale is all it needs.  Where k lies does not matter as long as a and b agree: a lane
// multiplies the 16 bytes it loads at k = 16 * quarter and at 64 beyond, whole loads of the layout of b.
//
// The macros that specialise this file come from lowering/families/matmul/family.py.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f2 __attribute__((ext_vector_type(2)));
typedef float f4 __attribute__((ext_vector_type(4)));
typedef int i4 __attribute__((ext_vector_type(4)));
typedef int i8 __attribute__((ext_vector_type(8)));
#define INTEGERS (A_CODES == 3)
#if INTEGERS
typedef i4 Sums;
#else
typedef f4 Sums;
#endif
typedef u32 u2 __attribute__((ext_vector_type(2)));
typedef u32 u4 __attribute__((ext_vector_type(4)));
typedef u32 loose_u2 __attribute__((ext_vector_type(2), aligned(1)));
typedef u32 loose_u4 __attribute__((ext_vector_type(4), aligned(1)));
typedef __bf16 bf16x2 __attribute__((ext_vector_type(2)));
typedef _Float16 f16x2 __attribute__((ext_vector_type(2)));

#define DEVICE static __attribute__((device, always_inline)) inline
#define SHARED static __attribute__((shared))
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
// RESIDENT workgroups, each with a wave on every SIMD of a compute unit, share its registers.
#define KERNEL(name)                                                                \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(THREADS, THREADS), \
                            amdgpu_waves_per_eu(RESIDENT, RESIDENT))) void name

enum { BF16 = 1, F16 = 2, F32 = 3 };       // OUT_DTYPE
enum { IN_ROWS = 0, COLUMN_TMA = 1 };      // A_SCALE_LAYOUT; others are columns of `rows`

constexpr u32 WAVE = 64, SIDE = 16, BLOCK = 128;  // lanes; rows and columns of a matrix instruction; the k of a scale
constexpr u32 BLOCKS = K / BLOCK, B_TILES = (N + SIDE - 1) / SIDE;
constexpr u32 FEW_TILES = 4, FEW_WIDTH = FEW_COLUMNS / SIDE;  // of rows and of columns, in a unit of few rows
constexpr u32 WAVES = THREADS / WAVE, ROW_TILES = ROWS / SIDE, WAVE_TILES = COLUMNS / SIDE / WAVES;
constexpr u32 COLUMN_BLOCKS = (COLUMNS + BLOCK - 1) / BLOCK;
static_assert(K % BLOCK == 0 && ROWS % SIDE == 0 && COLUMNS % (SIDE * WAVES) == 0, "tiles are whole");
static_assert(BLOCK % (COLUMNS / WAVES) == 0 && BLOCK % FEW_COLUMNS == 0, "the columns of a wave share their scale");

struct Product {
  const u8 *a, *b;
  const float *a_scale, *b_scale;
  const u8 *bias, *residual;
  u8 *out;
  u32 rows;
};

DEVICE u32 thread() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE u32 lane() { return thread() % WAVE; }
DEVICE u32 wave() { return __builtin_amdgcn_readfirstlane(thread() / WAVE); }
DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }
DEVICE float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// -- operands ------------------------------------------------------------------------------------------------------

// Loads of a buffer add up where it begins, a lane's offset and one that all lanes share: one register a lane.  Nothing
// is asked for beyond the end.
typedef __amdgpu_buffer_rsrc_t Buffer;
DEVICE Buffer buffer(const void *from) {
  return __builtin_amdgcn_make_buffer_rsrc((void *)from, 0, 0xffffffff, 0x27000);
}
DEVICE u4 load16(Buffer from, u32 of_lane, u32 shared) {
  return __builtin_amdgcn_raw_buffer_load_b128(from, of_lane, shared, 0);
}
DEVICE u32 load4(Buffer from, u32 of_lane, u32 shared) {
  return __builtin_amdgcn_raw_buffer_load_b32(from, of_lane, shared, 0);
}

// A lane's part of 16 rows by a block: 16 bytes in either half of the block.
struct Fragment {
  u4 half[2];
};
DEVICE i8 words(const Fragment &part) {
  return __builtin_shufflevector((i4)part.half[0], (i4)part.half[1], 0, 1, 2, 3, 4, 5, 6, 7);
}

// Lane i has row i % 16 of the operand, and of each half of the block the quarter i / 16.
DEVICE u32 place() { return lane() % SIDE; }
DEVICE u32 quarter() { return lane() / SIDE; }

// What a workgroup reads: a and its scales from its first row on, b and its scales from its first tile of 16 columns
// on.  Beyond the last row or tile there is the last: nobody stores what comes of it.
struct Operands {
  Buffer a, b, a_scale, b_scale;
  u32 tile, last_row;
  u32 scales;  // bytes between columns of scales, where they are columns: those of all are less than 2^32
};

DEVICE Operands operands(const Product &p, u32 first, u32 tile) {
  return {buffer(p.a + (u64)first * K), buffer(p.b + (u64)tile * (SIDE * K)),
          buffer(p.a_scale + (A_SCALE_LAYOUT == IN_ROWS ? (u64)first * BLOCKS : first)), buffer(p.b_scale),
          tile, p.rows - 1 - first, (A_SCALE_LAYOUT == COLUMN_TMA ? (p.rows + 3) / 4 * 4 : p.rows) * 4};
}

// 16 bytes of a row of a from `k` on in a block.
DEVICE u4 load_a(const Operands &from, u32 row, u32 k, u32 block) {
  return load16(from.a, least(row, from.last_row) * K + k, block * BLOCK);
}

// 16 columns of a block of b are 2 KiB in the order of lanes.
DEVICE Fragment load_b(const Operands &from, u32 tile, u32 block) {
  const u32 shared = least(tile, B_TILES - 1 - from.tile) * (SIDE * K) + block * (SIDE * BLOCK);
  return {load16(from.b, lane() * 16, shared), load16(from.b, lane() * 16 + SIDE * BLOCK / 2, shared)};
}

// Scales, as bits until they are used: of floats the compiler makes pairs, and waits for them to move them together.
// Where a row has one scale, that of a block is 1.
constexpr u32 ONE = 0x3f800000;

DEVICE u32 load_a_scale(const Operands &from, u32 row, u32 block) {
  if constexpr (WHOLE) return ONE;
  const u32 here = least(row, from.last_row);
  if constexpr (A_SCALE_LAYOUT == IN_ROWS) return load4(from.a_scale, here * (BLOCKS * 4), block * 4);
  else return load4(from.a_scale, here * 4, block * from.scales);
}

DEVICE u32 load_b_scale(const Operands &from, u32 tile, u32 block) {
  if constexpr (WHOLE) return ONE;
  return load4(from.b_scale, least(from.tile + tile, B_TILES - 1) / (BLOCK / SIDE) * (BLOCKS * 4), block * 4);
}

// The products of a block: sums[i] belongs to row `place()` of a and row 4 * quarter() + i of b.
DEVICE Sums multiply(const Fragment &b, const Fragment &a) {
  const Sums zero = {0, 0, 0, 0};
#if INTEGERS && defined(__gfx950__)
  Sums sums = zero;
  UNROLL for (u32 i = 0; i < 2; ++i)
    sums = __builtin_amdgcn_mfma_i32_16x16x64_i8((i4)b.half[i], (i4)a.half[i], sums, 0, 0, 0);
  return sums;
#elif defined(__gfx950__)
  return __builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(words(b), words(a), zero, 0, 0, 0, 0, 0, 0);
#else
  typedef long i64x4 __attribute__((ext_vector_type(4)));
  const i64x4 x = __builtin_bit_cast(i64x4, words(b)), y = __builtin_bit_cast(i64x4, words(a));
  Sums sums = zero;
#if INTEGERS
  UNROLL for (u32 i = 0; i < 4; ++i) sums = __builtin_amdgcn_mfma_i32_16x16x32_i8(x[i], y[i], sums, 0, 0, 0);
#else
  UNROLL for (u32 i = 0; i < 4; ++i) sums = __builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8(x[i], y[i], sums, 0, 0, 0);
#endif
  return sums;
#endif
}

// A scale for instructions that take pairs, in two registers: told to use one twice, they name the register after it as
// well, and wait where a load is on its way there.
DEVICE f2 pair_of(float scale) {
  f2 pair = {scale, scale};
  __asm__("" : "+v"(pair));
  return pair;
}

// Done where it is written: not put off until the sums are stored, and before the loads that follow, which take the
// registers of the operands.
DEVICE Sums add_scaled(Sums sums, Sums products, f2 scale) {
#if INTEGERS  // they have no scales of blocks, but for the 0 of one that does not count
  Sums more = sums + (scale.x == 0 ? Sums{0, 0, 0, 0} : products);
#else
  Sums more = __builtin_elementwise_fma(products, __builtin_shufflevector(scale, scale, 0, 1, 0, 1), sums);
#endif
  __asm__ volatile("" : "+v"(more));
  return more;
}

// Steps 0 to COUNT - 1, in rounds of RING.  Constants in each are its `slot` in the round and how many steps are
// `left`, itself among them, as far as that is no more than RING: what is sent for in a slot is there a round later.
template <u32 COUNT, u32 RING, typename Step> DEVICE void in_rounds(const Step &step) {
  constexpr u32 SAME = COUNT > RING ? (COUNT - RING) / RING * RING : 0;
  ROLLED for (u32 i = 0; i < SAME; i += RING)
    UNROLL for (u32 slot = 0; slot < RING; ++slot) step(i + slot, slot, RING + 1);
  UNROLL for (u32 i = SAME; i < COUNT; ++i) step(i, i % RING, COUNT - i);
}

// -- results -------------------------------------------------------------------------------------------------------

DEVICE u32 pack(float x, float y) {
  const f2 both = {x, y};
  if constexpr (OUT_DTYPE == BF16) return __builtin_bit_cast(u32, __builtin_convertvector(both, bf16x2));
  else return __builtin_bit_cast(u32, __builtin_convertvector(both, f16x2));
}

DEVICE float element(const u8 *from, u32 index) {
  if constexpr (OUT_DTYPE == F32) return ((const float *)from)[index];
  else if constexpr (OUT_DTYPE == F16) return ((const _Float16 *)from)[index];
  else return __builtin_bit_cast(float, (u32)((const u16 *)from)[index] << 16);
}

DEVICE void store_one(u8 *to, u32 index, float x) {
  if constexpr (OUT_DTYPE == F32) ((float *)to)[index] = x;
  else ((u16 *)to)[index] = (u16)pack(x, x);
}

// As the dtype of the result has them.
DEVICE f4 as_stored(f4 sums) {
  if constexpr (OUT_DTYPE != F32)
    UNROLL for (u32 i = 0; i < 4; ++i) {
      const u32 rounded = pack(sums[i], sums[i]);
      sums[i] = element((const u8 *)&rounded, 0);
    }
  return sums;
}

// 4 neighbours of a row; those beyond the last column are dropped.
DEVICE void store(const Product &p, u32 row, u32 column, Sums exact) {
  f4 sums = __builtin_convertvector(exact, f4);
  constexpr u32 BYTES = OUT_DTYPE == F32 ? 4 : 2;
  if (row >= p.rows || column >= N) return;
  if constexpr (WHOLE) {
    const float of_row = p.a_scale[ONE_A ? 0 : row];
    UNROLL for (u32 i = 0; i < 4; ++i) sums[i] = sums[i] * of_row * p.b_scale[least(column + i, N - 1) / B_ROWS];
  }
#if BIAS_TWICE
  sums = as_stored(sums);
#endif
  if constexpr (HAS_BIAS)
    UNROLL for (u32 i = 0; i < 4; ++i) sums[i] += element(p.bias, least(column + i, N - 1));
  const u64 at = ((u64)row * N + column) * BYTES;
  const bool whole = N % 4 == 0 || column + 4 <= N;
#if HAS_RESIDUAL
  sums = as_stored(sums);
  u32 residual[4];
  if (whole) __builtin_memcpy(residual, p.residual + at, 4 * BYTES);
  UNROLL for (u32 i = 0; i < 4; ++i)
    sums[i] += whole ? element((const u8 *)residual, i) : element(p.residual + at, least(i, N - 1 - column));
#endif
  u8 *to = p.out + at;
  if (whole) {
    if constexpr (OUT_DTYPE == F32) *(loose_u4 *)to = __builtin_bit_cast(u4, sums);
    else *(loose_u2 *)to = u2{pack(sums.x, sums.y), pack(sums.z, sums.w)};
  } else {
    UNROLL for (u32 i = 0; i < 3; ++i)
      if (column + i < N) store_one(to, i, sums[i]);
  }
}

// -- few rows ------------------------------------------------------------------------------------------------------

template <u32 TILES> struct Part {
  Fragment a[TILES], b[FEW_WIDTH];
  u32 a_scale[TILES], b_scale;
};

template <u32 TILES> DEVICE Part<TILES> load_part(const Operands &from, u32 block) {
  Part<TILES> part;
  UNROLL for (u32 n = 0; n < FEW_WIDTH; ++n) part.b[n] = load_b(from, n, block);
  UNROLL for (u32 t = 0; t < TILES; ++t) {
    const u32 row = t * SIDE + place(), k = quarter() * 16;
    part.a[t] = {load_a(from, row, k, block), load_a(from, row, k + BLOCK / 2, block)};
    part.a_scale[t] = load_a_scale(from, row, block);
  }
  part.b_scale = load_b_scale(from, 0, block);
  __builtin_amdgcn_sched_barrier(0);  // in the order they will be waited for
  return part;
}

// TILES * 16 rows from `first` on by FEW_COLUMNS columns from tile `tile` of b on.  RING blocks of a wave are on their
// way at once.
template <u32 TILES, u32 RING> DEVICE void few_rows(const Product &p, u32 first, u32 tile, Sums *lds) {
  constexpr u32 COUNT = (BLOCKS + WAVES - 1) / WAVES;
  const Operands from = operands(p, first, tile);
  Sums sums[TILES][FEW_WIDTH] = {};
  Part<TILES> parts[RING];
  // Where a wave has one block less, the last one counts nothing.
  const auto block_of = [](u32 i) { return least(i * WAVES + wave(), BLOCKS - 1); };
  const auto counts = [](u32 i) { return BLOCKS % WAVES == 0 || i * WAVES + wave() < BLOCKS; };
  UNROLL for (u32 i = 0; i < RING && i < COUNT; ++i) parts[i] = load_part<TILES>(from, block_of(i));
  in_rounds<COUNT, RING>([&](u32 i, u32 slot, u32 left) {
    const Part<TILES> &part = parts[slot];
    UNROLL for (u32 t = 0; t < TILES; ++t) {
      const f2 scale = pair_of(counts(i) ? as_float(part.a_scale[t]) * as_float(part.b_scale) : 0);
      UNROLL for (u32 n = 0; n < FEW_WIDTH; ++n)
        sums[t][n] = add_scaled(sums[t][n], multiply(part.b[n], part.a[t]), scale);
    }
    if (left > RING) parts[slot] = load_part<TILES>(from, block_of(i + RING));
  });
  constexpr u32 EACH = TILES * FEW_WIDTH;
  UNROLL for (u32 i = 0; i < EACH; ++i)
    lds[(wave() * EACH + i) * WAVE + lane()] = sums[i / FEW_WIDTH][i % FEW_WIDTH];
  barrier();
  for (u32 i = wave(); i < EACH; i += WAVES) {
    Sums total = lds[i * WAVE + lane()];
    UNROLL for (u32 w = 1; w < WAVES; ++w) total += lds[(w * EACH + i) * WAVE + lane()];
    store(p, first + i / FEW_WIDTH * SIDE + place(), (tile + i % FEW_WIDTH) * SIDE + quarter() * 4, total);
  }
}

// -- many rows -----------------------------------------------------------------------------------------------------

constexpr u32 CHUNKS = BLOCK / 16, ROWS_AT_ONCE = THREADS / CHUNKS, LOADS = ROWS / ROWS_AT_ONCE;
constexpr u32 SCALES = (ROWS * COLUMN_BLOCKS + THREADS - 1) / THREADS;  // that a lane brings
static_assert(ROWS % ROWS_AT_ONCE == 0, "the lanes that load a block load whole rows");

// A block of a in LDS: for each tile of 16 rows 8 chunks of 16 bytes along k, of each chunk the 16 rows.  Row r of
// chunk c lies at r ^ c: rows are written a chunk per lane and read a row per lane, and no two lanes meet at a bank.
struct Stage {
  u4 a[ROW_TILES][CHUNKS][SIDE];
  float scale[SCALES * THREADS];  // [column block][row]
};

// What a lane brings of a block, on its way to LDS.
struct Incoming {
  u4 a[LOADS];
  u32 a_scale[SCALES], b_scale[SCALES];
};

DEVICE Incoming load_stage(const Operands &from, u32 block) {
  Incoming in;
  UNROLL for (u32 i = 0; i < LOADS; ++i)
    in.a[i] = load_a(from, i * ROWS_AT_ONCE + thread() / CHUNKS, thread() % CHUNKS * 16, block);
  UNROLL for (u32 i = 0; i < SCALES; ++i) {
    const u32 which = i * THREADS + thread();
    in.a_scale[i] = load_a_scale(from, which % ROWS, block);
    in.b_scale[i] = load_b_scale(from, which / ROWS * (BLOCK / SIDE), block);
  }
  return in;
}

DEVICE void put_stage(const Incoming &in, Stage &stage) {
  const u32 chunk = thread() % CHUNKS;
  UNROLL for (u32 i = 0; i < LOADS; ++i) {
    const u32 row = i * ROWS_AT_ONCE + thread() / CHUNKS;
    stage.a[row / SIDE][chunk][row % SIDE ^ chunk] = in.a[i];
  }
  UNROLL for (u32 i = 0; i < SCALES; ++i)
    stage.scale[i * THREADS + thread()] = as_float(in.a_scale[i]) * as_float(in.b_scale[i]);
}

DEVICE Fragment get_a(const Stage &stage, u32 t) {
  const u32 low = quarter(), high = low + CHUNKS / 2;
  return {stage.a[t][low][place() ^ low], stage.a[t][high][place() ^ high]};
}

// sums += the products of a block in LDS and b.  Step by step: while a tile of rows is multiplied, the one before it is
// scaled and the one after it comes from LDS.
DEVICE void multiply_stage(const Stage &stage, const Fragment *b, u32 column_block, Sums (*sums)[WAVE_TILES]) {
  Fragment a[2] = {get_a(stage, 0)};
  Sums products[2][WAVE_TILES];
  UNROLL for (u32 t = 0; t <= ROW_TILES; ++t) {
    if (t + 1 < ROW_TILES) a[(t + 1) % 2] = get_a(stage, t + 1);
    if (t < ROW_TILES)
      UNROLL for (u32 n = 0; n < WAVE_TILES; ++n) products[t % 2][n] = multiply(b[n], a[t % 2]);
    if (t > 0) {
      const f2 scale = pair_of(stage.scale[column_block * ROWS + (t - 1) * SIDE + place()]);
      UNROLL for (u32 n = 0; n < WAVE_TILES; ++n)
        sums[t - 1][n] = add_scaled(sums[t - 1][n], products[(t - 1) % 2][n], scale);
    }
    __builtin_amdgcn_sched_barrier(0);
  }
}

// ROWS rows from `first` on by COLUMNS columns from tile `tile` of b on.  Of b, RING blocks are in registers or on
// their way there; of a one is in LDS, and two more are on their way.
DEVICE void many_rows(const Product &p, u32 first, u32 tile, Stage *stages) {
  constexpr u32 RING = 4;
  const Operands from = operands(p, first, tile);
  const u32 mine = wave() * WAVE_TILES, column_block = mine / (BLOCK / SIDE);
  Sums sums[ROW_TILES][WAVE_TILES] = {};
  Fragment b[RING][WAVE_TILES];
  const auto send_for_b = [&](u32 block, u32 slot) {
    UNROLL for (u32 n = 0; n < WAVE_TILES; ++n) b[slot][n] = load_b(from, mine + n, block);
  };
  Incoming in[2] = {load_stage(from, 0)};
  UNROLL for (u32 i = 0; i < RING && i < BLOCKS; ++i) send_for_b(i, i);
  if (BLOCKS > 1) in[1] = load_stage(from, 1);
  put_stage(in[0], stages[0]);
  if (BLOCKS > 2) in[0] = load_stage(from, 2);
  barrier();
  in_rounds<BLOCKS, RING>([&](u32 block, u32 slot, u32 left) {
    const u32 other = (slot + 1) % 2;
    multiply_stage(stages[slot % 2], b[slot], column_block, sums);
    if (left > 1) put_stage(in[other], stages[other]);
    if (left > 3) in[other] = load_stage(from, block + 3);
    if (left > RING) send_for_b(block + RING, slot);
    barrier();
  });
  UNROLL for (u32 t = 0; t < ROW_TILES; ++t)
    UNROLL for (u32 n = 0; n < WAVE_TILES; ++n)
      store(p, first + t * SIDE + place(), (tile + mine + n) * SIDE + quarter() * 4, sums[t][n]);
}

// -- the entry -----------------------------------------------------------------------------------------------------

DEVICE void product(const Product &p) {
  union Lds {
    Stage stages[2];
    Sums sums[WAVES * FEW_TILES * FEW_WIDTH * WAVE];
  };
  SHARED Lds lds;
  const bool few = p.rows <= FEW_ROWS;
  const u32 rows = few ? FEW_TILES * SIDE : ROWS, columns = few ? FEW_COLUMNS : COLUMNS;
  const u32 across = (N + columns - 1) / columns;
  const u32 units = (p.rows + rows - 1) / rows * across;
  ROLLED for (u32 unit = __builtin_amdgcn_workgroup_id_x(); unit < units; unit += WORKGROUPS) {
    const u32 first = unit / across * rows, left = p.rows - first, tile = unit % across * (columns / SIDE);
    if (!few) many_rows(p, first, tile, lds.stages);
    else if (left <= SIDE) few_rows<1, 6>(p, first, tile, lds.sums);
    else if (left <= 2 * SIDE) few_rows<2, 4>(p, first, tile, lds.sums);
    else few_rows<FEW_TILES, 3>(p, first, tile, lds.sums);
    barrier();
  }
}

KERNEL(ENTRY)(const u8 *__restrict a, const u8 *__restrict b, const float *__restrict a_scale,
              const float *__restrict b_scale,
#if HAS_BIAS
              const u8 *__restrict bias,
#endif
#if HAS_RESIDUAL
              const u8 *__restrict residual,
#endif
              u8 *__restrict out, u32 rows) {
#if !HAS_BIAS
  const u8 *bias = nullptr;
#endif
#if !HAS_RESIDUAL
  const u8 *residual = nullptr;
#endif
  product({a, b, a_scale, b_scale, bias, residual, out, rows});
}
