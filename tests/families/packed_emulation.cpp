// Runs the product with packed weights of NVIDIA GPUs (kernels/packed.cu) on the host: a cluster of workgroups at once,
// every thread a fiber.

#include <standard.h>

#define EMULATED_THREADS (32 * ACROSS * ALONG)
#include "cuda_emulation.h"

static u32 __float_as_uint(float value) { return as_bits(value); }
static float __uint_as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }

// -- pairs of 16-bit floats ------------------------------------------------------------------------------------------

#define OF_PAIRS(name, type, operation)                                                                    \
  DEVICE u32 name(u32 a, u32 b) {                                                                          \
    return pack_##type(type##_value(a) operation type##_value(b), type##_value(a >> 16) operation type##_value(b >> 16)); \
  }
OF_PAIRS(subtract_bf16, bf16, -)
OF_PAIRS(multiply_bf16, bf16, *)
OF_PAIRS(subtract_f16, f16, -)
OF_PAIRS(multiply_f16, f16, *)

DEVICE u32 bytes_of(u32 a, u32 b, u32 selector) {
  const u64 all = (u64)b << 32 | a;
  u32 bytes = 0;
  for (u32 i = 0; i < 4; ++i) bytes |= (u32)(all >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return bytes;
}

static std::vector<u32> registers;  // six of each thread, for the others to read
static u32 *registers_of(u32 lane) { return &registers[(current_thread / WAVE * WAVE + lane) * 6]; }

#define MULTIPLY_ADD(name, value)                                                                            \
  DEVICE void name(float *d, const u32 *a, const u32 *b) {                                                   \
    const u32 lane = thread() % WAVE;                                                                        \
    memcpy(registers_of(lane), a, 16), memcpy(registers_of(lane) + 4, b, 8);                                 \
    wave_barrier();                                                                                          \
    for (u32 i = 0; i < 4; ++i) {                                                                            \
      const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;                                   \
      for (u32 k = 0; k < 16; ++k) {                                                                         \
        const u32 left = registers_of(row % 8 * 4 + k % 8 / 2)[row / 8 + k / 8 * 2];                         \
        const u32 right = registers_of(column * 4 + k % 8 / 2)[4 + k / 8];                                   \
        d[i] += value(left >> 16 * (k % 2)) * value(right >> 16 * (k % 2));                                  \
      }                                                                                                      \
    }                                                                                                        \
    wave_barrier();                                                                                          \
  }
MULTIPLY_ADD(multiply_add_bf16, bf16_value)
MULTIPLY_ADD(multiply_add_f16, f16_value)

DEVICE void load16(const u8 *from, u32 *words) {
  check((u64)from % 16 == 0);
  memcpy(words, from, 16);
}
DEVICE void load16_once(const u8 *from, u32 *words) { load16(from, words); }
DEVICE void load16_shared(const u8 *from, u32 *words) {
  address_of(from);
  load16(from, words);
}

// -- copies: none is done before it is waited for ------------------------------------------------------------------------

static std::vector<std::vector<std::function<void()>>> copies;  // of each thread

DEVICE void copy16(u8 *to, const u8 *from, bool there) {
  check((u64)to % 16 == 0 && (!there || (u64)from % 16 == 0));
  address_of(to);
  copies[current_thread].push_back([=] { there ? memcpy(to, from, 16) : memset(to, 0, 16); });
}
DEVICE void wait_for_copies() {
  for (auto &copy : copies[current_thread]) copy();
  copies[current_thread].clear();
}

#include "packed.cu"

static void *const *arguments;
static int row_count;

static void one_thread() {
  void *const *next = arguments;
  const u8 *a = (const u8 *)*next++, *b = (const u8 *)*next++, *scale = (const u8 *)*next++;
#if HAS_ZERO
  const u8 *zero = (const u8 *)*next++;
#endif
#if HAS_BIAS
  const u8 *bias = (const u8 *)*next++;
#endif
#if HAS_RESIDUAL
  const u8 *residual = (const u8 *)*next++;
#endif
  ENTRY(a, b, scale,
#if HAS_ZERO
        zero,
#endif
#if HAS_BIAS
        bias,
#endif
#if HAS_RESIDUAL
        residual,
#endif
        (u8 *)*next, row_count);
}

extern "C" void launch(void *const *pointers, int rows, int blocks) {
  arguments = pointers, row_count = rows;
  registers.resize(6 * CLUSTER * THREADS), copies.resize(CLUSTER * THREADS);
  run_clusters(blocks, one_thread);
}
