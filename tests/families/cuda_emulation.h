// What kernels for NVIDIA GPUs find on the host instead of kernels/mma.h: a cluster of workgroups of EMULATED_THREADS at
// once, every thread a fiber, that share memory and meet.  SHARED and CLUSTER are those of the kernel.

#define STACK_BYTES (64 * 1024)
#include "fibers.h"

#define MMA_H
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

#define DEVICE static inline
#define METHOD inline
#define UNROLL
#define ROLLED
#define KERNEL(name) static void name

#undef WAVE
constexpr int WAVE = 32;
constexpr u32 ANY_THREADS = EMULATED_THREADS;

static void check(bool holds) {
  if (!holds) abort();
}

DEVICE u32 thread() { return current_thread % ANY_THREADS; }
DEVICE u32 in_cluster() { return current_thread / ANY_THREADS; }
DEVICE u32 block() { return current_block * CLUSTER + in_cluster(); }
static u32 block_count;
DEVICE u32 blocks() { return block_count; }

static u8 *memories;  // of the workgroups of the cluster, one after another
DEVICE u8 *shared_memory() { return memories + (u64)in_cluster() * SHARED; }
DEVICE u32 address_of(const void *shared) {
  const u64 address = (const u8 *)shared - shared_memory();
  check(address < SHARED);
  return address;
}
// Where that is in another workgroup.
template <typename T> static T *there(T *shared, u32 rank) {
  check(rank < CLUSTER);
  return (T *)(memories + (u64)rank * SHARED + address_of(shared));
}

template <typename T> DEVICE const T *at_rank(const T *shared, u32 rank) { return there(shared, rank); }

DEVICE u32 as_bits(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
#if INTEGERS
typedef int Sum;
#else
typedef float Sum;
#endif
DEVICE Sum kept(Sum a) { return a; }
DEVICE float fma_of(float a, float b, float c) { return std::fmaf(a, b, c); }
#define fma fma_of

// -- meeting others --------------------------------------------------------------------------------------------------

struct Meeting {
  u32 arrived = 0, generation = 0;
  void arrive(u32 count) {
    if (++arrived == count) arrived = 0, ++generation;
  }
  void wait(u32 since) const {
    while (generation == since) meet();
  }
};

static std::map<u32, Meeting> meetings;
static std::map<u32, u32> cluster_since;

static void meet_others(u32 place, u32 count) {
  Meeting &meeting = meetings[place];
  const u32 since = meeting.generation;
  meeting.arrive(count);
  meeting.wait(since);
}

DEVICE void wave_barrier() { meet_others(current_thread / WAVE, WAVE); }
DEVICE void group_barrier(u32 name) { meet_others(10000 + 16 * in_cluster() + name, 128); }
DEVICE void barrier() { meet_others(20000 + in_cluster(), ANY_THREADS); }
DEVICE void cluster_arrive() {
  cluster_since[current_thread] = meetings[30000].generation;
  meetings[30000].arrive(CLUSTER * ANY_THREADS);
}
DEVICE void cluster_wait() { meetings[30000].wait(cluster_since[current_thread]); }

// -- 16-bit floats -----------------------------------------------------------------------------------------------------

DEVICE u32 bf16_bits(float a) {
  const u32 bits = as_bits(a);
  return std::isnan(a) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 f16_bits(float a) { _Float16 half = (_Float16)a; u16 bits; memcpy(&bits, &half, 2); return bits; }
DEVICE u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
DEVICE u32 pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
DEVICE float bf16_value(u16 bits) { u32 word = (u32)bits << 16; float value; memcpy(&value, &word, 4); return value; }
DEVICE float f16_value(u16 bits) { _Float16 half; memcpy(&half, &bits, 2); return (float)half; }

// The cluster's workgroups, one cluster after another, with shared memory that starts as NaN.
static void run_clusters(u32 blocks, void (*one_thread)()) {
  block_count = blocks;
  memories = (u8 *)std::aligned_alloc(1024, (u64)CLUSTER * ((SHARED + 1023) / 1024 * 1024));
  memset(memories, 0xff, (u64)CLUSTER * SHARED);
  run_blocks(blocks / CLUSTER, CLUSTER * ANY_THREADS, one_thread);
  meetings.clear();
  std::free(memories);
}
