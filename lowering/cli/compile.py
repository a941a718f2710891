"""The command ``compile-to-vmfb``: a model in, one ``.vmfb`` and its report out.

Only what a person sees is here: options, progress, messages, exit codes, and that no output is ever
half-written.  Heavy packages are imported when they are needed, so ``--help`` and most mistakes
answer at once.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import object_cache
from ..errors import UnfusedError, UsageError
from ..targets import TARGETS, Target
from ..targets import resolve as resolve_target
from .command import DEBUG, guarded, tell, write
from .outputs import Output, Outputs, check_apart, check_dump, make_directory, writing
from .source import MlirText, Model, Models, check_decoder, check_form, resolve, source_file

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.status import Status

    from ..compiler import Compiled
    from ..containers import Names
    from ..report.report import Report

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the return value is its exit code."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help or its error
        return int(stop.code or 0)
    return guarded(PROG, lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROG,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=26, width=100
        ),
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="the model; see below for its forms")
    parser.add_argument(
        "-o", "--output", metavar="OUT.vmfb", type=Path, required=True, help="the program to write"
    )
    parser.add_argument("--target", metavar="NAME", default="cpu", help=_target_help())
    parser.add_argument(
        "--trust-source",
        action="store_true",
        help="run the code a .pt2 holds: pickled objects and the like; without it such a file is refused",
    )
    parser.add_argument(
        "--parameters", metavar="F.irpa", type=Path, help="keep the weights in F.irpa instead of in the .vmfb"
    )
    parser.add_argument(
        "--fp8",
        choices=("as-is", "native"),
        default="as-is",
        help="keep the graph's flavour of fp8 (default), or use the target's where only products see it",
    )
    parser.add_argument(
        "--only-output",
        metavar="NAME",
        action="append",
        default=[],
        help="keep this part of the model's result alone, as logits or cache.0; may be given several times",
    )
    parser.add_argument(
        "--patterns",
        metavar="F.py",
        type=Path,
        action="append",
        default=[],
        help="recognisers of your own, tried before the built-in ones; may be given several times",
    )
    _add_decoder(parser.add_argument_group("decoding with a cache, of hf:FOLDER"))
    _add_reporting(parser.add_argument_group("what fused"))
    _add_checking(parser.add_argument_group("checking and debugging"))
    _add_keeping(parser.add_argument_group("kernels that were compiled before"))
    return parser


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


# The run ----------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> None:
    """Every mistake that can be seen without importing torch is seen before torch is imported."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch.export's own
    target = resolve_target(options.target)
    check_form(options.source)
    _check_options(options)
    with Outputs() as outputs, Progress() as progress:
        vmfb = outputs.file(options.output)
        irpa = outputs.file(options.parameters) if options.parameters else None
        report = outputs.file(options.report) if options.report else None
        for directory in filter(None, (options.dump_kernels, options.dump_phases_to)):
            make_directory(directory)
        progress("load", options.source)
        model = _load(options, target)
        _check_files(options)  # again: only now is it known which file a module comes from
        compiled = _compile(model, options, irpa, progress)
        if report is not None:
            with writing(report.path):
                report.temporary.write_text(_rendered(compiled.report, report.path), encoding="utf-8")
            report.commit()
        if options.dump_kernels:
            with writing(options.dump_kernels):
                compiled.dump_kernels(options.dump_kernels)
        progress.finish()
        if options.explain:
            _print(compiled.report.table())
        if options.timing:
            _print(compiled.report.timing_table())
        if options.require_fused:
            _require_fused(compiled.report)
        progress("save", vmfb.path.name)
        compiled.save(vmfb.temporary)
        if options.verify:
            progress("verify", "compiled beside eager")
            assert not isinstance(model, MlirText)  # _load refused that
            progress.note = _verify(model, compiled, vmfb, irpa, _output(options))
        vmfb.commit()
        if irpa is not None:
            irpa.commit()
        progress.finish()
        progress.say(_result(compiled.report, options.output))


def _check_options(options: argparse.Namespace) -> None:
    if options.report and options.report.suffix not in (".json", ".html"):
        raise UsageError(f"--report {options.report}: the file name must end in .json or .html")
    if options.cache_dir:
        make_directory(options.cache_dir)
    if options.decoder is not None:
        check_decoder(options.source)
    elif options.batch is not None or options.prompt is not None:
        raise UsageError("--batch and --prompt are sizes of a decoder: give --decoder CAPACITY as well")
    if options.verify and (options.source == "-" or options.source.endswith(".mlir")):
        raise UsageError("--verify compares with the PyTorch model, and an MLIR source has none")
    _check_files(options)


def _check_files(options: argparse.Namespace) -> None:
    """No output may be a file that is read, or another output."""
    outputs = {"-o": options.output, "--parameters": options.parameters, "--report": options.report}
    outputs = {label: path for label, path in outputs.items() if path is not None}
    inputs = {f"patterns {path}": path for path in options.patterns}
    if (file := source_file(options.source)) is not None:
        inputs["source"] = file
    check_apart(outputs, inputs)
    files = {**outputs, "the source": inputs["source"]} if "source" in inputs else outputs
    if options.dump_phases_to:
        check_dump(options.dump_phases_to, r"\d+-\w+\.mlir", files)
    if options.dump_kernels:
        check_dump(options.dump_kernels, r"kernels\.json|.*\.(o|cubin|hsaco)", files)


def _load(options: argparse.Namespace, target: Target) -> Model | Models | MlirText:
    if options.verify:
        from .verify import require_device

        require_device(target)
    model = resolve(options.source, trusted=options.trust_source, decoder=_decoder_sizes(options))
    if options.only_output and isinstance(model, MlirText):
        raise UsageError("--only-output names parts of a PyTorch model's result; an MLIR source has no names")
    if options.verify and not isinstance(model, MlirText):
        without = [name for name, each in _functions(model).items() if not (each.args or each.kwargs)]
        if without:
            of = f", for {', '.join(without)}" if isinstance(model, Models) else ""
            raise UsageError(f"--verify needs arguments to run on, and {options.source} comes with none{of}")
    return model


def _decoder_sizes(options: argparse.Namespace) -> dict[str, int] | None:
    """What ``export_decoder`` is given, if a decoder is wanted."""
    if options.decoder is None:
        return None
    sizes = {"capacity": options.decoder, "batch": options.batch, "prompt": options.prompt}
    return {name: size for name, size in sizes.items() if size is not None}


def _functions(model: Model | Models) -> dict[str, Model]:
    return model.functions if isinstance(model, Models) else {"main": model}


def _compile(
    model: Model | Models | MlirText, options: argparse.Namespace, irpa: Output | None, progress: Progress
) -> Compiled:
    from .. import compiler

    settings: dict[str, Any] = {
        "target": options.target,
        "parameters": irpa.temporary if irpa else None,
        "patterns": options.patterns,
        "fp8": options.fp8,
        "dump_phases_to": options.dump_phases_to,
        "source_paths": options.keep_source_paths,
        "progress": progress,
    }
    with object_cache.placed(options.cache_dir, enabled=not options.no_cache):
        if isinstance(model, MlirText):
            return compiler.compile_mlir(model.text, **settings)
        output = _output(options)
        if isinstance(model, Models):
            functions = {
                name: (each.module, each.args, each.kwargs, each.dynamic_shapes)
                for name, each in model.functions.items()
            }
            return compiler.compile(functions, output=output, **settings)
        shapes = model.dynamic_shapes
        return compiler.compile(
            model.module, model.args, kwargs=model.kwargs, dynamic_shapes=shapes, output=output, **settings
        )


def _output(options: argparse.Namespace) -> Names | None:
    """What is kept of the result: one part, several by name, or None, all of it."""
    names: list[str] = options.only_output
    return names[0] if len(names) == 1 else names or None


def _rendered(report: Report, path: Path) -> str:
    return report.to_html() if path.suffix == ".html" else report.to_json()


def _print(table: RenderableType) -> None:
    from rich.console import Console

    # A pipe has no width of its own; 100 columns are what the table is laid out for.
    width = None if sys.stdout.isatty() else 100
    text = io.StringIO()
    Console(file=text, width=width, highlight=False, force_terminal=sys.stdout.isatty()).print(table)
    write(text.getvalue().rstrip("\n"))


def _require_fused(report: Report) -> None:
    if not report.unfused:
        return
    lines = [f"  {s.op} at {s.location}: {s.reason}" for s in dict.fromkeys(report.unfused)]
    more = f"\n  and {len(lines) - 10} more (--report lists them all)" if len(lines) > 10 else ""
    raise UnfusedError(
        f"--require-fused: {len(report.unfused)} of {len(report.sites)} sites did not fuse\n"
        + "\n".join(lines[:10])
        + more
    )


def _verify(
    model: Model | Models, compiled: Compiled, vmfb: Output, irpa: Output | None, output: Names | None
) -> str:
    import torch
    from torch.utils import _pytree as pytree

    from ..importing.sizes import exported_shapes
    from ..runtime import program as runtime
    from .verify import require_device, verify

    device = require_device(compiled.target)
    program = runtime.load(vmfb.temporary, parameters=irpa.temporary if irpa else None)
    functions = _functions(model)
    eager = {name: each.eager().to(device) for name, each in functions.items()}
    said = []
    for name, each in functions.items():
        args, kwargs = pytree.tree_map(
            lambda a: a.to(device) if isinstance(a, torch.Tensor) else a, (each.args, each.kwargs)
        )
        shapes = each.dynamic_shapes
        if isinstance(each.module, torch.export.ExportedProgram):
            shapes = exported_shapes(each.module)
        found = verify(
            program,
            eager[name],
            args,
            kwargs,
            dynamic_shapes=shapes,
            output=output,
            function=name if len(functions) > 1 else None,
            beside=tuple(eager.values()),
        )
        said.append(f"{name}: {found}" if len(functions) > 1 else str(found))
    return "; ".join(said)


def _result(report: Report, path: Path) -> str:
    fused = (
        f"{len(report.fused)} of {len(report.sites)} sites fused into {report.dispatches} custom dispatches"
    )
    return f"{path} ({_size(path)}), {fused if report.sites else 'nothing in it fuses'}"


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


# Progress ---------------------------------------------------------------------------------------


@dataclass
class Progress:
    """One line per phase on standard error, with its time; the phase under way is animated on a terminal.

    Called with a phase's name when it begins, and again with the same name when only its detail changes.
    """

    note: str = ""
    _phase: str | None = None
    _detail: str = ""
    _since: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _console: Console | None = None
    _status: Status | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        self._stop()

    def __call__(self, phase: str, detail: str = "") -> None:
        if phase != self._phase:
            self.finish()
            self._phase, self._since = phase, time.monotonic()
        self._detail = detail
        if self._console is not None:
            self._animate()

    def finish(self) -> None:
        """Print the line of the phase under way, if there is one."""
        self._stop()
        if self._phase is None:
            return
        took = time.monotonic() - self._since
        self._line(f"  {self._phase:<10}{took:7.2f} s", self.note or self._detail)
        self._phase, self.note = None, ""

    def say(self, text: str) -> None:
        """Print the last line, with the time of the whole run."""
        self._line(f"  {'done':<10}{time.monotonic() - self._started:7.2f} s", text)

    def _line(self, head: str, tail: str) -> None:
        if self._console is None:
            tell(f"{head}  {tail}".rstrip())
            return
        from rich.text import Text

        self._console.print(
            Text.assemble(("✓ ", "green"), head.strip(), (f"  {tail}", "dim")), overflow="fold"
        )

    def _animate(self) -> None:
        from rich.text import Text

        text = Text.assemble(f"{self._phase:<10}", (self._detail, "dim"))
        if self._status is None:
            assert self._console is not None
            self._status = self._console.status(text)
            self._status.start()
        self._status.update(text)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


if __name__ == "__main__":
    sys.exit(main())
