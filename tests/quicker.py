"""Take from the tests what Python and PyTorch do over and over in a thousand compilations.

It was a third of the time of those tests that import models, and nothing that they see depends on it.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        _collect_garbage_seldom()
        _remember_operators()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # so that what the libraries' bindings hold is let go of before they look for leaks


def _collect_garbage_seldom() -> None:
    """What is loaded by now, a million objects, stays until the end; no use in going through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _remember_operators() -> None:
    """PyTorch asks its registry twice in each decomposition for all operators that have one by default.

    They are the same as long as no operator is registered, as a test or torch itself may do.
    """
    import torch
    from torch.export import decomp_utils, exported_program

    collect = exported_program._collect_all_valid_cia_ops
    known: dict[tuple[str, ...], set[Any]] = {}

    def collected() -> set[Any]:
        names = tuple(torch._C._dispatch_get_all_op_names())
        if names not in known:
            known.clear()
            known[names] = collect()
        return set(known[names])

    exported_program._collect_all_valid_cia_ops = collected
    decomp_utils._collect_all_valid_cia_ops = collected
