"""How a kernel becomes machine code for a target, and how IREE is told of it."""
