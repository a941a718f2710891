// Matrix instructions.
#include "operands.h"
const Operation matrix_operations[] = {{0}};
