"""The command ``compile-to-vmfb``: a model in, one ``.vmfb`` and its report out.

Only what a person sees is here: messages, exit codes, and that no output is ever half-written.  Heavy
packages are imported when they are needed, so ``--help`` and most mistakes answer at once.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import object_cache
from ..errors import UnfusedError, UsageError
from ..targets import Target
from ..targets import resolve as resolve_target
from .command import guarded, write
from .compile_options import PROG, parser
from .outputs import Output, Outputs, check_apart, check_dump, make_directory, writing
from .progress import Progress
from .source import MlirText, Model, Models, check_decoder, check_form, resolve, source_file

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..compiler import Compiled
    from ..containers import Names
    from ..report.report import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the return value is its exit code."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help or its error
        return int(stop.code or 0)
    return guarded(PROG, lambda: _run(options))


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


if __name__ == "__main__":
    sys.exit(main())
