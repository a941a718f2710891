// What says how a row is normed, where it is not the usual: lowering/families/row.py defines it only then.

#ifndef CENTRED
#define CENTRED 0           // 1: the mean is subtracted first
#endif
#ifndef STATISTIC_GROUP
#define STATISTIC_GROUP 0   // elements that share a statistic; 0: the row
#endif
#define STATISTIC_LENGTH (STATISTIC_GROUP ? STATISTIC_GROUP : HIDDEN)
#ifndef BIAS_DTYPE
#define BIAS_DTYPE 0
#endif
#ifndef BIAS_FUSED
#define BIAS_FUSED 0        // 1: rounded together with the product before it
#endif
#ifndef NORMED_DTYPE
#define NORMED_DTYPE PRODUCT_DTYPE  // of the product plus the bias, under TWICE
#endif
#ifndef Y_DTYPE
#define Y_DTYPE X_DTYPE     // of what is written besides the sum
#endif
#ifndef OTHER_DTYPE
#define OTHER_DTYPE X_DTYPE // of the residual, up or gate
#endif
#ifndef GATE_FIRST
#define GATE_FIRST 0        // 1: the gate's product is what is normed
#endif
// Where a row is normalised and gated, how the gate's product is rounded.
#ifndef GATE_ROUNDING
#define GATE_ROUNDING ROUNDING
#endif
