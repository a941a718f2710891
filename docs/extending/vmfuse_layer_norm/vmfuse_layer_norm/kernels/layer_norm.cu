// LayerNorm and quantization on NVIDIA GPUs, sm_90 and later: machine primitives for layer_norm.h.  Self-contained, for
// NVRTC.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define SHARED static __shared__
#define UNROLL _Pragma("unroll")
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name

enum { BF16 = 1, F16 = 2, F32 = 3 };  // dtype codes
constexpr int WAVE = 32;

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }
DEVICE double double_of(u64 bits) { return __longlong_as_double(bits); }
DEVICE u64 bits_of(double value) { return __double_as_longlong(value); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float square_root(float a) { return __fsqrt_rn(a); }

template <int DTYPE> DEVICE float widened(u16 half) {
  if constexpr (DTYPE == BF16) return as_float((u32)half << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

template <int DTYPE> DEVICE u16 narrowed(float value) {
  u16 half;
  if constexpr (DTYPE == BF16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

// The float8_e4m3fn of a value of at most 448, or of a NaN.
DEVICE u8 code_of(float value) {
  u16 two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(0.0f), "f"(value));
  return (u8)two;
}

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 block() { return blockIdx.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE u32 neighbour(u32 value, int k) { return __shfl_xor_sync(0xffffffffu, value, k); }

#include "layer_norm.h"
