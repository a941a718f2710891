"""Python numbers as compiled programs see them."""

from __future__ import annotations

import math


def float32(value: float) -> float:
    """``value`` rounded to float32: compilers that demote a Python scalar do not all round it.

    In plain arithmetic, which torch.compile can follow.  Exact for every float32 that is normal or zero.
    """
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 2**24), exponent - 24)
