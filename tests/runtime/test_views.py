"""Views of arguments that come again: what is read is what a tensor holds now, and memory is let go of."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import lowering


@pytest.fixture(scope="module")
def program(double: Path) -> lowering.Program:
    return lowering.load(double)


def settled(program: lowering.Program) -> torch.Tensor:
    """A square tensor whose view the program remembers."""
    x = torch.randn(4, 4)
    for _ in range(4):
        assert torch.equal(program(x), x + x)
    return x


def test_a_view_is_made_once(program: lowering.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    x = settled(program)
    monkeypatch.setattr(program._session, "to_iree", None)
    assert torch.equal(program(x), x + x)
    with pytest.raises(TypeError):
        program(x.clone())


def changed_in_place(x: torch.Tensor) -> None:
    x.mul_(3)


def given_other_memory(x: torch.Tensor) -> None:
    x.data = torch.randn(4, 4)


def transposed(x: torch.Tensor) -> None:
    x.t_()


def part_of_another(x: torch.Tensor) -> None:
    x.data = torch.randn(5, 4)[1:]


def grown(x: torch.Tensor) -> None:
    x.resize_(400, 4).normal_()


@pytest.mark.parametrize("change", [changed_in_place, given_other_memory, transposed, part_of_another, grown])
def test_what_is_read_is_what_the_tensor_holds(program: lowering.Program, change) -> None:
    x = settled(program)
    change(x)
    for _ in range(4):
        assert torch.equal(program(x), x + x)
        x.add_(1)


def test_another_dtype_in_the_same_memory_is_refused(program: lowering.Program) -> None:
    x = settled(program)
    x.data = x.data.view(torch.int32)
    with pytest.raises(lowering.RunError, match="expected float32"):
        program(x)


def test_memory_is_free_when_its_tensor_is(program: lowering.Program) -> None:
    array = torch.randn(4, 4).numpy()
    alive, x = weakref.ref(array), torch.from_numpy(array)
    del array
    for _ in range(4):
        assert torch.equal(program(x), x + x)
    assert program["main"]._plan((x,)).views._kept and alive() is not None
    # An interrupt in a callback of Python's would be lost, so there is none.
    callbacks: list[Any] = [ref.__callback__ for ref in weakref.getweakrefs(x) if ref.__callback__]
    assert [type(callback.func) for callback in callbacks] == [type([].__setitem__)]
    del x
    assert alive() is None
