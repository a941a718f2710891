// The row kernel on NVIDIA GPUs, sm_90 and later: machine primitives for row.h.  Self-contained, for NVRTC.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) name

#define HAS_ABSMAX16 1
#define BFLOAT16 1  // its dtype code
enum { E4M3FN = 0, E4M3FNUZ = 1, E5M2 = 2, INT8 = 3 };  // CODESi

constexpr int WAVE = 32;
constexpr bool ANY_ALIGNMENT = false;
constexpr bool SATURATES = true;  // pack_codes makes what is too large, infinity too, the largest finite value

struct f2 { float x, y; };

DEVICE f2 pair(float x, float y) { return {x, y}; }
DEVICE f2 negated(f2 a) { return {-a.x, -a.y}; }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }
DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float reciprocal(float a) { return __frcp_rn(a); }
DEVICE float near_reciprocal(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
DEVICE float square_root(float a) { return __fsqrt_rn(a); }

// Blackwell has two float32 operations in one instruction; each half rounds like the scalar one.
#if __CUDA_ARCH__ >= 1000
DEVICE u64 joined(f2 a) {
  u64 both;
  asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "f"(a.x), "f"(a.y));
  return both;
}
DEVICE f2 split(u64 both) {
  f2 a;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(a.x), "=f"(a.y) : "l"(both));
  return a;
}
DEVICE f2 add2(f2 a, f2 b) {
  u64 r;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(r) : "l"(joined(a)), "l"(joined(b)));
  return split(r);
}
DEVICE f2 mul2(f2 a, f2 b) {
  u64 r;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(r) : "l"(joined(a)), "l"(joined(b)));
  return split(r);
}
DEVICE f2 fma2(f2 a, f2 b, f2 c) {
  u64 r;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(r) : "l"(joined(a)), "l"(joined(b)), "l"(joined(c)));
  return split(r);
}
#else
DEVICE f2 add2(f2 a, f2 b) { return {a.x + b.x, a.y + b.y}; }
DEVICE f2 mul2(f2 a, f2 b) { return {a.x * b.x, a.y * b.y}; }
DEVICE f2 fma2(f2 a, f2 b, f2 c) { return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)}; }
#endif

// Larger magnitude of the two; NaN if either is.
DEVICE float absmax(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(fabsf(a)), "f"(fabsf(b)));
  return r;
}

// The same on two 16-bit floats at once; the signs of the result mean nothing.
template <int DTYPE> DEVICE u32 absmax16(u32 a, u32 b) {
  u32 r;
  if constexpr (DTYPE == BFLOAT16) asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// b if a is NaN.
DEVICE float smaller_number(float a, float b) { return fminf(a, b); }

// Of a number; of NaN, anything.
DEVICE float between(float a, float low, float high) { return fminf(fmaxf(a, low), high); }

DEVICE u32 pack_bf16(f2 a) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(a.y), "f"(a.x));
  return r;
}

// The low half of a word as the high half.  A shift is the work of the unit that also masks, packs and converts, which
// is busiest where few bytes are written of many rows: there a multiplication takes its place, by a factor that the
// assembler does not know to be 2^16.
DEVICE u32 low_up(u32 word) {
#if MANY_BLOCKS > 0
  return word * (blockDim.y << 16);
#else
  return word << 16;
#endif
}

// 0, which the assembler does not know.
DEVICE u32 zero_of(u32 word) { return word & (blockDim.y - 1); }

// Stays in registers: it would otherwise be unpacked again at each use.
DEVICE f2 kept(f2 a) {
  asm volatile("" : "+f"(a.x), "+f"(a.y));
  return a;
}

DEVICE u32 pack_f16(f2 a) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(a.y), "f"(a.x));
  return r;
}

DEVICE f2 unpack_f16(u32 word) {
  f2 a;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(a.x), "=f"(a.y) : "r"(word));
  return a;
}

// Four codes of E4M3FN or E5M2.  A NaN becomes 0x7f whatever its sign.
template <int CODES> DEVICE u32 pack_codes(f2 low, f2 high) {
  static_assert(CODES == E4M3FN || CODES == E5M2, "no instruction converts to this type");
  u32 r;
#define CONVERT(type) \
  asm("{.reg .b16 l, h; cvt.rn.satfinite." type "x2.f32 l, %2, %1; cvt.rn.satfinite." type "x2.f32 h, %4, %3;" \
      " mov.b32 %0, {l, h};}" \
      : "=r"(r) : "f"(low.x), "f"(low.y), "f"(high.x), "f"(high.y))
  if constexpr (CODES == E4M3FN) CONVERT("e4m3");
  else CONVERT("e5m2");
  return r;
}

DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

DEVICE void load16(const u8 *from, u32 *words) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(from));
}

DEVICE void store16(u8 *to, const u32 *words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
      :: "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

// Blackwell has accesses of 32 bytes.
#if __CUDA_ARCH__ >= 1000
constexpr int WIDEST = 32;
#else
constexpr int WIDEST = 16;
#endif

template <int BYTES> DEVICE void load_wide(const u8 *from, u32 *words) {
  if constexpr (BYTES == 4) asm volatile("ld.global.b32 %0, [%1];" : "=r"(words[0]) : "l"(from));
  else if constexpr (BYTES == 8)
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
  else if constexpr (BYTES == 16) load16(from, words);
  else
    asm volatile("ld.global.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]), "=r"(words[4]), "=r"(words[5]),
          "=r"(words[6]), "=r"(words[7])
        : "l"(from));
}

template <int BYTES> DEVICE void store_wide(u8 *to, const u32 *words) {
  if constexpr (BYTES == 16) store16(to, words);
  else
    asm volatile("st.global.v8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};"
        :: "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(words[4]), "r"(words[5]),
           "r"(words[6]), "r"(words[7])
        : "memory");
}

DEVICE void store8(u8 *to, const u32 *words) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(to), "r"(words[0]), "r"(words[1]) : "memory");
}

template <int K> DEVICE u32 fold(u32 value) { return __shfl_xor_sync(0xffffffffu, value, K); }

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 wave() { return threadIdx.x / WAVE; }
DEVICE u32 block() { return blockIdx.x; }
DEVICE void barrier() { __syncthreads(); }

#include "row.h"
