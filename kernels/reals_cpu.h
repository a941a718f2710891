// What activation.h is written in, of the machine vectors of CPU kernels; and activation.h.

#define ACTIVATION INLINE
typedef Floats Reals;
INLINE Reals plus(Reals a, Reals b) { return a + b; }
INLINE Reals times(Reals a, Reals b) { return a * b; }
INLINE Reals fused(Reals a, Reals b, Reals c) { return fma(a, b, c); }
INLINE Reals over(Reals a, Reals b) { return a / b; }
INLINE Reals between(Reals a, float low, float high) {
  Reals r;
  for (int i = 0; i < LANES; ++i) r[i] = a[i] > high ? high : a[i] < low ? low : a[i];
  return r;
}
INLINE Reals magnitude(Reals a) { return floats_of(bits_of(a) & 0x7fffffffu); }
INLINE Reals with_sign(Reals a, Reals b) { return floats_of((bits_of(a) & 0x7fffffffu) | (bits_of(b) & 0x80000000u)); }
INLINE Reals where_above(Reals a, float bound, Reals yes, Reals no) {
  return floats_of(select((Signed)(a > bound), bits_of(yes), bits_of(no)));
}
INLINE Reals exponent_from(Reals a) { return floats_of(bits_of(a) << 23); }
#include "activation.h"
