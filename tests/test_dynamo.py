"""torch.compile(model, backend="lowering"): how often it compiles, what it writes, what it leaves eager."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lowering
from lowering import compiler, dynamo


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What has been compiled since the test began."""
    made: list[Any] = []
    compile = compiler.compile

    def recorded(*args: Any, **kwargs: Any) -> Any:
        made.append(compile(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(compiler, "compile", recorded)
    torch.compiler.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*leaves a graph to eager")
        yield made
    torch.compiler.reset()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256))

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.ops.lowering.rms_norm(x, self.weight, 1e-6)
        q, scale = torch.ops.lowering.group_quant(y, 128)
        return q, scale, torch.relu(y), x.shape[0] * 2, x[:, :16]


def integers(*shape: int) -> torch.Tensor:
    """Small ones: their squares add up exactly in any order, so results are equal bit for bit."""
    return torch.randint(-8, 9, shape).float()


def assert_eager(ours: Any, eager: Any) -> None:
    for a, b in zip(ours, eager, strict=True):
        assert a == b if isinstance(b, int) else torch.equal(a.float(), b.float())


def test_a_graph_is_one_program_for_all_its_sizes(compiled: list[Any]) -> None:
    model = Model()
    ours = torch.compile(model, backend="lowering")
    for rows in (3, 5, 6, 9, 40):
        x = integers(rows, 256)
        results = ours(x)
        assert_eager(results, model(x))
        assert results[-1].data_ptr() == x.data_ptr()  # a view of the argument, as in eager
    assert len(compiled) == 2  # Dynamo opens a size when it sees another
    with torch.inference_mode():
        x = integers(4, 256)
        assert_eager(ours(x), model(x))


def test_a_gradient_is_refused() -> None:
    torch.compiler.reset()
    ours = torch.compile(Model(), backend="lowering")
    with pytest.raises(lowering.UsageError, match=r"a gradient is asked for: .*inference_mode"):
        ours(integers(3, 256))


class Counter(nn.Module):
    """Writes to a buffer and to an argument."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2, 8))

    def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        self.seen[1:] += x.sum(0, keepdim=True)
        where.add_(1)
        return self.seen * 2


def test_what_the_graph_writes_is_written_and_nothing_else(compiled: list[Any]) -> None:
    model, eager = Counter(), Counter()
    ours = torch.compile(model, backend="lowering")
    place, seen = torch.tensor([3]), model.seen
    for turn in range(3):
        x = integers(4, 8)
        before = x.clone()
        expected = eager(x, torch.tensor([0]))
        assert torch.equal(ours(x, place), expected)
        assert torch.equal(x, before) and torch.equal(seen, eager.seen) and place.item() == 4 + turn
    assert len(compiled) == 1


def test_a_result_that_is_written_on_the_way_is_the_argument(compiled: list[Any]) -> None:
    ours = torch.compile(lambda x: (x.add_(1)[1:], x * 2), backend="lowering")
    x = integers(4, 8)
    expected = x + 1
    part, twice = ours(x)
    assert torch.equal(x, expected) and torch.equal(twice, 2 * expected)
    assert part.data_ptr() == x[1:].data_ptr() and torch.equal(part, x[1:])


def test_what_cannot_be_compiled_is_eager_after_one_warning(compiled: list[Any]) -> None:
    def unknown(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x) * 2  # what no target computes

    ours = torch.compile(unknown, backend="lowering", dynamic=False)
    x = torch.randn(3, 3)
    with pytest.warns(
        UserWarning, match=r"(?s)leaves a graph to eager PyTorch: .*test_dynamo.py:\d+: .*linalg_eig"
    ):
        result = ours(x)
    assert torch.equal(result, unknown(x)) and torch.equal(ours(x), unknown(x))
    assert compiled == []


def test_what_cannot_be_compiled_is_tried_once_whatever_its_sizes(
    compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def refused(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise lowering.CompileError("no")

    monkeypatch.setattr(compiler, "compile", refused)
    model = Model()
    ours = torch.compile(model, backend="lowering")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for rows in (3, 5, 6, 9, 40):
            x = integers(rows, 256)
            assert_eager(ours(x), model(x))
    # Dynamo made two graphs; the one with open sizes is tried with names for them and without.
    assert len(tried) == 3 and sum("leaves a graph" in str(each.message) for each in said) == 2


def test_memory_that_two_arguments_share_is_eager(compiled: list[Any]) -> None:
    def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return y * 2

    ours = torch.compile(written, backend="lowering")
    memory, other = torch.zeros(8), torch.zeros(4)
    assert torch.equal(ours(memory[:4], other), torch.zeros(4))
    with pytest.warns(UserWarning, match="shares memory with argument"):
        assert torch.equal(ours(memory[:4], memory[:4].view(4)), torch.full((4,), 4.0))


@pytest.mark.parametrize(
    ("hip", "properties", "target"),
    [
        (None, {"gcnArchName": "NVIDIA H200", "major": 9, "minor": 0}, "sm_90"),
        (None, {"gcnArchName": "NVIDIA B200", "major": 10, "minor": 0}, "sm_100"),
        ("7.1", {"gcnArchName": "gfx950:sramecc+:xnack-", "major": 9, "minor": 5}, "gfx950"),
    ],
)
def test_the_target_is_that_of_the_device(
    hip: str | None, properties: dict[str, Any], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    assert dynamo._gpu(SimpleNamespace(**properties)) == target


def test_weights_that_are_copied_in_each_call_are_spoken_of(compiled: list[Any]) -> None:
    model = nn.Linear(512, 600, bias=False)
    model.weight.data = torch.randn(600 * 512 + 1)[1:].view(600, 512)  # as those mapped from a file
    x = torch.randn(3, 512)
    with pytest.warns(UserWarning, match=r"copies 1 MiB of tensors .* p.data.clone"):
        found = torch.compile(model, backend="lowering")(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)  # sums in another order
    for p in model.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(model, backend="lowering")(x)


def test_options(compiled: list[Any], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    asked: Any = {"require_fused": True, "report": report}
    ours = torch.compile(Model(), backend="lowering", options=asked)
    ours(integers(3, 256))
    assert json.loads(report.read_text())["summary"] == {"fused": 2, "unfused": 0, "dispatches": 1}
    ours(integers(4, 256))
    assert (tmp_path / "report-1.json").exists()

    def alone(x: torch.Tensor) -> Any:
        return torch.ops.lowering.group_quant(x.sort(-1).values.roll(1, -1), 100)

    refused = torch.compile(alone, backend="lowering", options={"require_fused": True})
    with pytest.raises(lowering.UnfusedError, match=r"1 sites did not fuse\n.*group_quant at .*test_dynamo"):
        refused(integers(3, 200))
    wrong: Any
    for wrong in ({"options": {"fused": True}}, {"mode": "fastest"}):
        with pytest.raises(Exception, match="there are"):
            torch.compile(Model(), backend="lowering", **wrong)(integers(3, 256))


def test_a_process_ends_without_a_word() -> None:
    """Dynamo keeps graphs to the end, and what IREE finds alive there it complains of."""
    code = """
        import torch
        print(torch.compile(torch.nn.ReLU(), backend="lowering")(-torch.ones(2)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("tensor([0., 0.])", "")


def test_a_program_dies_with_its_graph(compiled: list[Any]) -> None:
    from lowering.runtime.program import Program

    def alive() -> int:
        gc.collect()
        return sum(type(each) is Program for each in gc.get_objects())

    before, model = alive(), Model()
    ours = torch.compile(model, backend="lowering")
    ours(integers(3, 256))
    assert alive() == before + 1
    del ours
    torch.compiler.reset()
    assert alive() == before


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_of_an_unedited_model(llama: Any, cache: str, compiled: list[Any]) -> None:
    """Greedy and sampled: the tokens of eager, from at most three programs for the prompt and 64 tokens."""
    prompt, forward = torch.randint(1, 128, (2, 9)), llama.forward
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # padded on the left
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"max_new_tokens": 64, "do_sample": False},
        "sampled": {"max_new_tokens": 64, "do_sample": True, "top_k": 8},
    }

    def tokens(**how: Any) -> torch.Tensor:
        torch.manual_seed(3)
        return llama.generate(
            prompt, attention_mask=mask, cache_implementation=cache, disable_compile=True, **how
        )

    expected = {name: tokens(**how) for name, how in ways.items()}
    try:
        llama.forward = torch.compile(forward, backend="lowering")
        for name, how in ways.items():
            assert torch.equal(tokens(**how), expected[name]), name
    finally:
        llama.forward = forward
    assert len(compiled) <= 3
