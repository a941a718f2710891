"""The order of the compiler's steps between import and IREE: the one table that everything reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from iree.compiler import ir

from patterns.flavour import use_flavours
from patterns.recogniser import Recogniser
from patterns.sites import Ledger

from .families.registry import supported
from .importing.importer import Program
from .passes.check_scales import check_scales
from .passes.dispatch import Dispatched, dispatch, return_physical_scales
from .passes.expand import Expander
from .passes.fold import Folding, fold
from .passes.fuse import fuse
from .passes.join import join
from .passes.lay_out import check, lay_out, reads_of
from .passes.normalize import normalize
from .passes.raise_ops import raise_function
from .passes.respell import respell
from .passes.sink_views import sink_views
from .passes.spell_out import spell_out
from .passes.verify import verify
from .passes.widen import widen
from .targets import Target


@dataclass
class State:
    """Hold what the steps work on, in place.

    program: the function's weights and signature; None for a function of a bare module, whose steps that need
    weights do nothing.  directory: gets the objects that IREE reads from files, and must live until it has.
    recognisers: None for those of all families.  native_floats: retarget quantizations to the target's e4m3.
    others: the program's other functions.
    folding, objects: what the functions of a program have in common, filled by each.
    """

    module: ir.Module
    function: ir.Operation
    target: Target
    ledger: Ledger
    directory: Path
    program: Program | None = None
    recognisers: Sequence[Recogniser] | None = None
    native_floats: bool = False
    progress: Callable[[str, str], None] = lambda phase, detail: None
    others: Sequence[Program] = ()
    dispatched: Dispatched = field(default_factory=Dispatched)
    folding: Folding = field(default_factory=Folding)
    objects: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step: its name, which is that of its dump, and what it does to a state."""

    name: str
    run: Callable[[State], object]
    applies: Callable[[State], bool] = lambda state: True


def _fuse(state: State) -> None:
    if state.program is not None:
        join(state.program, state.others, state.ledger, reads_of(state.target))
    fuse(state.function, state.ledger, supported(state.target))


def _dispatch(state: State) -> None:
    check(state.function)
    if state.program is not None:
        check_scales(state.program)
    state.dispatched = dispatch(
        state.module,
        state.function,
        state.target,
        state.ledger,
        state.directory,
        lambda entry: state.progress("kernels", entry),
        state.objects,
    )
    if state.program is not None:
        strides = return_physical_scales(
            state.function, state.dispatched.physical_scales, state.program.row_major
        )
        state.program.mark_strides(strides)


def _expand(state: State) -> None:
    Expander(spell_attention=not state.target.is_gpu).expand(state.function)
    spell_out(state.function)
    widen(state.function)
    respell(state.function)


STEPS: tuple[Step, ...] = (
    Step("normalize", lambda state: normalize(state.function)),
    Step("raise", lambda state: raise_function(state.function, state.ledger, state.recognisers)),
    Step("sink", lambda state: sink_views(state.function)),
    Step(
        "flavour",
        lambda state: use_flavours(state.function, state.ledger, state.target.floats),
        applies=lambda state: state.native_floats,
    ),
    Step("fuse", _fuse),
    Step("layout", lambda state: lay_out(state.function, state.ledger, reads_of(state.target))),
    Step(
        "fold",
        lambda state: state.program and fold(state.program, state.folding),
        applies=lambda state: state.program is not None,
    ),
    Step("dispatch", _dispatch),
    Step("expand", _expand),
)
BY_NAME = {step.name: step for step in STEPS}
FUSING = tuple(BY_NAME[name] for name in ("normalize", "raise", "sink", "flavour", "fuse", "layout", "fold"))
"""What decides about every site, before any kernel is made."""


def run(
    steps: Sequence[Step],
    state: State,
    dump: Callable[[str], None] = lambda name: None,
    *,
    verified: bool = False,
) -> None:
    """Run ``steps`` on ``state``; ``dump`` is told each one's name when it is done.

    verified: check the whole module after each step (see ``passes.verify``), and name the step that broke it.
    """
    for step in steps:
        if not step.applies(state):
            continue
        state.progress(step.name, "")
        started = time.perf_counter()
        step.run(state)
        state.ledger.timing.steps[step.name] = time.perf_counter() - started
        if verified:
            verify(state.module, step.name)
        dump(step.name)
