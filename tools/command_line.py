"""Say what the command lines of benchmarks have in common: how they are read, and the file they leave."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class PackAndRun:
    """The commands ``pack DIR``, where the compilers are, and ``run DIR``, where the device is.

    ``pack`` takes --target, ``run`` takes --rows, with ``rows`` as its default, and --json.
    """

    def __init__(self, description: str | None, rows: Sequence[int]) -> None:
        self.parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._commands = self.parser.add_subparsers(dest="command", required=True)
        self.pack = self.add("pack", "compile what is measured into DIR")
        add_target(self.pack)
        self.run = self.add("run", "check and time what is in DIR")
        listed = ",".join(map(str, rows))
        self.run.add_argument(
            "--rows", type=numbers, default=rows, metavar="N,N,...", help=f"default: {listed}"
        )
        self.run.add_argument("--json", type=Path, metavar="FILE", help="where the table is written")

    def add(self, name: str, what: str) -> argparse.ArgumentParser:
        """Another command on DIR."""
        command = self._commands.add_parser(name, help=what)
        command.add_argument("directory", type=Path, metavar="DIR")
        return command


def add_target(parser: argparse.ArgumentParser) -> None:
    """The option --target."""
    parser.add_argument("--target", default="h200", help="what to compile for (default: %(default)s)")


def numbers(text: str) -> tuple[int, ...]:
    """An option such as ``1,16,128``."""
    return tuple(int(part) for part in text.split(","))


def machine_name(device: torch.device) -> str:
    """The processor's name, or the GPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def write_json(path: Path | None, document: Any) -> None:
    """Keep what was found, where a file is wanted."""
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
