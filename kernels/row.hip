// The row kernel on AMD GPUs of the CDNA line, wave64: machine primitives for row.h.  No HIP headers and no device
// library: every operation is a compiler builtin, so any clang with the amdgcn back end compiles it.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f2 __attribute__((ext_vector_type(2)));
typedef u32 u4 __attribute__((ext_vector_type(4)));
typedef u32 loose_u4 __attribute__((ext_vector_type(4), aligned(1)));
typedef __bf16 bf16x2 __attribute__((ext_vector_type(2)));
typedef _Float16 f16x2 __attribute__((ext_vector_type(2)));

#define DEVICE static __attribute__((device, always_inline)) inline
#define SHARED static __attribute__((shared))
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name) \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(THREADS, THREADS))) void name

#define HAS_ABSMAX16 0

enum { E4M3FN = 0, E4M3FNUZ = 1, E5M2 = 2, INT8 = 3 };  // CODESi

constexpr int WAVE = 64;
constexpr bool ANY_ALIGNMENT = true;  // global memory accesses may start at any byte
constexpr bool SATURATES = false;     // pack_codes makes what is too large NaN

DEVICE f2 pair(float x, float y) { return f2{x, y}; }
DEVICE f2 negated(f2 a) { return -a; }
DEVICE float as_float(u32 bits) { return __builtin_bit_cast(float, bits); }
DEVICE u32 as_bits(float value) { return __builtin_bit_cast(u32, value); }
DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float reciprocal(float a) { return 1.0f / a; }
DEVICE float near_reciprocal(float a) { return __builtin_amdgcn_rcpf(a); }

// The machine's root is within an ulp, and of subnormals zero.  Of larger numbers (a row's mean and an EPS that is
// not tiny) the better neighbour is all that is missing: the one below if its product with the root is not below a,
// the one above if its product is.
DEVICE float square_root(float a) {
  if constexpr (!(EPS >= 0x1p-96f)) return __builtin_sqrtf(a);
  const float near = __builtin_amdgcn_sqrtf(a);
  const float below = as_float(as_bits(near) - 1), above = as_float(as_bits(near) + 1);
  const float root = __builtin_fmaf(-below, near, a) <= 0.0f ? below : near;
  return __builtin_fmaf(-above, near, a) > 0.0f ? above : root;
}

// Pairs compile to v_pk_add_f32, v_pk_mul_f32, v_pk_fma_f32.
DEVICE f2 add2(f2 a, f2 b) { return a + b; }
DEVICE f2 mul2(f2 a, f2 b) { return a * b; }
DEVICE f2 fma2(f2 a, f2 b, f2 c) { return __builtin_elementwise_fma(a, b, c); }

// Larger magnitude of the two; NaN if either is.  gfx950 does three operands at once (v_maximum3_f32).
DEVICE float absmax(float a, float b) {
  return __builtin_elementwise_maximum(__builtin_fabsf(a), __builtin_fabsf(b));
}

// b if a is NaN.
DEVICE float smaller_number(float a, float b) { return __builtin_fminf(a, b); }

// Of a number; of NaN, anything.
DEVICE float between(float a, float low, float high) { return __builtin_amdgcn_fmed3f(a, low, high); }

DEVICE u32 pack_bf16(f2 a) { return __builtin_bit_cast(u32, __builtin_convertvector(a, bf16x2)); }
DEVICE u32 pack_f16(f2 a) { return __builtin_bit_cast(u32, __builtin_convertvector(a, f16x2)); }
DEVICE f2 unpack_f16(u32 word) { return __builtin_convertvector(__builtin_bit_cast(f16x2, word), f2); }

// Four codes.  One instruction of each width, whose flavour is the part's: gfx950 has the OCP formats, earlier parts
// the fnuz ones, whose values differ by a factor of two.
template <int CODES> DEVICE u32 pack_codes(f2 low, f2 high) {
#ifdef __gfx950__
  static_assert(CODES == E4M3FN || CODES == E5M2, "no instruction converts to this type");
#else
  static_assert(CODES == E4M3FNUZ, "no instruction converts to this type");
#endif
  u32 word = as_bits(low.x);  // both halves are written: a register that is free afterwards, rather than a cleared one
  if constexpr (CODES == E5M2) {
    word = __builtin_amdgcn_cvt_pk_bf8_f32(low.x, low.y, word, false);
    return __builtin_amdgcn_cvt_pk_bf8_f32(high.x, high.y, word, true);
  } else {
    word = __builtin_amdgcn_cvt_pk_fp8_f32(low.x, low.y, word, false);
    return __builtin_amdgcn_cvt_pk_fp8_f32(high.x, high.y, word, true);
  }
}

DEVICE u32 zero_of(u32) { return 0; }
DEVICE f2 kept(f2 a) { return a; }
DEVICE u32 low_up(u32 a) { return a << 16; }
DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
  u32 ab = __builtin_amdgcn_perm(b, a, 0x0c0c0400), cd = __builtin_amdgcn_perm(d, c, 0x04000c0c);  // 0x0c is a zero
  return ab | cd;
}

DEVICE void load16(const u8 *from, u32 *words) {
  u4 v = *(const loose_u4 *)from;
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

DEVICE void store16(u8 *to, const u32 *words) { *(loose_u4 *)to = u4{words[0], words[1], words[2], words[3]}; }

DEVICE void store8(u8 *to, const u32 *words) {
  typedef u32 loose_u2 __attribute__((ext_vector_type(2), aligned(1)));
  *(loose_u2 *)to = loose_u2{words[0], words[1]};
}

constexpr int WIDEST = 16;
template <int BYTES> DEVICE void load_wide(const u8 *from, u32 *words) { load16(from, words); }
template <int BYTES> DEVICE void store_wide(u8 *to, const u32 *words) { store16(to, words); }

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
  else return __builtin_amdgcn_ds_bpermute((__builtin_amdgcn_workitem_id_x() ^ 32) << 2, value);
#endif
}

DEVICE u32 thread() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE u32 wave() { return __builtin_amdgcn_readfirstlane(__builtin_amdgcn_workitem_id_x() / WAVE); }
DEVICE u32 block() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

#include "row.h"
