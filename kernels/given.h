// What is written for quantization i alone where its scale is given (QUOTIENTi is 3, GIVEN), or where it is made.

#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)
#define IF_GIVEN(i, ...) JOINED(GIVEN_, QUOTIENT##i)(__VA_ARGS__)
#define IF_MADE(i, ...) JOINED(MADE_, QUOTIENT##i)(__VA_ARGS__)

#define GIVEN_0(...)
#define GIVEN_1(...)
#define GIVEN_2(...)
#define GIVEN_3(...) __VA_ARGS__
#define MADE_0(...) __VA_ARGS__
#define MADE_1(...) __VA_ARGS__
#define MADE_2(...) __VA_ARGS__
#define MADE_3(...)

// The lower bound of values: that of a given scale, else minus the upper one.
#define LEAST_OF(i) (IF_GIVEN(i, LEAST##i) IF_MADE(i, -LIMIT##i))
