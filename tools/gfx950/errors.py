"""Say what can go wrong, one class each; every message says what, where, and what to do about it."""

from __future__ import annotations


class Gfx950Error(Exception):
    """Base of everything this package raises on purpose."""


class CodeObjectError(Gfx950Error):
    """The bytes are no code object that can be run: truncated, for another machine, without the kernel."""


class LaunchError(Gfx950Error):
    """The launch does not fit the kernel: arguments, workgroup size, LDS."""


class ExecutionError(Gfx950Error):
    """A kernel did what it must not.  Subclasses say what; the message says where."""

    advice = ""


class OutOfBounds(ExecutionError):
    """An access beyond every allocation, the workgroup's LDS or the lane's scratch memory."""

    advice = "Compare the address with the sizes of the tensors and the guard that keeps lanes in range."


class Misaligned(ExecutionError):
    """An address the hardware would not accept: atomics and scalar loads need natural alignment."""

    advice = "Align the pointer, or use accesses that take any alignment."


class Undefined(ExecutionError):
    """A value nobody defined decides an address, a branch, the active lanes or what is stored."""

    advice = "Find the register or memory that was read before it was written."


class LdsRace(ExecutionError):
    """Two waves touch the same LDS byte without a barrier between, and one of them writes it."""

    advice = "Put a barrier between the accesses."


class MissingWait(ExecutionError):
    """A register is used before the load that writes it was waited for."""

    advice = "An s_waitcnt is missing: hand-written assembly, or a compiler bug."


class BudgetExceeded(ExecutionError):
    """More instructions than allowed: most likely an endless loop."""

    advice = "Look for a loop that does not end, or pass a larger budget."


class UnknownInstruction(ExecutionError):
    """An encoding the decoder or the executor does not know."""

    advice = "Add it to the table of its encoding in tools/gfx950/native."


class IllegalInstruction(ExecutionError):
    """An instruction that means nothing here: operands, registers or modifiers that do not exist."""

    advice = "The code object may be for another part, or damaged."


class ReadOnlyMemory(ExecutionError):
    """A store to memory that may only be read."""

    advice = "Kernel arguments and constants cannot be written."
