"""Run a command with IREE's HIP driver on the stand-in.

python -m tools.gfx950.hip [--arch gfx950|gfx942] COMMAND [ARGUMENT...]

for example: python -m tools.gfx950.hip run-vmfb norms.vmfb --input 8x7168xbf16=rand:0
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lowering.errors import ToolchainError

from .library import ARCHITECTURES, environment


def main(argv: Sequence[str] | None = None) -> int:
    """Replaces this process by the command; returns 2 if it cannot."""
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.gfx950.hip", description=summary, epilog=usage.partition("for ")[2].strip()
    )
    parser.add_argument(
        "--arch", choices=ARCHITECTURES, default=ARCHITECTURES[0], help="the GPU to be (default: gfx950)"
    )
    parser.add_argument("command", help="run-vmfb, python, iree-run-module, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    # The commands of this very environment first, as if it were activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(options.command, path=path)
    if found is None:
        print(f"{parser.prog}: error: there is no command {options.command!r}", file=sys.stderr)
        return 2
    try:
        variables = environment(options.arch)
    except ToolchainError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execve(found, [found, *options.arguments], {**os.environ, **variables})


if __name__ == "__main__":
    sys.exit(main())
