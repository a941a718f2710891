// LayerNorm and quantization on AMD GPUs of the CDNA line, wave64: machine primitives for layer_norm.h.  No HIP headers
// and no device library: every operation is a compiler builtin.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __attribute__((device, always_inline)) inline
#define SHARED static __attribute__((shared))
#define UNROLL _Pragma("unroll")
#define KERNEL(name) \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(THREADS, THREADS))) void name

enum { BF16 = 1, F16 = 2, F32 = 3 };  // dtype codes
constexpr int WAVE = 64;

DEVICE float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE u32 as_bits(float value) { return __builtin_bit_cast(u32, value); }
DEVICE double double_of(u64 bits) { return __builtin_bit_cast(double, bits); }
DEVICE u64 bits_of(double value) { return __builtin_bit_cast(u64, value); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float square_root(float a) { return __builtin_sqrtf(a); }

template <int DTYPE> DEVICE float widened(u16 half) {
  if constexpr (DTYPE == BF16) return as_float((u32)half << 16);
  else return (float)__builtin_bit_cast(_Float16, half);
}

template <int DTYPE> DEVICE u16 narrowed(float value) {
  if constexpr (DTYPE == BF16) return __builtin_bit_cast(u16, (__bf16)value);
  else return __builtin_bit_cast(u16, (_Float16)value);
}

// The float8_e4m3fn of a value of at most 448, or of a NaN.
DEVICE u8 code_of(float value) { return (u8)__builtin_amdgcn_cvt_pk_fp8_f32(value, 0.0f, 0, false); }

DEVICE u32 thread() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE u32 block() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
DEVICE u32 neighbour(u32 value, int k) { return __builtin_amdgcn_ds_bpermute((thread() ^ k) << 2, value); }

#include "layer_norm.h"
