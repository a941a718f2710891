// What products need of NVIDIA GPUs, sm_90a and later: asynchronous copies and the barriers that count them, shared
// memory of a cluster, matrix products of 8-bit and 16-bit floats.  Self-contained, for NVRTC.
//
// Shared memory that the copy engine or wgmma reads lies in rows of 128 bytes, 8 of them aligned to 1024, in which
// the 16-byte chunk c of row r is at chunk c ^ (r % 8): eight rows of one chunk then lie in different banks.
#ifndef MMA_H
#define MMA_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#ifndef RESIDENT
#define RESIDENT 1  // workgroups that a multiprocessor has registers for at least
#endif
#if CLUSTER > 1
#define KERNEL(name) extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, RESIDENT) name
#else
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) name
#endif

#define HAS_WGMMA (__CUDA_ARCH__ == 900)

constexpr int WAVE = 32;

DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 block() { return blockIdx.x; }
DEVICE u32 blocks() { return gridDim.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE void wave_barrier() { __syncwarp(); }
// Of the 128 threads that name it, 1 to 15.
DEVICE void group_barrier(u32 name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }

DEVICE u8 *shared_memory() {
  extern __shared__ __align__(1024) u8 memory[];
  return memory;
}
DEVICE u32 address_of(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }

DEVICE u32 as_bits(float value) { return __float_as_uint(value); }
// What products of 8-bit codes are summed up in.
#if INTEGERS
typedef int Sum;
#define SUM "+r"
#else
typedef float Sum;
#define SUM "+f"
#endif
// In its place among what is volatile.
DEVICE Sum kept(Sum a) {
  asm volatile("" : SUM(a));
  return a;
}
DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// -- results -------------------------------------------------------------------------------------------------------

DEVICE u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float bf16_value(u16 bits) { return __uint_as_float((u32)bits << 16); }
DEVICE float f16_value(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// -- pairs of 16-bit floats ------------------------------------------------------------------------------------------

#define OF_PAIRS(name, instruction)                                   \
  DEVICE u32 name(u32 a, u32 b) {                                     \
    u32 r;                                                            \
    asm(instruction " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));       \
    return r;                                                         \
  }
OF_PAIRS(subtract_bf16, "sub.rn.bf16x2")
OF_PAIRS(multiply_bf16, "mul.rn.bf16x2")
OF_PAIRS(subtract_f16, "sub.rn.f16x2")
OF_PAIRS(multiply_f16, "mul.rn.f16x2")

// Byte i of the result is byte `selector >> 4 * i` of those of a, then b.
DEVICE u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// d += a b^T: 16 rows of a, 8 of b, 16 elements along K.  Lane l holds, of a, rows l/4 and 8 below, and of b row l/4:
// the elements 2(l%4) and the next, then those 8 beyond; a: both rows of the first, then of the others.
#define MULTIPLY_ADD(name, type)                                                                                      \
  DEVICE void name(float *d, const u32 *a, const u32 *b) {                                                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"    \
                 " {%8, %9}, {%0, %1, %2, %3};"                                                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                 \
  }
MULTIPLY_ADD(multiply_add_bf16, "bf16")
MULTIPLY_ADD(multiply_add_f16, "f16")

// Of weights that are read once: they are not kept in the first cache.
DEVICE void load16_once(const u8 *from, u32 *words) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(from));
}
// Not before what is written before it.
DEVICE void load16(const u8 *from, u32 *words) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(from));
}

// -- barriers ------------------------------------------------------------------------------------------------------

// Completes a phase when so many threads have arrived, and as many bytes as were announced.
typedef u64 Barrier;

DEVICE void barrier_init(Barrier *at, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(at)), "r"(count) : "memory");
}
// After the inits, before anyone else may use them.
DEVICE void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void arrive(Barrier *at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(at)) : "memory");
}
// Arrive once, and announce bytes.
DEVICE void arrive_expecting(Barrier *at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(at)), "r"(bytes) : "memory");
}
// Arrive when this thread's copies until now are done.
DEVICE void arrive_after_copies(Barrier *at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address_of(at)) : "memory");
}
// Until the phase of this parity is complete; what was written before by the arrived, of this workgroup, is seen.
#define WAIT(order)                                                                                                 \
  u32 complete;                                                                                                     \
  do asm volatile("{.reg .pred p; mbarrier.try_wait.parity" order ".shared::cta.b64 p, [%1], %2;"                   \
                  " selp.u32 %0, 1, 0, p;}"                                                                         \
                  : "=r"(complete) : "r"(address_of(at)), "r"(parity) : "memory");                                  \
  while (!complete)
DEVICE void wait(Barrier *at, u32 parity) { WAIT(""); }
// The same of all workgroups of the cluster, which costs more.
DEVICE void wait_for_cluster(Barrier *at, u32 parity) { WAIT(".acquire.cluster"); }

// -- clusters ------------------------------------------------------------------------------------------------------

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The same place in the shared memory of another workgroup of the cluster.
template <typename T> DEVICE const T *at_rank(const T *shared, u32 rank) {
  u64 there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return (const T *)there;
}
#define ARRIVE_AT_RANK(order)                                                                                       \
  asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"                                          \
               " mbarrier.arrive" order ".shared::cluster.b64 _, [there];}"                                         \
               ::"r"(address_of(at)), "r"(rank) : "memory")
// Nothing that was written is promised to be seen there.
DEVICE void arrive_at_rank(Barrier *at, u32 rank) { ARRIVE_AT_RANK(""); }
// All that was written is seen there, by those who wait for the cluster.
DEVICE void publish_at_rank(Barrier *at, u32 rank) { ARRIVE_AT_RANK(".release.cluster"); }

// -- copies into shared memory ---------------------------------------------------------------------------------------

// What the barrier counts as bytes; addresses and size are multiples of 16.
DEVICE void copy_bulk(u8 *to, const u8 *from, u32 bytes, Barrier *done) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(done)) : "memory");
}
// To the same place in all workgroups of the mask, whose barriers count it.
DEVICE void copy_bulk_to(u32 mask, u8 *to, const u8 *from, u32 bytes, Barrier *done) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1], %2, [%3], %4;"
               ::"r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(done)), "h"((u16)mask) : "memory");
}
// Zeros unless `there`, and then `from` is not read.
DEVICE void copy16(u8 *to, const u8 *from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(address_of(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void copy4(float *to, const float *from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               ::"r"(address_of(to)), "l"(from), "r"(there ? 4 : 0) : "memory");
}
// Until this thread's copies are done, other threads' being waited for by those.
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What was written by threads and copies before is seen by wgmma after.
DEVICE void order_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void load16_shared(const u8 *shared, u32 *words) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address_of(shared)) : "memory");
}
// Not before what is said to begin before it.
DEVICE void load2(const float *shared, float *values) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(values[0]), "=f"(values[1]) : "r"(address_of(shared)) : "memory");
}

DEVICE void store16(u8 *to, const u32 *words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

// -- registers: a warpgroup gives some away, another takes them ------------------------------------------------------

template <int COUNT> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// -- products ------------------------------------------------------------------------------------------------------

// In all of them lane l of warp w of a warpgroup holds, of 64 x COLUMNS results, those in the rows 16w + l/4 and 8 below
// and, in each 8 columns, the columns 2(l%4) and the next: d[4j], d[4j+1], d[4j+2] and d[4j+3] for columns 8j on.

#if HAS_WGMMA
// A tile of rows of 128 swizzled bytes: address, 1024 bytes from 8 rows to the next, 128-byte swizzle.
DEVICE u64 descriptor(const u8 *tile) {
  // An address has the workgroup's rank above its 18 bits.
  return (u64)((address_of(tile) & 0x3ffff) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

#define NUMBERS4 "%0, %1, %2, %3"
#define NUMBERS8 NUMBERS4 ", %4, %5, %6, %7"
#define NUMBERS16 NUMBERS8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS32 NUMBERS16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS64 NUMBERS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
                            " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RESULTS4(i) SUM(d[i]), SUM(d[i + 1]), SUM(d[i + 2]), SUM(d[i + 3])
#define RESULTS8(i) RESULTS4(i), RESULTS4(i + 4)
#define RESULTS16(i) RESULTS8(i), RESULTS8(i + 8)
#define RESULTS32(i) RESULTS16(i), RESULTS16(i + 16)
#define RESULTS64(i) RESULTS32(i), RESULTS32(i + 32)
#if INTEGERS
#define TYPES "s32.s8.s8"
#define SIGNS
#else
#define TYPES "f32.e4m3.e4m3"
#define SIGNS ", 1, 1"
#endif
#define WGMMA(columns, count, a_at, b_at, adds_at)                                                                  \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #adds_at ", 0;"                                                    \
               " wgmma.mma_async.sync.aligned.m64n" #columns "k32." TYPES " {" NUMBERS##count "},"                  \
               " %" #a_at ", %" #b_at ", p" SIGNS ";}"                                                              \
               : RESULTS##count(0) : "l"(a), "l"(b), "r"((u32)adds))

// d = a b^T, or d + a b^T where it adds: 64 rows of a, COLUMNS of b, 32 codes along K.
template <int COLUMNS> DEVICE void wgmma(Sum *d, u64 a, u64 b, bool adds) {
  if constexpr (COLUMNS == 8) WGMMA(8, 4, 4, 5, 6);
  else if constexpr (COLUMNS == 16) WGMMA(16, 8, 8, 9, 10);
  else if constexpr (COLUMNS == 32) WGMMA(32, 16, 16, 17, 18);
  else if constexpr (COLUMNS == 64) WGMMA(64, 32, 32, 33, 34);
  else WGMMA(128, 64, 64, 65, 66);
}
DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all are done that were committed but for the last `after`, at most 3; d, of COUNT, is theirs.
template <int COUNT> DEVICE void wgmma_wait(Sum *d, int after) {
  if (after == 0) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  else if (after == 1) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  else if (after == 2) asm volatile("wgmma.wait_group.sync.aligned 2;" ::: "memory");
  else asm volatile("wgmma.wait_group.sync.aligned 3;" ::: "memory");
  UNROLL for (int i = 0; i < COUNT; ++i) asm volatile("" : SUM(d[i])::"memory");
}
#else
// Four matrices of 8 rows of 16 bytes: lane l gives row l%8 of matrix l/8, and gets of each the 4 bytes l%4 of row l/4.
DEVICE void load_matrices(const u8 *row, u32 *words) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address_of(row)) : "memory");
}
// d += a b^T: 16 rows of a, 8 of b, 32 codes along K.  a: rows 0-7 and 8-15 of the first 16 codes, then of the others.
#if INTEGERS
#define TYPES "s32.s8.s8.s32"
#else
#define TYPES "f32.e4m3.e4m3.f32"
#endif
DEVICE void multiply_add(Sum *d, const u32 *a, const u32 *b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
               " {%0, %1, %2, %3};"
               : SUM(d[0]), SUM(d[1]), SUM(d[2]), SUM(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#endif
