"""Several functions in one program: one set of weights, and one state."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowering
from lowering import CompileError, RunError, UsageError
from lowering.cli import compile as command
from lowering.cli import run as run_command

TOKENS = torch.export.Dim("tokens", max=32)
CAPACITY = 48


class Model(nn.Module):
    """A language model of one attention, whose weights are cast, so that something of them is folded."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 256)
        self.norm = nn.RMSNorm(256, eps=1e-6)
        self.key = nn.Linear(256, 256, bias=False).bfloat16()
        self.head = nn.Linear(256, 40, bias=False)
        self.register_buffer("keys", torch.zeros(1, capacity, 256))
        self.register_buffer("length", torch.zeros(1, dtype=torch.long))
        self.register_buffer("table", torch.rand(capacity, 256))

    def forward(self, ids: Tensor) -> Tensor:
        places = self.length + torch.arange(ids.shape[1])
        x = self.norm(self.embedding(ids) + self.table[places])
        self.keys.index_copy_(1, places, nn.functional.linear(x, self.key.weight.float()))
        self.length.add_(ids.shape[1])
        scores = x @ self.keys.transpose(1, 2)
        seen = torch.arange(self.keys.shape[1]) <= places[:, None]
        return self.head(torch.softmax(torch.where(seen, scores, -1e9), -1) @ self.keys)


class Last(nn.Module):
    """The logits of the last token alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)[:, -1]


def build(capacity: int = CAPACITY) -> dict[str, tuple[Any, ...]]:
    last = Last(Model(capacity))
    one, several = torch.ones(1, 1, dtype=torch.long), torch.arange(5)[None]
    return {"prefill": (last, (several,), {"ids": {1: TOKENS}}), "decode": (last, (one,))}


@pytest.fixture(scope="module")
def compiled() -> lowering.Compiled:
    return lowering.compile(build())


@pytest.fixture
def program(compiled: lowering.Compiled) -> lowering.Program:
    return lowering.load(compiled.vmfb)


def generated(prefill: Any, decode: Any, prompt: Tensor, count: int) -> Tensor:
    token = prefill(prompt).argmax(-1)[:, None]
    tokens = [token]
    for _ in range(count - 1):
        tokens.append(decode(tokens[-1]).argmax(-1)[:, None])
    return torch.cat(tokens, 1)


def test_functions_share_their_state(program: lowering.Program) -> None:
    prompt, eager = torch.arange(7)[None], Last(Model())
    assert program.functions == ("prefill", "decode")
    expected = generated(eager, eager, prompt, 30)
    for session in (program, program.session()):
        found = generated(session.prefill, session["decode"], prompt, 30)
        assert torch.equal(found, expected)
        assert int(session.state_dict()["model.length"]) == 36
    program.reset()
    assert torch.equal(generated(program.prefill, program.decode, prompt, 30), expected)


def test_they_share_their_weights(compiled: lowering.Compiled) -> None:
    """Folded ones too: the program is hardly larger than one of its functions."""
    alone = lowering.compile(*build()["decode"])
    weights = sum(value.nbytes for value in Model().state_dict().values())
    assert len(compiled.vmfb) < len(alone.vmfb) + weights // 4
    assert [value.name for value in compiled.report.folded] == [value.name for value in alone.report.folded]
    assert len(compiled.dispatched.objects) == len(alone.dispatched.objects)
    assert compiled.report.dispatches == 2 * alone.report.dispatches > 0


def test_a_cache_is_updated_in_place_by_both(compiled: lowering.Compiled) -> None:
    assert not any("no function reads" in remark.text for remark in compiled.report.remarks)
    for signature in compiled.signatures.values():
        names = [spec.name for spec in signature.state]
        assert sorted(names) == ["model.keys", "model.length"]
        in_place = [item.argument - 1 for item in signature.written if item.result is None]
        assert [names[number] for number in in_place] == ["model.keys"]


def test_a_function_is_called_by_its_name(program: lowering.Program) -> None:
    with pytest.raises(RunError, match="has no function 'main'; it has prefill, decode"):
        program(torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(AttributeError, match="a program has no 'decod'; its functions are prefill, decode"):
        program.decod(torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(RunError, match="decode takes 1 argument"):
        program.decode()
    with pytest.raises(RunError, match=r"prefill|exported for sizes with ids.shape\[1\] <= 32"):
        program.prefill(torch.zeros(1, 33, dtype=torch.long))
    assert {"prefill", "decode", "reset"} <= set(dir(program))


class Reads(nn.Module):
    def __init__(self, cache: Tensor) -> None:
        super().__init__()
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor) -> Tensor:
        return self.cache + x


class Writes(Reads):
    def forward(self, x: Tensor) -> Tensor:
        self.cache.copy_(x)
        return x + 1


def test_what_one_function_writes_another_reads() -> None:
    cache, x = torch.ones(4), torch.arange(4.0)
    functions = {"read": (Reads(cache), (x,)), "write": (Writes(cache), (x,))}
    program = lowering.load(lowering.compile(functions).vmfb)
    assert torch.equal(program.read(x), x + 1)
    program.write(x * 5)
    assert torch.equal(program.read(x), x * 6)
    assert [each.name for each in program.state()] == ["cache"]


class Named(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        (part,) = self.children()
        return part(x)


def test_functions_that_share_no_state_are_remarked_upon() -> None:
    """One of two copies of a model reads nothing that the other has written."""
    x = torch.arange(4.0)
    apart = {"write": Named(one=Writes(torch.ones(4))), "other": Named(two=Writes(torch.ones(4)))}
    compiled = lowering.compile({name: (module, (x,)) for name, module in apart.items()})
    (remark,) = compiled.report.remarks
    assert remark.text == (
        "no function reads what another writes: write keeps one.cache; other keeps two.cache. Where they are "
        "to share a cache, give them the same module"
    )
    program = lowering.load(compiled.vmfb)
    program.write(x)
    assert torch.equal(program.state_dict()["two.cache"], torch.ones(4))


def test_functions_that_do_not_belong_together_are_refused() -> None:
    x = torch.ones(4)

    def refused(**functions: nn.Module) -> str:
        with pytest.raises(CompileError) as caught:
            lowering.compile({name: (module, (x,)) for name, module in functions.items()})
        return str(caught.value)

    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    said = "the functions one and other have two tensors called weight, float32[4, 4] and float32[4, 4]"
    assert said in refused(one=one, other=other)
    said = "the functions write and other have two tensors called cache, float32[4] and float32[4]"
    assert said in refused(write=Writes(torch.ones(4)), other=Writes(torch.ones(4)))
    said = "the functions write and other have two tensors called cache, float32[4] and float32[2, 4]"
    assert said in refused(write=Writes(torch.ones(4)), other=Writes(torch.ones(2, 4)))
    # What it reads is not what the other writes.
    assert "two tensors called cache" in refused(write=Writes(torch.ones(4)), read=Reads(torch.ones(4)))
    assert "writes to cache, which has no elements, [0, 4]" in refused(write=Writes(torch.ones(0, 4)))


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ({}, "at least one function"),
        ({"reset": (Model(), ())}, "'reset' cannot be the name of a function"),
        ({"a b": (Model(), ())}, "'a b' cannot be the name of a function"),
        ({"f": Model()}, r"the function f is \(module, args\)"),
    ],
)
def test_what_is_no_dictionary_of_functions_is_refused(functions: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lowering.compile(functions)


def test_arguments_are_those_of_each_function() -> None:
    with pytest.raises(UsageError, match="each has its own arguments"):
        lowering.compile(build(), (torch.ones(1),))


def test_the_commands_know_functions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model.py"
    source.write_text("from tests.program.test_functions import build\n")
    vmfb = tmp_path / "model.vmfb"
    options = [f"{source}:build", "-o", str(vmfb), "--verify", "--parameters", str(tmp_path / "w.irpa")]
    assert command.main(options) == 0
    said = capfd.readouterr().err
    assert re.search(r"prefill: 6 outputs agree.*; decode: 3 outputs agree", said), said
    given = [str(vmfb), "--parameters", str(tmp_path / "w.irpa")]
    call = ["--function", "decode", "--input", "1x1xi64=3", "--output", f"@{tmp_path / 'y.npy'}"]
    assert run_command.main([*given, *call]) == 0
    assert run_command.main([*given, "--input", "1x1xi64=3"]) == 1
    assert "has no function 'main'; it has prefill, decode" in capfd.readouterr().err
