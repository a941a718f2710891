# `lit tests/ir` runs these files one process each, as LLVM projects do; tests/passes/test_ir.py runs the same
# RUN lines inside pytest's own process, which saves importing torch for every file.
# ruff: noqa: F821  (lit defines `config`)
import sys
import tempfile
from pathlib import Path

import lit.formats

here = Path(__file__).resolve().parent

config.name = "vmfuse"
config.test_format = lit.formats.ShTest()
config.suffixes = [".mlir"]
config.test_source_root = str(here)
config.test_exec_root = str(Path(tempfile.gettempdir()) / "vmfuse-lit")
config.substitutions += [
    ("%opt", f"{sys.executable} -m tools.opt"),
    ("%filecheck", f"{sys.executable} -m filecheck"),
]
