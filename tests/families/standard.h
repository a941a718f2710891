// Every standard header that an emulation needs.  They are most of what the host's compiler reads, and hundreds of
// kernels are built, so it is precompiled; for that an emulation has to include it before anything else.
#ifndef STANDARD_H
#define STANDARD_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <setjmp.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#endif
