"""What looks like a norm or a quantization and is none that a kernel computes, and why not."""

from __future__ import annotations

from .recogniser import Suspicion

SUSPICIONS: tuple[Suspicion, ...] = ()
