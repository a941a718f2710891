// Grouped top-k routing on NVIDIA GPUs, sm_90 and later: machine primitives for topk.h.  Self-contained, for NVRTC.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name

constexpr int WAVE = 32;
constexpr bool ANY_ALIGNMENT = false;

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }
DEVICE double double_of(u64 bits) { return __longlong_as_double(bits); }
DEVICE u64 bits_of(double value) { return __double_as_longlong(value); }
DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE float square_root(float a) { return __fsqrt_rn(a); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float near_reciprocal(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

DEVICE float f16_value(u32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
  return value;
}

template <int BYTES> DEVICE void load_words(const u8 *from, u32 *words) {
  if constexpr (BYTES == 16) {
    const uint4 v = *(const uint4 *)from;
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (BYTES == 8) {
    const uint2 v = *(const uint2 *)from;
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = *(const u32 *)from;
  }
}

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 block() { return blockIdx.x; }

template <int K> DEVICE u32 fold(u32 value) { return __shfl_xor_sync(0xffffffffu, value, K); }

// Lanes of a token: LANES neighbours, LANES a power of two.
template <int LANES> DEVICE u32 first_of_token() { return threadIdx.x % WAVE / LANES * LANES; }
template <int LANES> DEVICE u32 token_mask() {
  return LANES == WAVE ? 0xffffffffu : ((1u << LANES % WAVE) - 1) << first_of_token<LANES>();
}

// The largest value among the lanes of the token.
template <int LANES> DEVICE u32 largest(u32 value) { return __reduce_max_sync(token_mask<LANES>(), value); }

// The first lane of the token, counted from its first, where `holds`; one does.
template <int LANES> DEVICE u32 first_lane(bool holds) {
  return __ffs(__ballot_sync(0xffffffffu, holds) & token_mask<LANES>()) - 1 - first_of_token<LANES>();
}

// The value of that lane of the token.
template <int LANES> DEVICE u32 from_lane(u32 value, u32 lane) {
  return __shfl_sync(0xffffffffu, value, lane, LANES);
}

#include "topk.h"
