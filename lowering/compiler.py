"""Step 7, compile: runs the steps in order and hands the result to IREE.

``compile`` takes a torch module, ``compile_mlir`` torch-dialect text; both return a ``Compiled``.
"""

from __future__ import annotations

import os
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from iree.compiler import ir

from patterns.sites import Ledger, SiteRecord

from . import extensions
from .backends import devices
from .containers import Names
from .errors import CompileError, UsageError
from .importing.importer import Program, import_module, parse_module
from .isolation.culprit import find_culprit
from .isolation.iree_steps import COMPILE, Iree, TimedOut, Unplaced
from .isolation.iree_steps import Step as IreeStep
from .passes import verify
from .passes.dispatch import Dispatched, choose_kernels
from .passes.raise_ops import recognisers
from .program import floats
from .program.in_place import update_in_place
from .program.ownership import keep_arguments, part_updates
from .program.places import part_searches
from .program.scalar_ops import correct
from .program.slices import mend_slices
from .program.storage import add_entry, remove_entry
from .program.streams import not_in_place
from .program.sums import widen_sums
from .program.updates import choose_elements
from .report.report import Report
from .report.sites import Change, Site
from .signature import ASYNC, INTO, SIGNATURE_KEY, Signature, known_sizes
from .steps import BY_NAME, FUSING, State, Step, run
from .targets import Target, resolve
from .weights import parameters as weights

Progress = Callable[[str, str], None]
Fp8 = Literal["as-is", "native"]


@dataclass
class Compiled:
    """A compiled program.  ``vmfb`` holds its bytes; ``report`` says what became of each site."""

    target: Target
    report: Report
    vmfb: bytes
    dispatched: Dispatched
    signature: Signature

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vmfb to ``path``, all of it or nothing."""
        weights.write_atomically(Path(path), lambda temporary: temporary.write_bytes(self.vmfb))

    def dump_kernels(self, directory: str | os.PathLike[str]) -> None:
        """Write every kernel object and ``kernels.json`` (launches in execution order) to ``directory``."""
        from .program.dump import dump_kernels

        dump_kernels(self.dispatched, Path(directory))


def compile(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    target: str = "cpu",
    parameters: str | os.PathLike[str] | None = None,
    patterns: Sequence[str | os.PathLike[str]] = (),
    fp8: Fp8 = "as-is",
    output: Names | None = None,
    dump_phases_to: str | os.PathLike[str] | None = None,
    source_paths: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a torch module for ``target``.

    args, kwargs, dynamic_shapes: as for torch.export.export (ignored for an ExportedProgram).
    parameters: write the weights to this ``.irpa`` instead of embedding them in the vmfb.
    patterns: Python files with recognisers of your own (see ``lowering.extensions``).
    fp8: ``native`` retargets quantizations to the e4m3 flavour the target's instructions have, where only
    products with their scales see them; ``as-is`` keeps what the graph says.
    output: what is kept of the model's result, by name: ``"logits"``, ``"cache.0"``; several names give a
    dictionary of them.  What only the rest of the result needs is not computed.
    dump_phases_to: a directory that gets the IR after each step.
    source_paths: keep the paths and lines of the model in the program, for a debugger or a profiler;
    without them the same model gives the same bytes wherever it lies.
    progress: called with (phase, detail) as each step starts.

    Raises UsageError for an unknown target or output, CompileError when the model cannot be compiled and
    ToolchainError when the target's kernel compiler is not installed.
    """
    pipeline = _Pipeline(resolve(target), patterns, fp8, dump_phases_to, progress, source_paths)
    pipeline.start("import", type(module).__name__)
    program = import_module(
        module, args, pipeline.context, kwargs=kwargs, dynamic_shapes=dynamic_shapes, output=output
    )
    return pipeline.run(program, parameters)


def explain(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    target: str = "cpu",
    patterns: Sequence[str | os.PathLike[str]] = (),
    fp8: Fp8 = "as-is",
    output: Names | None = None,
) -> Report:
    """The report ``compile`` would give, without compiling anything; arguments as there."""
    pipeline = _Pipeline(resolve(target), patterns, fp8)
    program = import_module(
        module, args, pipeline.context, kwargs=kwargs, dynamic_shapes=dynamic_shapes, output=output
    )
    return pipeline.explain(program)


def compile_mlir(
    source: str | bytes,
    *,
    target: str = "cpu",
    parameters: str | os.PathLike[str] | None = None,
    patterns: Sequence[str | os.PathLike[str]] = (),
    fp8: Fp8 = "as-is",
    dump_phases_to: str | os.PathLike[str] | None = None,
    source_paths: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Compile torch-dialect MLIR text for ``target``; the other arguments are those of ``compile``."""
    pipeline = _Pipeline(resolve(target), patterns, fp8, dump_phases_to, progress, source_paths)
    pipeline.start("import", "MLIR")
    return pipeline.run(parse_module(source, pipeline.context), parameters)


class _Pipeline:
    """The steps in order, over one MLIR context."""

    def __init__(
        self,
        target: Target,
        patterns: Sequence[str | os.PathLike[str]],
        fp8: Fp8,
        dump_phases_to: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        source_paths: bool = False,
    ):
        if fp8 not in typing.get_args(Fp8):
            raise UsageError(f"fp8 is {' or '.join(typing.get_args(Fp8))}, not {fp8!r}")
        self.target, self.fp8, self.source_paths = target, fp8, source_paths
        self.recognisers = (*extensions.recognisers(patterns), *recognisers())
        self.dump_to = Path(dump_phases_to) if dump_phases_to is not None else None
        self.progress = progress or (lambda phase, detail: None)
        self.context = ir.Context()
        # What would use threads runs elsewhere; in a child that a user forks they would be missing.
        self.context.enable_multithreading(False)
        self.iree = Iree(self.dump_to)
        self.phase = 0

    def start(self, phase: str, detail: str = "") -> None:
        self.progress(phase, detail)

    def dump(self, phase: str, module: ir.Module) -> None:
        if self.dump_to is not None:
            self.dump_to.mkdir(parents=True, exist_ok=True)
            text = module.operation.get_asm(enable_debug_info=False, large_elements_limit=16)
            (self.dump_to / f"{self.phase}-{phase}.mlir").write_text(text)
        self.phase += 1

    def run(self, program: Program, parameters: str | os.PathLike[str] | None) -> Compiled:
        archive_path = Path(parameters) if parameters is not None else None
        with self.context, ir.Location.unknown(), tempfile.TemporaryDirectory() as directory:
            state = self._steps(program, Path(directory), (*FUSING, BY_NAME["dispatch"], BY_NAME["expand"]))
            ledger, dispatched = state.ledger, state.dispatched
            with weights.archived(program.parameters, archive_path, self.progress) as archive:
                try:
                    signature, vmfb = self._compile(program, archive, ledger)
                except Unplaced as error:
                    culprit = find_culprit(program, lambda part, step=error.step: self._fails(part, step))
                    raise error if culprit is None else error.placed(culprit) from None
        report = _report(self.target, ledger, len(dispatched.launches), program)
        return Compiled(self.target, report, vmfb, dispatched, signature)

    def explain(self, program: Program) -> Report:
        with self.context, ir.Location.unknown(), tempfile.TemporaryDirectory() as directory:
            ledger = self._steps(program, Path(directory), FUSING).ledger
            kernels = choose_kernels(program.main(), self.target, ledger)
            return _report(self.target, ledger, len(kernels), program)

    def _steps(self, program: Program, directory: Path, steps: Sequence[Step]) -> State:
        """Run ``steps`` on ``program``, in place."""
        self.dump("import", program.module)
        state = State(
            program.module,
            program.main(),
            self.target,
            Ledger(),
            directory,
            program,
            self.recognisers,
            native_floats=self.fp8 == "native",
            progress=self.start,
        )
        run(steps, state, lambda name: self.dump(name, program.module), verified=verify.is_wanted())
        return state

    def _compile(self, program: Program, archive: weights.Archive, ledger: Ledger) -> tuple[Signature, bytes]:
        self.start("compile", self.target.name)
        name = ir.StringAttr(program.main().attributes["sym_name"]).value
        signature = program.signature(self.target, archive.identity)
        devices.declare_device(program.module, self.target)
        flags = (*devices.flags(self.target, source_paths=self.source_paths), *archive.flags())
        lowered = self._lower(self.iree, program.module)
        apart: set[int] = set()
        while True:
            module = lowered.operation.clone() if signature.written else lowered
            written = update_in_place(module, name, signature.written, apart)
            placed = add_entry(module, name, known_sizes(replace(signature, written=written)))
            made = replace(signature, written=written, placed=placed)
            part_updates(module)
            part_searches(module)
            keep_arguments(module)
            _sign(module, name, made)
            self.dump("linalg", module)
            made, vmfb, wrong = self._finish(module, name, made, flags, ledger)
            if not wrong:
                return made, vmfb
            apart |= wrong

    def _finish(
        self, module: ir.Module, name: str, signature: Signature, flags: Sequence[str], ledger: Ledger
    ) -> tuple[Signature, bytes, set[int]]:
        """Compile the program; the arguments that it was to write to where they are, and does not."""
        try:
            return signature, *self._compiled(module, name, signature, flags)
        except CompileError as error:
            if not signature.placed or isinstance(error, TimedOut):
                raise
            summary, *said = str(error).splitlines()
            said = [] if isinstance(error, Unplaced) else said
        # That a caller has memory for results must not cost the program.
        remove_entry(module, name)
        signature = replace(signature, placed=())
        _sign(module, name, signature)
        vmfb, wrong = self._compiled(module, name, signature, flags)
        where, _, why = said[0].strip().partition(": ") if said else ("unknown", "", summary)
        ledger.remark(name, where, f"allocates its results in each call; into a caller's memory: {why}")
        return signature, vmfb, wrong

    def _compiled(
        self, module: ir.Module, name: str, signature: Signature, flags: Sequence[str]
    ) -> tuple[bytes, set[int]]:
        in_place = [item.argument for item in signature.written if item.result is None]
        if not in_place:
            return self.iree.compile(module, flags), set()
        vmfb, streams = self.iree.compile_and_look(module, flags)
        # On the cpu the caller's memory is torch's, which IREE's driver fills and copies nothing into.
        count = len(signature.inputs or ())
        lent = () if self.target.is_gpu else [number for number in in_place if number < count]
        entries = (name + ASYNC, name + INTO + ASYNC)
        return vmfb, set().union(*(not_in_place(streams, entry, in_place, lent) for entry in entries))

    def _lower(self, iree: Iree, module: ir.Module) -> ir.Module:
        module = iree.lower(module)
        choose_elements(module)
        mend_slices(module)
        correct(module, self.target)
        widen_sums(module, self.target)
        floats.rewrite_unsupported(module, self.target)
        return module

    def _fails(self, module: ir.Module, step: IreeStep) -> bool:
        """Tell whether a part of a program fails, in ``step`` or before it."""
        iree = Iree()
        try:
            module = self._lower(iree, module)
            if step is COMPILE:
                iree.compile(module, devices.flags(self.target))
        except CompileError:
            return True
        return False


def _sign(module: ir.Module, name: str, signature: Signature) -> None:
    """Record how the program is called on the function itself, for the runtime to read."""
    entry = ir.DictAttr.get({SIGNATURE_KEY: ir.StringAttr.get(signature.to_json())})
    ir.SymbolTable(module.operation)[name].operation.attributes["iree.reflection"] = entry


def _report(target: Target, ledger: Ledger, dispatches: int, program: Program) -> Report:
    sites = tuple(map(_site, ledger.records))
    remarks = (*program.remarks, *ledger.remarks)
    return Report(target.name, sites, dispatches, ledger.timing, program.folded, remarks)


def _site(record: SiteRecord) -> Site:
    after = record.after or record.before
    return Site(
        record.op,
        record.location,
        "fused" if record.fused else "unfused",
        record.pattern,
        record.kernel,
        record.reason,
        record.contract,
        _change(record.before.bytes, after.bytes),
        Change(record.before.dispatches, after.dispatches),
        record.note,
    )


def _change(before: int | None, after: int | None) -> Change | None:
    return None if before is None or after is None else Change(before, after)
