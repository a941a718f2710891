"""The options of ``compile-to-vmfb`` and what it says of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..targets import TARGETS
from .command import DEBUG

PROG = "compile-to-vmfb"

_DESCRIPTION = """\
Compile a PyTorch model to one IREE program (.vmfb) in which every RMSNorm with its residual add and its
quantizations is a single kernel."""

_EPILOG = f"""\
sources:
  file.py:callable          call a function of a file; it returns (module, args),
                            (module, args, dynamic_shapes) or (module, args, kwargs, dynamic_shapes),
                            args being a tuple of example tensors, kwargs a dict of them;
                            or a dict of these: functions of one program, which share weights and state
  package.module:callable   the same, of an importable module
  model.pt2                 what torch.export.save wrote
  hf:FOLDER                 a checkpoint of a causal language model on this machine: config.json and
                            safetensors, quantized or not; ids [batch, tokens] in, logits out
  model.mlir, -             MLIR text in the torch dialect, from a file or standard input

examples:
  {PROG} model.py:build -o model.vmfb
  {PROG} model.py:build -o model.vmfb --target h200 --report fusion.html
  {PROG} model.py:build -o model.vmfb --explain --require-fused --verify
  {PROG} model.pt2 -o model.vmfb --parameters weights.irpa --target mi355x
  {PROG} hf:Qwen3-8B-FP8 -o qwen.vmfb --decoder 4096 --batch 8 --target h200

exit codes:
  0  done
  1  the model cannot be compiled
  2  the request is wrong: an option, the source, a path that cannot be written
  3  --require-fused, and a site did not fuse
  4  --verify, and compiled and eager differ
  130, 143  interrupted (Ctrl-C), terminated
The report and the dumps are written in cases 3 and 4 too, since they say what is wrong; the .vmfb and
the .irpa are not. Set {DEBUG}=1 for the traceback of an error."""


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        PROG,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=26, width=100
        ),
        allow_abbrev=False,
    )
    made.add_argument("source", metavar="SOURCE", help="the model; see below for its forms")
    made.add_argument(
        "-o", "--output", metavar="OUT.vmfb", type=Path, required=True, help="the program to write"
    )
    made.add_argument("--target", metavar="NAME", default="cpu", help=_target_help())
    made.add_argument(
        "--trust-source",
        action="store_true",
        help="run the code a .pt2 holds: pickled objects and the like; without it such a file is refused",
    )
    made.add_argument(
        "--parameters", metavar="F.irpa", type=Path, help="keep the weights in F.irpa instead of in the .vmfb"
    )
    made.add_argument(
        "--fp8",
        choices=("as-is", "native"),
        default="as-is",
        help="keep the graph's flavour of fp8 (default), or use the target's where only products see it",
    )
    made.add_argument(
        "--only-output",
        metavar="NAME",
        action="append",
        default=[],
        help="keep this part of the model's result alone, as logits or cache.0; may be given several times",
    )
    made.add_argument(
        "--patterns",
        metavar="F.py",
        type=Path,
        action="append",
        default=[],
        help="recognisers of your own, tried before the built-in ones; may be given several times",
    )
    _add_decoder(made.add_argument_group("decoding with a cache, of hf:FOLDER"))
    _add_reporting(made.add_argument_group("what fused"))
    _add_checking(made.add_argument_group("checking and debugging"))
    _add_keeping(made.add_argument_group("kernels that were compiled before"))
    return made


def _add_decoder(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--decoder",
        metavar="CAPACITY",
        type=int,
        help="make functions prefill and decode, with a cache of CAPACITY tokens, in place of one without",
    )
    group.add_argument(
        "--batch", metavar="N", type=int, help="the most sequences at a time (default: 1), with --decoder"
    )
    group.add_argument(
        "--prompt",
        metavar="N",
        type=int,
        help="the most tokens of one prefill (default: CAPACITY), with --decoder",
    )


def _add_reporting(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--report", metavar="F", type=Path, help="write the fusion report; F ends in .json or .html"
    )
    group.add_argument("--explain", action="store_true", help="print the fusion report as a table")
    group.add_argument(
        "--timing",
        action="store_true",
        help="print the time of each step, and of each pattern with its hits and misses",
    )
    group.add_argument("--require-fused", action="store_true", help="fail (exit 3) unless every site fused")


def _add_checking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--verify", action="store_true", help="run compiled and eager on args; fail (exit 4) if they differ"
    )
    group.add_argument(
        "--dump-kernels", metavar="D", type=Path, help="write each kernel's object file and kernels.json to D"
    )
    group.add_argument(
        "--dump-phases-to", metavar="D", type=Path, help="write the program's IR after each phase to D"
    )
    group.add_argument(
        "--keep-source-paths",
        action="store_true",
        help="leave the model's paths and lines in the program, for debuggers and profilers",
    )


def _add_keeping(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cache-dir",
        metavar="D",
        type=Path,
        help="keep compiled kernels in D (default: $VMFUSE_CACHE_DIR, or the user's cache directory)",
    )
    group.add_argument(
        "--no-cache", action="store_true", help="compile every kernel anew and keep none ($VMFUSE_NO_CACHE)"
    )


def _target_help() -> str:
    names = ", ".join(" ".join((*t.aliases[:2], t.name)) for t in TARGETS if t.is_gpu)
    return f"cpu for this very machine (default), or one of: {names}"
