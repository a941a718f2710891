"""Step 7, compile: runs the steps in order and hands the result to IREE.

``compile`` takes a torch module, or several as functions of one program, ``compile_mlir`` torch-dialect text;
both return a ``Compiled``.
"""

from __future__ import annotations

import os
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from iree.compiler import ir

from patterns.sites import Ledger

from . import extensions
from .backends import devices
from .containers import Names
from .errors import CompileError, UsageError
from .importing.importer import Program, import_functions, parse_module
from .importing.merging import Merged, merge
from .importing.sources import Functions, sources_of
from .isolation.culprit import find_culprit
from .isolation.iree_steps import COMPILE, Iree, TimedOut, Unplaced
from .isolation.iree_steps import Step as IreeStep
from .passes import verify
from .passes.dispatch import Dispatched, choose_kernels
from .passes.fold import Folding
from .passes.raise_ops import recognisers
from .program import floats
from .program.checks import check_first
from .program.in_place import update_in_place
from .program.ownership import keep_arguments, part_updates
from .program.places import part_searches
from .program.scalar_ops import correct
from .program.slices import mend_slices
from .program.storage import add_entry, remove_entry
from .program.streams import not_in_place
from .program.sums import widen_sums
from .program.updates import choose_elements
from .report.records import kept, site_of, unshared
from .report.report import Report
from .signature import (
    ASYNC,
    INTO,
    SIGNATURE_KEY,
    Signature,
    known_sizes,
    sizes_are_open,
)
from .steps import BY_NAME, FUSING, State, Step, run
from .targets import Target, resolve
from .weights import parameters as weights

Progress = Callable[[str, str], None]
Fp8 = Literal["as-is", "native"]


@dataclass
class Compiled:
    """A compiled program.  ``vmfb`` holds its bytes; ``report`` says what became of each site.

    signatures: how each of its functions is called, by name.
    """

    target: Target
    report: Report
    vmfb: bytes
    dispatched: Dispatched
    signatures: dict[str, Signature]

    @property
    def signature(self) -> Signature:
        """How the program is called, if it is one function."""
        (signature,) = self.signatures.values()
        return signature

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vmfb to ``path``, all of it or nothing."""
        weights.write_atomically(Path(path), lambda temporary: temporary.write_bytes(self.vmfb))

    def dump_kernels(self, directory: str | os.PathLike[str]) -> None:
        """Write every kernel object and ``kernels.json`` (launches in execution order) to ``directory``."""
        from .program.dump import dump_kernels

        dump_kernels(self.dispatched, Path(directory))


def compile(
    module: torch.nn.Module | torch.export.ExportedProgram | Functions,
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
    """Compile a torch module for ``target``, or several, as functions of one program.

    module: of several functions a dictionary, ``{"prefill": (module, args, dynamic_shapes), "decode": ...}``.
    What is one tensor in two of them is there once, and what one of them writes to is state of all.
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
    sources = sources_of(module, args, kwargs, dynamic_shapes)
    pipeline.start("import", ", ".join(type(source.module).__name__ for source in sources.values()))
    return pipeline.run(import_functions(sources, pipeline.context, output=output), parameters)


def explain(
    module: torch.nn.Module | torch.export.ExportedProgram | Functions,
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
    sources = sources_of(module, args, kwargs, dynamic_shapes)
    return pipeline.explain(import_functions(sources, pipeline.context, output=output))


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
    program = parse_module(source, pipeline.context)
    return pipeline.run({program.name: program}, parameters)


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

    def _dump_step(self, module: ir.Module, function: str, step: str) -> None:
        self.dump(f"{step}{function}", module)

    def run(self, programs: Mapping[str, Program], parameters: str | os.PathLike[str] | None) -> Compiled:
        archive_path = Path(parameters) if parameters is not None else None
        steps = (*FUSING, BY_NAME["dispatch"], BY_NAME["expand"])
        with self.context, ir.Location.unknown(), tempfile.TemporaryDirectory() as directory:
            done = self._steps(programs, Path(directory), steps)
            merged = merge(tuple(programs.values()))
            with weights.archived(merged.parameters, archive_path, self.progress) as archive:
                try:
                    signatures, vmfb = self._compile(merged, archive, done)
                except Unplaced as error:
                    culprit = find_culprit(merged, lambda part, step=error.step: self._fails(part, step))
                    raise error if culprit is None else error.placed(culprit) from None
        report = _report(self.target, done, len(done.dispatched.launches), tuple(programs.values()))
        state = kept(signatures, done.reasons)
        report = replace(report, state=state, remarks=(*report.remarks, *unshared(state)))
        return Compiled(self.target, report, vmfb, done.dispatched, signatures)

    def explain(self, programs: Mapping[str, Program]) -> Report:
        with self.context, ir.Location.unknown(), tempfile.TemporaryDirectory() as directory:
            done = self._steps(programs, Path(directory), FUSING)
            kernels = [choose_kernels(each.main(), self.target, done.ledger) for each in programs.values()]
            return _report(self.target, done, sum(map(len, kernels)), tuple(programs.values()))

    def _steps(self, programs: Mapping[str, Program], directory: Path, steps: Sequence[Step]) -> _Done:
        """Run ``steps`` on each of ``programs``, in place."""
        done = _Done()
        folding, objects = Folding(), {}
        for name, program in programs.items():
            several = f"-{name}" if len(programs) > 1 else ""
            self.phase = 0
            self.dump(f"import{several}", program.module)
            state = State(
                program.module,
                program.main(),
                self.target,
                done.ledger,
                directory,
                program,
                self.recognisers,
                native_floats=self.fp8 == "native",
                progress=self.start,
                others=[other for other in programs.values() if other is not program],
                folding=folding,
                objects=objects,
            )
            dump = partial(self._dump_step, program.module, several)
            run(steps, state, dump, verified=verify.is_wanted())
            done.add(state.dispatched)
        return done

    def _compile(
        self, merged: Merged, archive: weights.Archive, done: _Done
    ) -> tuple[dict[str, Signature], bytes]:
        self.start("compile", self.target.name)
        signatures = {
            name: each.signature(self.target, archive.identity, merged.stored)
            for name, each in merged.functions.items()
        }
        devices.declare_device(merged.module, self.target)
        flags = (*devices.flags(self.target, source_paths=self.source_paths), *archive.flags())
        lowered = self._lower(self.iree, merged.module)
        apart: dict[str, set[int]] = {name: set() for name in signatures}
        while True:
            writes = any(signature.written for signature in signatures.values())
            module = lowered.operation.clone() if writes else lowered
            made = {
                name: _with_entries(module, name, each, apart[name], done)
                for name, each in signatures.items()
            }
            part_updates(module)
            part_searches(module)
            keep_arguments(module)
            _sign(module, made)
            self.dump("linalg", module)
            made, vmfb, wrong = self._finish(module, made, flags, done.ledger)
            if not any(wrong.values()):
                return made, vmfb
            apart = {name: apart[name] | wrong[name] for name in signatures}

    def _finish(
        self, module: ir.Module, signatures: dict[str, Signature], flags: Sequence[str], ledger: Ledger
    ) -> tuple[dict[str, Signature], bytes, dict[str, set[int]]]:
        """Compile the program; the arguments that it was to write to where they are, and does not.

        That a caller has memory for results must not cost the program: where IREE cannot do without its own,
        the functions with open sizes go back to that first, then all.
        """
        for names in _without_memory(signatures):
            try:
                return signatures, *self._compiled(module, signatures, flags)
            except CompileError as error:
                if not names or isinstance(error, TimedOut):
                    raise
                summary, *said = str(error).splitlines()
                said = [] if isinstance(error, Unplaced) else said
            where, _, why = said[0].strip().partition(": ") if said else ("unknown", "", summary)
            for name in names:
                remove_entry(module, name)
                text = f"allocates its results in each call; into a caller's memory: {why}"
                ledger.remark(name, where, text)
            signatures = signatures | {name: replace(signatures[name], placed=()) for name in names}
            _sign(module, signatures)
        raise AssertionError("the last of them is compiled or fails")

    def _compiled(
        self, module: ir.Module, signatures: Mapping[str, Signature], flags: Sequence[str]
    ) -> tuple[bytes, dict[str, set[int]]]:
        in_place = {
            name: [item.argument for item in signature.written if item.result is None]
            for name, signature in signatures.items()
        }
        if not any(in_place.values()):
            return self.iree.compile(module, flags), {name: set() for name in signatures}
        vmfb, streams = self.iree.compile_and_look(module, flags)
        wrong: dict[str, set[int]] = {}
        for name, numbers in in_place.items():
            # On the cpu the caller's memory is torch's, which IREE's driver fills and copies nothing into.
            count = len(signatures[name].inputs or ())
            lent = () if self.target.is_gpu else [number for number in numbers if number < count]
            entries = (name + ASYNC, name + INTO + ASYNC)
            wrong[name] = set().union(*(not_in_place(streams, entry, numbers, lent) for entry in entries))
        return vmfb, wrong

    def _lower(self, iree: Iree, module: ir.Module) -> ir.Module:
        module = iree.lower(module)
        choose_elements(module)
        mend_slices(module)
        correct(module, self.target)
        widen_sums(module, self.target)
        floats.rewrite_unsupported(module, self.target)
        check_first(module)
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


@dataclass
class _Done:
    """What the steps made of all functions.

    reasons: by function and argument, why a new value is not in its argument's memory.
    """

    ledger: Ledger = field(default_factory=Ledger)
    dispatched: Dispatched = field(default_factory=Dispatched)
    reasons: dict[str, dict[int, str]] = field(default_factory=dict)

    def add(self, dispatched: Dispatched) -> None:
        self.dispatched.launches += dispatched.launches
        self.dispatched.objects |= dispatched.objects
        self.dispatched.kernels |= dispatched.kernels


def _with_entries(
    module: ir.Module, name: str, signature: Signature, apart: set[int], done: _Done
) -> Signature:
    """Have ``@name`` write what it writes, into memory of the caller's too; how it is called then."""
    written, done.reasons[name] = update_in_place(module, name, signature.written, apart)
    placed = add_entry(module, name, known_sizes(replace(signature, written=written)))
    return replace(signature, written=written, placed=placed)


def _without_memory(signatures: Mapping[str, Signature]) -> Iterator[list[str]]:
    """The functions that give up the caller's memory for results, a group each time that IREE fails.

    The last is empty.
    """
    placed = [name for name, signature in signatures.items() if signature.placed]
    is_open = [name for name in placed if any(map(sizes_are_open, signatures[name].inputs or ()))]
    closed = [name for name in placed if name not in is_open]
    yield from (names for names in (is_open, closed) if names)
    yield []


def _sign(module: ir.Module, signatures: Mapping[str, Signature]) -> None:
    """Record how the program is called on the functions themselves, for the runtime to read."""
    symbols = ir.SymbolTable(module.operation)
    for name, signature in signatures.items():
        entry = ir.DictAttr.get({SIGNATURE_KEY: ir.StringAttr.get(signature.to_json())})
        symbols[name].operation.attributes["iree.reflection"] = entry


def _report(target: Target, done: _Done, dispatches: int, programs: Sequence[Program]) -> Report:
    ledger = done.ledger
    sites = tuple(map(site_of, ledger.records))
    remarks = tuple(remark for program in programs for remark in program.remarks) + tuple(ledger.remarks)
    folded = {value.name: value for program in programs for value in program.folded}
    remarks = tuple(dict.fromkeys(remarks))
    return Report(target.name, sites, dispatches, ledger.timing, tuple(folded.values()), remarks)
