// The COUNT largest or smallest elements of rows on CPUs, equal ones in the order that eager PyTorch gives them.
//
// Entries compare by a key that orders as torch does: a NaN is larger than all else and equal to every other, the zeros
// are equal.  The key that comes first is the smallest.
//
// The macros that specialise this file come from lowering/families/selection.py.

#include "cpu.h"

// dtype codes
#define BF16 1
#define F16 2
#define F32 3
#define I32 4
#define I64 5

#if DTYPE == F32
typedef float Element;
#elif DTYPE == I32
typedef i32 Element;
#elif DTYPE == I64
typedef i64 Element;
#else
typedef u16 Element;
#endif
#if DTYPE == I64
typedef i64 Key;
#else
typedef i32 Key;
#endif

typedef struct {
  Key key;
  i32 place;
} Entry;

#if DTYPE <= F32
INLINE i32 ordered(u32 bits, u32 sign, u32 infinity) {
  i32 magnitude = bits & (sign - 1);
  if (magnitude > (i32)infinity) return __INT32_MAX__;
  return bits & sign ? -magnitude : magnitude;
}
#endif

INLINE Key key_of(Element element) {
#if DTYPE == F32
  Key key = ordered(word_of(element), 0x80000000u, 0x7f800000u);
#elif DTYPE <= F16
  Key key = ordered(element, 0x8000u, DTYPE == BF16 ? 0x7f80u : 0x7c00u);
#else
  Key key = element;
#endif
  return LARGEST ? ~key : key;
}

#include "order.h"

// What a heap or a partition is made of: all elements, or only those kept so far.
#define HELD (KEEPS_FEW(COUNT, ELEMENTS) ? COUNT : ELEMENTS)

// -- a row -----------------------------------------------------------------------------------------

static void one_row(const Element *x, Element *values, i64 *places) {
  Entry entries[HELD];
  for (int i = 0; i < HELD; ++i) entries[i] = (Entry){key_of(x[i]), i};
  if (KEEPS_FEW(COUNT, ELEMENTS)) {
    // As bring_first does, without those that are not kept.
    make_heap(entries, COUNT);
    for (int i = COUNT; i < ELEMENTS; ++i) {
      Entry next = {key_of(x[i]), i};
      if (before(next, entries[0])) fill_hole(entries, 0, COUNT, next);
    }
    sort_heap(entries, COUNT);
  } else {
    bring_first(entries, COUNT, ELEMENTS, SORTED);
  }
  for (int i = 0; i < COUNT; ++i) {
    values[i] = x[entries[i].place];
    places[i] = entries[i].place;
  }
}

void ENTRY(BINDING(const Element, x), BINDING(Element, values), BINDING(i64, places), i32 rows, i32 workgroup) {
  i64 first = (i64)workgroup * ROWS, end = first + ROWS < rows ? first + ROWS : rows;
  for (i64 row = first; row < end; ++row)
    one_row(x + x_offset + row * ELEMENTS, values + values_offset + row * COUNT, places + places_offset + row * COUNT);
}
