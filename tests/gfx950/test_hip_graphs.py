"""Calls as graphs through IREE's HIP driver, on the stand-in: the checks are in ``graph_calls``.

They run in a process of their own, the GPU of which is emulated, and each says by its name that it held.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowering
from tests.gfx950 import graph_calls
from tests.gfx950.graph_calls import CHECKS, HIDDEN, Chain, Remembering
from tests.gfx950.test_hip_programs import emulated


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    directory, by_rows = tmp_path_factory.mktemp("graphs"), {0: torch.export.Dim("T")}
    x, page = torch.randn(4, HIDDEN).bfloat16(), torch.zeros(8, HIDDEN).bfloat16()
    for name, model, example, shapes in (
        ("chain", Chain(), (x, x.clone()), (by_rows, by_rows)),
        ("remembering", Remembering(), (x[:2], torch.arange(2), page), None),
    ):
        compiled = lowering.compile(model.eval(), example, dynamic_shapes=shapes, target="gfx950")
        compiled.save(directory / f"{name}.vmfb")
    return directory


@pytest.fixture(scope="module")
def done(programs) -> tuple[list[str], str]:
    """The names of the checks that held, and what was said of the others."""
    ran = emulated("python", graph_calls.__file__, programs, *[check.__name__ for check in CHECKS])
    return ran.stdout.split(), ran.stderr


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_calls_as_graphs(done, name):
    names, errors = done
    assert name in names, errors
