"""A stand-in for AMD's HIP library: IREE's HIP driver runs on it without a GPU.

``library()`` is a shared object with the functions that driver resolves.  Memory, copies, streams and
events are the host's (the ``.c`` files here); kernels are executed instruction by instruction in a
process of their own (``worker``).  Nothing finds it by itself: a program uses it when IREE's
``--hip_dylib_path`` or ``IREE_HIP_DYLIB_PATH`` names it, which ``python -m tools.gfx950.hip`` does.

Environment: ``VMFUSE_EMULATED_ARCH``, the machine to be: gfx950 (default) or gfx942.
"""

from .library import environment, library

__all__ = ["environment", "library"]
