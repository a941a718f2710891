// Runs the product kernel of NVIDIA GPUs (kernels/matmul.cu) on the host: a cluster of workgroups at once, every thread
// a fiber.  Instead of kernels/mma.h it gets what is here, which does the same: HAS_WGMMA says with which of the two
// ways to multiply.  Copies happen late and in an order of chance, as far as the machine may do that too, and shared
// memory starts as NaN, so what is read too early shows.
#include <standard.h>

#define EMULATED_THREADS 384
#define INTEGERS (A_CODES == 3)
#include "cuda_emulation.h"

// -- copies, each thread's in order, and barriers that count them ----------------------------------------------------

static std::vector<std::deque<std::function<void()>>> queues;
static std::minstd_rand chance;

static void do_some_copies() {
  for (u32 i = 0; i < 16; ++i) {
    auto &queue = queues[chance() % queues.size()];
    for (u32 n = chance() % 4; n && !queue.empty(); --n) {
      auto copy = std::move(queue.front());
      queue.pop_front();
      copy();
    }
  }
}
static void later(std::function<void()> copy) { queues[current_thread].push_back(std::move(copy)); }

typedef u64 Barrier;
struct Count {
  int count, pending, bytes;
  u32 phase;
  void settle() {
    if (pending == 0 && bytes == 0) pending = count, phase ^= 1;
  }
};
static std::map<Barrier *, Count> counts;

static Count &count_of(Barrier *at) {
  auto found = counts.find(at);
  check(found != counts.end());
  return found->second;
}
static void arrive_at(Barrier *at, int bytes) {
  Count &count = count_of(at);
  check(count.pending > 0);
  --count.pending, count.bytes += bytes;
  count.settle();
}

DEVICE void barrier_init(Barrier *at, u32 count) {
  check((u64)at % 8 == 0);
  address_of(at);
  counts[at] = {(int)count, (int)count, 0, 0};
}
DEVICE void barriers_made() {}
DEVICE void arrive(Barrier *at) { arrive_at(at, 0); }
DEVICE void arrive_expecting(Barrier *at, u32 bytes) { arrive_at(at, bytes); }
DEVICE void arrive_after_copies(Barrier *at) { later([=] { arrive_at(at, 0); }); }
DEVICE void arrive_at_rank(Barrier *at, u32 rank) { arrive_at(there(at, rank), 0); }
DEVICE void wait(Barrier *at, u32 parity) {
  while (count_of(at).phase == parity) do_some_copies(), meet();
}

DEVICE void publish_at_rank(Barrier *at, u32 rank) { arrive_at_rank(at, rank); }
DEVICE void wait_for_cluster(Barrier *at, u32 parity) { wait(at, parity); }

DEVICE void copy_bulk_to(u32 mask, u8 *to, const u8 *from, u32 bytes, Barrier *done) {
  check((u64)to % 16 == 0 && (u64)from % 16 == 0 && bytes % 16 == 0 && mask >> CLUSTER == 0);
  for (u32 rank = 0; rank < CLUSTER; ++rank)
    if (mask >> rank & 1) {
      u8 *target = there(to, rank);
      Barrier *counted = there(done, rank);
      later([=] {
        memcpy(target, from, bytes);
        count_of(counted).bytes -= bytes;
        count_of(counted).settle();
      });
    }
}
DEVICE void copy_bulk(u8 *to, const u8 *from, u32 bytes, Barrier *done) {
  copy_bulk_to(1u << in_cluster(), to, from, bytes, done);
}
template <int BYTES> static void copy(void *to, const void *from, bool is_there) {
  check((u64)to % BYTES == 0 && (u64)from % BYTES == 0);
  address_of(to);
  later([=] {
    if (is_there) memcpy(to, from, BYTES);
    else memset(to, 0, BYTES);
  });
}
DEVICE void copy16(u8 *to, const u8 *from, bool is_there) { copy<16>(to, from, is_there); }
DEVICE void copy4(float *to, const float *from, bool is_there) { copy<4>(to, from, is_there); }
DEVICE void order_for_wgmma() {}
DEVICE void load2(const float *shared, float *values) {
  check((u64)shared % 8 == 0 && address_of(shared) < SHARED);
  memcpy(values, shared, 8);
}
DEVICE void load16(const u8 *from, u32 *words) {
  check((u64)from % 16 == 0);
  memcpy(words, from, 16);
}
DEVICE void store16(u8 *to, const u32 *words) {
  check((u64)to % 16 == 0);
  memcpy(to, words, 16);
}

template <int COUNT> DEVICE void give_registers() {}
template <int COUNT> DEVICE void take_registers() {}

// -- products of codes ------------------------------------------------------------------------------------------------

static float value_of(u8 code) {
  if (INTEGERS) return (int8_t)code;
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return NAN;
  const float magnitude = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code >> 7 ? -magnitude : magnitude;
}
static std::vector<float> values;

#if HAS_WGMMA
DEVICE u64 descriptor(const u8 *tile) {
  check(address_of(tile) % 1024 == 0);
  return address_of(tile);
}
// Byte k of a row of a tile that starts at `start`, which lies inside a first row.
static float element(u64 start, u32 row, u32 k) {
  const u64 address = start + row * 128 + k;
  return values[shared_memory()[address ^ (address >> 7 & 7) << 4]];
}
// A descriptor counts in units of 16 bytes.
template <int COLUMNS> DEVICE void wgmma(Sum *d, u64 a, u64 b, bool adds) {
  const u64 a_steps = a % 1024, b_steps = b % 1024;
  const u64 a_start = a - a_steps + 16 * a_steps, b_start = b - b_steps + 16 * b_steps;
  const u32 lane = thread() % WAVE, wave = thread() % 128 / WAVE;
  for (int i = 0; i < COLUMNS / 2; ++i) {
    const u32 row = 16 * wave + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    Sum sum = adds ? d[i] : 0;
    for (u32 k = 0; k < 32; ++k) sum += element(a_start, row, k) * element(b_start, column, k);
    d[i] = sum;
  }
}
DEVICE void wgmma_begin() {}
DEVICE void wgmma_commit() {}
template <int COUNT> DEVICE void wgmma_wait(Sum *, int) {}
#else
static std::vector<u32> registers;  // eight of each thread, for the others to read
static u32 *registers_of(u32 lane) { return &registers[(current_thread / WAVE * WAVE + lane) * 8]; }

DEVICE void load_matrices(const u8 *row, u32 *words) {
  const u32 lane = thread() % WAVE;
  check(address_of(row) % 16 == 0);
  registers_of(lane)[0] = address_of(row);
  wave_barrier();
  for (u32 i = 0; i < 4; ++i) memcpy(words + i, shared_memory() + registers_of(8 * i + lane / 4)[0] + 4 * (lane % 4), 4);
  wave_barrier();
}
static float code_at(const u32 *words, u32 which, u32 k) { return values[words[which] >> 8 * (k % 4) & 255]; }

DEVICE void multiply_add(Sum *d, const u32 *a, const u32 *b) {
  const u32 lane = thread() % WAVE;
  memcpy(registers_of(lane), a, 16), memcpy(registers_of(lane) + 4, b, 8);
  wave_barrier();
  for (u32 i = 0; i < 4; ++i) {
    const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (u32 k = 0; k < 32; ++k)
      d[i] += code_at(registers_of(row % 8 * 4 + k % 16 / 4), row / 8 + k / 16 * 2, k) *
              code_at(registers_of(column * 4 + k % 16 / 4), 4 + k / 16, k);
  }
  wave_barrier();
}
#endif

#include "matmul.cu"

static_assert(THREADS == ANY_THREADS, "threads are counted in workgroups of this size");
static void *const *arguments;
static int row_count;

static void one_thread() {
  void *const *next = arguments;
  const u8 *a = (const u8 *)*next++, *b = (const u8 *)*next++;
  const float *a_scale = (const float *)*next++, *b_scale = (const float *)*next++;
#if HAS_BIAS
  const u8 *bias = (const u8 *)*next++;
#endif
#if HAS_RESIDUAL
  const u8 *residual = (const u8 *)*next++;
#endif
  ENTRY(a, b, a_scale, b_scale,
#if HAS_BIAS
        bias,
#endif
#if HAS_RESIDUAL
        residual,
#endif
        (u8 *)*next, row_count);
}

// `blocks` is a multiple of CLUSTER; any such grid computes the same.
extern "C" void launch(void *const *pointers, int rows, int blocks) {
  arguments = pointers, row_count = rows;
  for (u32 code = 0; values.size() < 256; ++code) values.push_back(value_of(code));
#if !HAS_WGMMA
  registers.resize(8 * CLUSTER * THREADS);
#endif
  queues.resize(CLUSTER * THREADS);
  run_clusters(blocks, one_thread);
  for (auto &queue : queues) check(queue.empty());
  for (auto &each : counts) check(each.second.bytes == 0);
  counts.clear();
}
