"""Exported programs from a file: plain data is loaded, what holds code is refused, and nothing of it runs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from lowering.cli import compile as compile_cli
from lowering.cli.source import Model, resolve
from lowering.errors import UsageError


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        half = x[: x.shape[0] // 2]
        return self.linear(x) * x.shape[0], half + more["bias"], torch.cond(x.sum() > 0, _up, _down, (x,))


def _up(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _down(x: torch.Tensor) -> torch.Tensor:
    return x - 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    shapes = {"x": {0: 4 * Dim("quarter", max=16)}, "more": {"bias": None}}
    args = (torch.ones(8, 4), {"bias": torch.ones(4)})
    torch.export.save(torch.export.export(Scaled(), args, dynamic_shapes=shapes), path)
    return path


GRAPH = "models/model.json"
Change = Callable[[str, bytes], bytes]


def rewritten(saved: Path, path: Path, change: Change) -> Path:
    """The file with every record changed, written as torch writes it."""
    reader, writer = torch._C.PyTorchFileReader(str(saved)), torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        if name not in (".data/serialization_id", ".data/version", "byteorder"):
            data = change(name, reader.get_record(name))
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


class Touches:
    """Unpickled, it makes the file that tells that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def changing(record: str, change: Callable[[Any], Any]) -> Change:
    """Changes the JSON of one record."""

    def apply(name: str, data: bytes) -> bytes:
        return json.dumps(change(json.loads(data))).encode() if name == record else data

    return apply


def replaced(old: str, new: str) -> Change:
    """Replaces a string of the graph, wherever it stands."""

    def change(graph: Any) -> Any:
        text = json.dumps(graph)
        assert json.dumps(old) in text
        return json.loads(text.replace(json.dumps(old), json.dumps(new)))

    return changing(GRAPH, change)


def sized(text: str) -> Change:
    """Replaces the size of the first argument."""

    def change(graph: Any) -> Any:
        graph["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text
        return graph

    return changing(GRAPH, change)


def attacks(mark: Path) -> dict[str, tuple[Change, str]]:
    """Ways to have ``mark`` touched, and what is said of each."""
    evil = pickled(((torch.ones(8, 4), Touches(mark)), {}))
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    weights, constants = (
        "data/weights/model_weights_config.json",
        "data/constants/model_constants_config.json",
    )
    opaque = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    def pickled_weight(name: str, data: bytes) -> bytes:
        def change(index: Any) -> Any:
            index["config"]["linear.bias"]["use_pickle"] = True
            return index

        return evil if name == "data/weights/weight_1" else changing(weights, change)(name, data)

    return {
        "inputs": (lambda n, d: evil if "sample_inputs" in n else d, "pickled example inputs with"),
        "weight": (pickled_weight, "pickled weights ('linear.bias') with"),
        "object": (changing(constants, lambda _: {"config": {"c": opaque}}), "a pickled object ('c')"),
        "size": (sized(code), "a size that is no arithmetic"),
        "nested": (sized('S("print(1)")'), "a size that is no arithmetic"),
        "guard": (
            changing("models/model.json", lambda g: {**g, "guards_code": [code]}),
            "a guard that is no",
        ),
        "name": (replaced("x", f"x={code}"), "a name that is none"),
        "call": (replaced("torch.ops.aten.linear.default", "torch.os.system"), "a call of 'torch.os.system'"),
        "library": (
            replaced("torch.ops.aten.linear.default", "torch.ops.load_library"),
            "a call of 'torch.ops.load_library'",
        ),
    }


@pytest.mark.parametrize("name", attacks(Path("mark")))
def test_code_in_a_file_is_refused_and_not_run(saved: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    change, words = attacks(mark)[name]
    path = rewritten(saved, tmp_path / "evil.pt2", change)
    with pytest.raises(UsageError) as caught:
        resolve(str(path))
    assert f"{path} holds {words}" in str(caught.value) and "--trust-source" in str(caught.value)
    assert not mark.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_trusted_file_is_run(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the command says how to trust it."""
    mark = tmp_path / "mark"
    path = rewritten(saved, tmp_path / "m.pt2", attacks(mark)["inputs"][0])
    assert compile_cli.main([str(path), "-o", str(tmp_path / "m.vmfb")]) == 2
    assert "give --trust-source" in capsys.readouterr().err and not mark.exists()
    resolve(str(path), trusted=True)
    assert mark.exists()


def test_what_torch_saves_of_dynamic_sizes_guards_and_branches_is_plain(saved: Path) -> None:
    model = resolve(str(saved))
    assert isinstance(model, Model)
    assert tuple(model.args[0].shape) == (8, 4) and list(model.args[1]) == ["bias"]
    assert torch.equal(model.eager()(*model.args)[2], torch.full((8, 4), 2.0))


@pytest.mark.parametrize("length", [0, 3000])
def test_half_a_file_is_named(saved: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "half.pt2"
    path.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(UsageError, match=r"half\.pt2 is not a program torch\.export\.save wrote"):
        resolve(str(path))
