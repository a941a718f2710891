"""What looks like a site and is none that a kernel computes: every suspicion there is.

Recognisers take what they can prove.  Suspicions look at what is left for the one operation that gives a
spelling away and say what would have to change; so nothing that looks like a site is passed over in silence.
"""

from __future__ import annotations

from . import dequantized, named_ops, near_gates, near_norms, near_quantizations, near_routings
from .recogniser import Suspicion

SUSPICIONS: tuple[Suspicion, ...] = (
    *near_norms.SUSPICIONS,
    *near_gates.SUSPICIONS,
    *near_quantizations.SUSPICIONS,
    *near_routings.SUSPICIONS,
    *named_ops.SUSPICIONS,
    *dequantized.SUSPICIONS,
)
