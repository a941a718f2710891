// What CPU kernels have in common: compiler extensions only, no libc, no headers; gcc or clang, any architecture.
//
// PROTOTYPE is the entry's declaration as its caller believes it to be: a kernel that takes something else does not
// compile.  A binding is a base pointer and an offset in elements.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef __INT32_TYPE__ i32;
typedef __INT64_TYPE__ i64;

#ifndef __clang__
#pragma GCC optimize("no-tree-loop-distribute-patterns")  // else copy loops become calls of memcpy
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define HAS_FMA 1
#else
#define HAS_FMA 0
#endif

#define INLINE static inline __attribute__((always_inline, unused))

INLINE float float_of(u32 bits) {
  union { u32 bits; float value; } both = {bits};
  return both.value;
}

INLINE u32 word_of(float value) {
  union { float value; u32 bits; } both = {value};
  return both.bits;
}

// Torch computes with subnormals, IREE's workers run with them flushed to zero: the kernel switches and switches back.
#if defined(__SSE__)
typedef u32 FloatMode;
INLINE FloatMode enter_ieee(void) {
  u32 mode, ieee;
  __asm__ volatile("stmxcsr %0" : "=m"(mode) : : "memory");
  ieee = mode & ~0x8040u;
  __asm__ volatile("ldmxcsr %0" : : "m"(ieee) : "memory");
  return mode;
}
INLINE void leave_ieee(FloatMode mode) { __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
#elif defined(__aarch64__)
typedef i64 FloatMode;
INLINE FloatMode enter_ieee(void) {
  i64 mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
  __asm__ volatile("msr fpcr, %0" : : "r"(mode & ~(i64)0x1080000) : "memory");
  return mode;
}
INLINE void leave_ieee(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
typedef int FloatMode;
INLINE FloatMode enter_ieee(void) { return 0; }
INLINE void leave_ieee(FloatMode mode) { (void)mode; }
#endif

#define TEXT_(...) #__VA_ARGS__
#define TEXT(...) TEXT_(__VA_ARGS__)
#ifdef PROTOTYPE
PROTOTYPE;
#ifdef __ELF__
// For lowering/backends/abi.py: the declaration this object was checked against.
__asm__(".pushsection .vmfuse.abi,\"\",@progbits\n\t.asciz \"" TEXT(PROTOTYPE) "\"\n\t.popsection");
#endif
#endif

#define BINDING(type, name) type *name, i64 name##_offset
