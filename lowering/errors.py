"""Tell people, by errors, what was wrong, where, and what to do."""

from __future__ import annotations


class LoweringError(Exception):
    """Base of every error this package raises on purpose; ``exit_code`` is the command line's."""

    exit_code = 1


class CompileError(LoweringError):
    """The model cannot be compiled."""


class UsageError(LoweringError):
    """The request itself is wrong: an unknown target, a source that does not exist, a bad option."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint is incomplete, contradicts itself or has a format that is not read; names the tensor."""


class ToolchainError(CompileError):
    """A compiler needed for the target is missing or failed; the message names the extra to install."""


class UnfusedError(LoweringError):
    """``--require-fused`` and at least one site did not fuse."""

    exit_code = 3


class VerificationError(LoweringError):
    """The compiled program and the eager model differ."""

    exit_code = 4


class RunError(LoweringError):
    """A compiled program cannot be loaded or was called with the wrong tensors."""


class ArgumentError(RunError):
    """A program was called with other tensors, dtypes or sizes than it takes; nothing has run."""
