"""Step 1: results with names, the part of them that is asked for, and ints as arguments and results."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from iree.compiler import ir
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicCache

import lowering
from lowering import containers
from lowering.errors import CompileError, RunError, UsageError
from lowering.importing.importer import import_module
from lowering.signature import Constant, Integer, TensorSpec

THIS = Path(__file__).name


# --- containers ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    """As a model returns it: one part is not always there."""

    logits: Any
    extra: Any = None


Pair = namedtuple("Pair", "left right")

TREES: tuple[tuple[Any, list[str]], ...] = (
    (Answer(1, {"a.b": [2, 3]}), ["logits", "extra.a.b.0", "extra.a.b.1"]),
    (Answer(1), ["logits"]),
    (Pair(1, (2,)), ["left", "right.0"]),
    ({"y": {7: 1}}, ["y.7"]),
    ((1, [2, None]), ["0", "1.0", "1.1"]),
    (5, ["output"]),
)


@pytest.mark.parametrize(("value", "names"), TREES, ids=str)
def test_leaves_have_names_and_trees_are_text(value, names) -> None:
    leaves, tree = pytree.tree_flatten(containers.register(value))
    assert containers.leaf_names(tree) == names
    text = containers.dump(tree)
    assert text is not None and containers.load(text) == tree
    for name, leaf in zip(names, leaves, strict=True):
        part = value if name == "output" else containers.select(value, name)
        assert part == leaf == containers.select(containers.plain(tree, leaves), name.removeprefix("output"))


def test_a_name_that_is_no_result_is_told_what_there_is() -> None:
    with pytest.raises(UsageError, match="output 'z' names no result of the model; there is logits, extra"):
        containers.select(Answer(1, 2), "z")
    with pytest.raises(UsageError, match=r"'logits\.0' names no result.*a int, which has no parts"):
        containers.select(Answer(1, 2), "logits.0")
    with pytest.raises(UsageError, match="output is the name of a result or several"):
        containers.select(Answer(1, 2), ())
    assert containers.select(Answer(1, 2), ("extra", "logits")) == {"extra": 2, "logits": 1}


def test_containers_of_another_process_are_dictionaries() -> None:
    tree = pytree.tree_structure(containers.register((1, Answer(2, 3), DynamicCache())))
    text = containers.dump(tree)
    assert text is not None
    elsewhere = containers.load(text.replace(f"{__name__}.Answer", "else.where.Answer"))
    assert elsewhere is not None
    _, answer, cache = pytree.tree_unflatten([1, 2, 3], elsewhere)
    assert answer == {"logits": 2, "extra": 3} and isinstance(cache, DynamicCache)


# --- results -------------------------------------------------------------------------------------------


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.other = nn.Linear(4, 3), nn.Linear(4, 500)

    def forward(self, x, *, scale):
        y = x * scale
        return Answer(self.head(y), {"other": self.other(y), "pair": Pair(y, 7)})


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers().eval().requires_grad_(False)


CALL = (torch.randn(2, 4),), {"scale": torch.tensor(2.0)}


def test_a_dataclass_comes_back_as_itself(answers) -> None:
    compiled = lowering.compile(answers, CALL[0], kwargs=CALL[1])
    assert compiled.signature.outputs is not None
    assert [getattr(leaf, "name", None) for leaf in compiled.signature.outputs] == [
        "logits", "extra.other", "extra.pair.left", None,
    ]  # fmt: skip
    x, scale = torch.randn(2, 4), torch.tensor(-0.5)
    got, want = lowering.load(compiled.vmfb)(x, scale=scale), answers(x, scale=scale)
    assert type(got) is Answer and type(got.extra["pair"]) is Pair and got.extra["pair"].right == 7
    # One product of four terms: another order of the sum moves the last bits.
    assert torch.allclose(got.logits, want.logits, atol=1e-6)
    assert torch.allclose(got.extra["other"], want.extra["other"], atol=1e-6)


@pytest.mark.parametrize("saved", [False, True], ids=["module", "exported"])
def test_only_what_is_asked_for_is_computed(answers, saved) -> None:
    given: Any = answers
    if saved:
        given = torch.export.export(answers, *CALL, strict=False)
    x, scale = torch.randn(2, 4), torch.tensor(3.0)
    want = answers(x, scale=scale)
    program = import_module(given, CALL[0], ir.Context(), kwargs=CALL[1], output="logits")
    assert set(program.parameters) == {"head.weight", "head.bias"}
    compiled = lowering.compile(given, CALL[0], kwargs=CALL[1], output="logits")
    assert torch.allclose(lowering.load(compiled.vmfb)(x, scale=scale), want.logits, atol=1e-6)
    names = ("extra.pair", "logits")
    got = lowering.load(lowering.compile(given, CALL[0], kwargs=CALL[1], output=names).vmfb)(x, scale=scale)
    pair = got["extra.pair"]
    assert list(got) == list(names) and torch.equal(pair["left"] if saved else pair.left, x * scale)
    with pytest.raises(UsageError, match=r"output 'logit' names no result.*there is logits, extra"):
        lowering.explain(given, CALL[0], kwargs=CALL[1], output="logit")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def test_a_cache_is_an_argument_and_a_result() -> None:
    """One step of a decoder behind a prompt of any length, as transformers calls it."""
    model = llama()
    prompt, more = torch.randint(64, (1, 5)), torch.randint(64, (1, 1))
    with torch.no_grad():
        before = model(prompt).past_key_values
    time = Dim("past", max=50)
    cache = {"key_cache": [{2: time}, {2: time}], "value_cache": [{2: time}, {2: time}]}
    kwargs = {"past_key_values": before}
    shapes = {"input_ids": None, "past_key_values": list(cache.values())}
    compiled = lowering.compile(model, (more,), kwargs=kwargs, dynamic_shapes=shapes)
    program = lowering.load(compiled.vmfb)
    for length in (5, 9):
        prompt = torch.randint(64, (1, length))
        with torch.no_grad():
            got = program(more, past_key_values=model(prompt).past_key_values)
            want = model(more, past_key_values=model(prompt).past_key_values)
        assert type(got) is type(want) and type(got.past_key_values) is DynamicCache
        ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(want)
        assert len(ours) == 5 and ours[1].shape == (1, 2, length + 1, 16)
        # float32 sums in another order, over two layers.
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_where_transformers_is_not_loaded_a_cache_is_a_dictionary(tmp_path) -> None:
    ids = torch.randint(64, (1, 4))
    lowering.compile(llama(), (ids,)).save(tmp_path / "m.vmfb")
    code = f"""
import sys, torch, lowering
got = lowering.load({str(tmp_path / "m.vmfb")!r})(torch.tensor({ids.tolist()}))
assert "transformers" not in sys.modules
print(*got, *got["past_key_values"], len(got["past_key_values"]["key_cache"]), *got["logits"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "logits",
        "past_key_values",
        "key_cache",
        "value_cache",
        "2",
        "1",
        "4",
        "64",
    ]


def test_a_cache_that_is_no_tree_is_left_out_or_refused() -> None:
    class Remembers(nn.Module):
        def forward(self, x):
            cache = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
            return {"y": x * 2, "cache": cache}

    with pytest.raises(CompileError, match=r'output="logits".*use_cache = False') as caught:
        lowering.explain(Remembers(), (torch.ones(3),))
    assert "<" not in str(caught.value)
    x = torch.randn(3)
    compiled = lowering.compile(Remembers(), (torch.ones(3),), output="y")
    assert torch.equal(lowering.load(compiled.vmfb)(x), x * 2)


# --- ints ----------------------------------------------------------------------------------------------


class Window(nn.Module):
    def forward(self, n: int, x: Tensor):
        return x[:, :n] * n, x.shape[0], {"both": max(2 * n, x.shape[0]) - x.shape[0] % 3, "seven": 7}


def test_ints_are_passed_and_returned_as_ints() -> None:
    shapes = {"n": Dim.DYNAMIC, "x": {0: Dim("rows")}}
    compiled = lowering.compile(Window(), (5, torch.randn(3, 64)), dynamic_shapes=shapes)
    said = compiled.signature
    assert said.inputs is not None and said.outputs is not None
    assert [type(leaf) for leaf in said.inputs] == [Integer, TensorSpec]
    assert [type(leaf) for leaf in said.outputs] == [TensorSpec, Integer, Integer, Constant]
    program = lowering.load(compiled.vmfb)
    for n, rows in ((5, 3), (17, 1), (2, 8)):
        x = torch.randn(rows, 64)
        (y, *ints), (want, *others) = program(n, x), Window()(n, x)
        assert torch.equal(y, want) and ints == others and type(ints[0]) is int
    x = torch.randn(3, 64)
    for n, said in (
        (1, r"argument n: 1: the model was exported for sizes with (2 <= n|n != 1)"),
        (65, r"n <= 64"),
        (True, "argument n: expected an int, got bool"),
        (3.0, "argument n: expected an int, got float"),
        (torch.tensor(3), "argument n: expected an int, got Tensor"),
        (1 << 64, "argument n: 18446744073709551616 has more than 64 bits"),
    ):
        with pytest.raises(RunError, match=said):
            program(n, x)


@pytest.mark.parametrize("target", ["h200", "gfx950"])
def test_ints_are_passed_on_gpus(target) -> None:
    shapes = {"n": Dim.DYNAMIC, "x": {0: Dim("rows")}}
    compiled = lowering.compile(Window(), (5, torch.randn(3, 64)), dynamic_shapes=shapes, target=target)
    assert compiled.signature.placed, "what an int tells of a result's size is known before the call"


def test_an_int_that_is_read_from_a_tensor_is_refused() -> None:
    class Counts(nn.Module):
        def forward(self, x):
            return x * 2, x.nonzero().shape[0]

    with pytest.raises(CompileError, match=r"the result 1 is an int .*output="):
        lowering.explain(Counts(), (torch.ones(3),))
    x = torch.randn(3)
    assert torch.equal(lowering.load(lowering.compile(Counts(), (x,), output="0").vmfb)(x), x * 2)
