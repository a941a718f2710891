// Grouped top-k routing on AMD GPUs of the CDNA line, wave64: machine primitives for topk.h.  No HIP headers and no
// device library: every operation is a compiler builtin.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u32 u4 __attribute__((ext_vector_type(4)));
typedef u32 u2 __attribute__((ext_vector_type(2)));
typedef u32 loose_u4 __attribute__((ext_vector_type(4), aligned(1)));
typedef u32 loose_u2 __attribute__((ext_vector_type(2), aligned(1)));
typedef u32 loose_u32 __attribute__((aligned(1)));

#define DEVICE static __attribute__((device, always_inline)) inline
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name) \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(THREADS, THREADS))) void name

constexpr int WAVE = 64;
constexpr bool ANY_ALIGNMENT = true;  // global memory accesses may start at any byte

DEVICE float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE u32 as_bits(float value) { return __builtin_bit_cast(u32, value); }
DEVICE double double_of(u64 bits) { return __builtin_bit_cast(double, bits); }
DEVICE u64 bits_of(double value) { return __builtin_bit_cast(u64, value); }
DEVICE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEVICE float square_root(float a) { return __builtin_sqrtf(a); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float near_reciprocal(float a) { return __builtin_amdgcn_rcpf(a); }
DEVICE float f16_value(u32 bits) { return (float)__builtin_bit_cast(_Float16, (u16)bits); }

template <int BYTES> DEVICE void load_words(const u8 *from, u32 *words) {
  if constexpr (BYTES == 16) {
    const u4 v = *(const loose_u4 *)from;
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (BYTES == 8) {
    const u2 v = *(const loose_u2 *)from;
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = *(const loose_u32 *)from;
  }
}

DEVICE u32 thread() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE u32 block() { return __builtin_amdgcn_workgroup_id_x(); }

// Up to 8 the exchange is a modifier of the instruction that uses it (DPP).  The mirrors are no butterflies, but
// lanes of a block agree already, so any lane of the other block will do.
template <int K> DEVICE u32 fold(u32 value) {
  if constexpr (K == 1) return __builtin_amdgcn_update_dpp(0, value, 0xb1, 0xf, 0xf, true);        // quad_perm 1,0,3,2
  else if constexpr (K == 2) return __builtin_amdgcn_update_dpp(0, value, 0x4e, 0xf, 0xf, true);   // quad_perm 2,3,0,1
  else if constexpr (K == 4) return __builtin_amdgcn_update_dpp(0, value, 0x141, 0xf, 0xf, true);  // row_half_mirror
  else if constexpr (K == 8) return __builtin_amdgcn_update_dpp(0, value, 0x140, 0xf, 0xf, true);  // row_mirror
#ifdef __gfx950__
  // The swap leaves one operand with the value of this block of K lanes, the other with that of its neighbour.
  else if constexpr (K == 16) {
    auto both = __builtin_amdgcn_permlane16_swap(value, value, false, false);
    return both[0] ^ both[1] ^ value;
  } else {
    auto both = __builtin_amdgcn_permlane32_swap(value, value, false, false);
    return both[0] ^ both[1] ^ value;
  }
#else
  else if constexpr (K == 16) return __builtin_amdgcn_ds_swizzle(value, 0x401f);                   // xor 16
  else return __builtin_amdgcn_ds_bpermute((thread() ^ 32) << 2, value);
#endif
}

// Lanes of a token: LANES neighbours, LANES a power of two.
template <int LANES> DEVICE u32 first_of_token() { return thread() % WAVE / LANES * LANES; }

// The largest value among the lanes of the token.
template <int LANES, int K = 1> DEVICE u32 largest(u32 value) {
  if constexpr (K == LANES) return value;
  else {
    const u32 other = fold<K>(value);
    return largest<LANES, 2 * K>(value > other ? value : other);
  }
}

// The first lane of the token, counted from its first, where `holds`; one does.
template <int LANES> DEVICE u32 first_lane(bool holds) {
  return __builtin_ctzll(__builtin_amdgcn_ballot_w64(holds) >> (LANES == WAVE ? 0 : first_of_token<LANES>()));
}

// The value of that lane of the token.  Where a token has the whole wave, all lanes ask for the same one.
template <int LANES> DEVICE u32 from_lane(u32 value, u32 lane) {
  if constexpr (LANES == WAVE) return __builtin_amdgcn_readlane(value, __builtin_amdgcn_readfirstlane(lane));
  else return __builtin_amdgcn_ds_bpermute((first_of_token<LANES>() + lane) << 2, value);
}

#include "topk.h"
