// One kernel family for GPUs: a row of x [T, HIDDEN] is read once, becomes y, and leaves as any of: y in x's dtype, up
// to four quantized copies (codes, and scales unless those are given), and the residual sum.  What makes y is one of:
// nothing (y = x); a norm (optionally a residual is added, then the row, or each group of it, is normalised by its root
// mean square or its mean and variance, weighted and a bias is added); a gate (y = act(x) * up); or both (y = act(up) *
// norm(x), or norm(act(up) * x)).
//
// tile.h has the arithmetic and the order of things.  What differs between machines (wave width, lane exchange,
// converts, packed float32 math) is in the .cu and .hip files that include this; the numbers that specialise it (macros)
// come from lowering/families/row.py, where each is explained.

enum { NONE = 0, BF16 = 1, F16 = 2, F32 = 3 };             // dtype codes
enum { UNROUNDED = 0, ONCE = 1, TWICE = 2 };               // ROUNDING
enum { NO_RESIDUAL = 0, EXACT = 1, ROUNDED = 2 };          // RESIDUAL
enum { NO_ACT = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };    // ACT
enum { ROW = 0, COLUMN_TMA = 1, COLUMN = 2, UE8M0_PACKED = 3 };  // LAYOUTi
enum { DIVIDED = 0, CORRECTED = 1, TWOFOLD = 2, GIVEN = 3 };  // QUOTIENTi
enum { BY_SCALE = 0, BY_RECIPROCAL = 1, BY_INVERSE = 2, INVERTED_TWICE = 4, SCALE_IS_INVERTED = 8 };  // RECIPROCALi

#include "given.h"
#include "norm.h"

template <int DTYPE> constexpr int SIZE = DTYPE == F32 ? 4 : 2;  // bytes
// The widest access of the machine that rows are a multiple of.
enum { ROW_UNIT = HIDDEN * (SIZE<Y_DTYPE> < SIZE<X_DTYPE> ? SIZE<Y_DTYPE> : SIZE<X_DTYPE>) };
constexpr int WIDE_BYTES = ROW_UNIT % WIDEST == 0 ? WIDEST : 16;
// The widest that every row of an input is aligned to, if its tensor is: the lowest bit of where they start.
template <int STARTS> constexpr int ROW_BYTES =
    ANY_ALIGNMENT || STARTS % WIDE_BYTES == 0 ? WIDE_BYTES : STARTS & -STARTS;
constexpr int X_BYTES = ROW_BYTES<(X_PITCH | X_OFFSET) * SIZE<X_DTYPE>>;
constexpr int OTHER_BYTES = ROW_BYTES<(OTHER_PITCH | OTHER_OFFSET) * SIZE<OTHER_DTYPE>>;
constexpr u32 INFINITE_BITS = 0x7f800000u;
#define INFINITE as_float(INFINITE_BITS)

// `x` and `other`, the residual or up, point to their first row; the next are X_PITCH and OTHER_PITCH elements on.
struct Site {
  const u8 *x, *other, *weight, *bias;
  u8 *sum, *y;
  u8 *q[4], *scale[4];  // a scale that is given is only read
  u32 rows;
};

// Lanes are laid over many rows in one way and over few in another.
#define ROW_LANES MANY_LANES
#define VECTORS MANY_VECTORS
#define VECTOR MANY_VECTOR
#define ROWS MANY_ROWS
#define BATCHES MANY_BATCHES
#define MOST_BLOCKS MANY_BLOCKS
#define SLICES 1
namespace many {
#include "tile.h"
}

#if FEW_ROWS
#undef ROW_LANES
#undef VECTORS
#undef VECTOR
#undef ROWS
#undef BATCHES
#undef MOST_BLOCKS
#undef SLICES
#define ROW_LANES FEW_LANES
#define VECTORS FEW_VECTORS
#define VECTOR FEW_VECTOR
#define ROWS 1
#define BATCHES 1
#define MOST_BLOCKS 0
#define SLICES FEW_SLICES
namespace few {
#include "tile.h"
}
#endif

DEVICE u64 address(const void *pointer) { return (u64)pointer; }

KERNEL(ENTRY)(const u8 *x
#if ACT && !GATE_PACKED
              , const u8 *up
#endif
#if RESIDUAL
              , const u8 *residual
#endif
#if WEIGHT_DTYPE
              , const u8 *weight
#endif
#if BIAS_DTYPE
              , const u8 *bias
#endif
#if QUANTS > 0
              IF_GIVEN(0, , const u8 *scale0)
#endif
#if QUANTS > 1
              IF_GIVEN(1, , const u8 *scale1)
#endif
#if QUANTS > 2
              IF_GIVEN(2, , const u8 *scale2)
#endif
#if QUANTS > 3
              IF_GIVEN(3, , const u8 *scale3)
#endif
#if WRITES_SUM
              , u8 *sum
#endif
#if WRITES_Y
              , u8 *y
#endif
#if QUANTS > 0
              , u8 *q0 IF_MADE(0, , u8 *scale0)
#endif
#if QUANTS > 1
              , u8 *q1 IF_MADE(1, , u8 *scale1)
#endif
#if QUANTS > 2
              , u8 *q2 IF_MADE(2, , u8 *scale2)
#endif
#if QUANTS > 3
              , u8 *q3 IF_MADE(3, , u8 *scale3)
#endif
              , int rows) {
  Site site = {};
  site.x = x + X_OFFSET * SIZE<X_DTYPE>;
  site.rows = rows;
  u64 bits = 0;  // of the addresses of what is dense
#if ACT && GATE_PACKED
  site.other = x + OTHER_OFFSET * SIZE<X_DTYPE>;
#elif ACT
  site.other = up + OTHER_OFFSET * SIZE<OTHER_DTYPE>;
#elif RESIDUAL
  site.other = residual + OTHER_OFFSET * SIZE<X_DTYPE>;
#endif
#if WEIGHT_DTYPE
  site.weight = weight, bits |= address(weight);
#endif
#if BIAS_DTYPE
  site.bias = bias, bits |= address(bias);
#endif
#if WRITES_SUM
  site.sum = sum, bits |= address(sum);
#endif
#if WRITES_Y
  site.y = y, bits |= address(y);
#endif
#if QUANTS > 0
  site.q[0] = q0, site.scale[0] = (u8 *)scale0, bits |= address(q0);
#endif
#if QUANTS > 1
  site.q[1] = q1, site.scale[1] = (u8 *)scale1, bits |= address(q1);
#endif
#if QUANTS > 2
  site.q[2] = q2, site.scale[2] = (u8 *)scale2, bits |= address(q2);
#endif
#if QUANTS > 3
  site.q[3] = q3, site.scale[3] = (u8 *)scale3, bits |= address(q3);
#endif
  // Pointers are only sure to be aligned to their element: a view may start anywhere.
  constexpr bool wide_rows = many::WHOLE && ROW_UNIT % WIDE_BYTES == 0;
  const bool aligned = (bits % WIDE_BYTES | address(site.x) % X_BYTES | address(site.other) % OTHER_BYTES) == 0;
  const bool wide = wide_rows && (ANY_ALIGNMENT || aligned);
#if FEW_ROWS
  if (wide && rows <= FEW_ROWS) return few::rows_of_block<wide_rows>(site);
#endif
  if (wide) many::rows_of_block<wide_rows>(site);
  else many::rows_of_block<false>(site);  // of few rows too: their grid has a block for each row at least
}
