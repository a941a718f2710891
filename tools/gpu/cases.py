"""The models that are compiled on one machine and checked on another, and the manifest between them.

Needs torch, and transformers for the Llama; never the compiler.  A model is built with a fixed seed
and its weights are then replaced by the packed ones, so both machines hold the same bits whatever
versions of torch and transformers they have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lowering.nn
from lowering.errors import UsageError

MANIFEST = "manifest.json"
VERSION = 1
GROUP = 128
EPS = 1e-6
VOCABULARY = 512


# The models -------------------------------------------------------------------------------------


class FanOut(nn.Module):
    """relu -> rms_norm -> two group_quants of one tensor, with or without a view between."""

    def __init__(self, hidden: int, *, view: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, dtype=torch.bfloat16))
        self.view = view

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.lowering.rms_norm(torch.relu(x), self.weight, EPS)
        if self.view:
            y = y.view(-1, y.shape[-1])
        return (*torch.ops.lowering.group_quant(y, GROUP), *torch.ops.lowering.group_quant(y, GROUP))


class AddNorm(nn.Module):
    """Residual add -> rms_norm -> group_quant, with the 16-bit value and the new residual kept."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, dtype=torch.bfloat16))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y, total = torch.ops.lowering.add_rms_norm(x, residual, self.weight, EPS)
        return (*torch.ops.lowering.group_quant(y, GROUP), y, total)


class Updates(nn.Module):
    """Hold what IREE does in place, each the last reader of an argument or a weight; and the arguments."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, dtype=torch.bfloat16))

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        columns = torch.tensor([1, 3], device=x.device)
        moved = x.index_copy(1, columns, y[:, :2])
        cleared = y.clone()
        cleared[:, 8:16] = 0
        scaled = self.weight.index_fill(0, columns, 2.0) * z
        return moved, cleared, z.index_fill(1, columns, 3.0), scaled, x, y


class Llama(nn.Module):
    """A two-layer Hugging Face Llama with quantized linear layers: ids [1, T] to logits [1, T, V]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        model = nn.Module.to(LlamaForCausalLM(config), torch.bfloat16)
        self.model = lowering.nn.quantize(model, group_size=GROUP)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


# The cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One model, how it is compiled and what it is tried on.

    outputs: what each result is, for ``gpu_compare``.
    arguments: how many tensors of [T, hidden] it takes; 0 means token ids [1, T].
    example_rows: T of the example arguments; large enough that kernels.json shows how a grid follows from it.
    separate: its weights travel in an .irpa beside the vmfb instead of inside it.
    kernels: how many of ours it has; None: whatever they are.
    """

    name: str
    build: Callable[[], nn.Module]
    outputs: tuple[str, ...]
    hidden: int
    arguments: int
    rows: tuple[int, ...] = (0, 1, 3, 17, 128, 1024, 4096)
    example_rows: int = 4096
    separate: bool = False
    timed: bool = False
    kernels: int | None = 1

    @property
    def ids(self) -> bool:
        return self.arguments == 0

    def inputs(self, rows: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
        """Fresh random arguments: ids, or rows whose magnitudes span several decades."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids:
            return (torch.randint(VOCABULARY, (1, rows), generator=generator).to(device),)
        return tuple(random_rows(rows, self.hidden, generator).to(device) for _ in range(self.arguments))

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Give what torch.export is told: T may be anything."""
        if self.ids:
            return ({1: torch.export.Dim("T", max=2048)},)
        rows = torch.export.Dim("T")
        return tuple({0: rows} for _ in range(self.arguments))


def random_rows(rows: int, hidden: int, generator: torch.Generator) -> Tensor:
    """bfloat16 [rows, hidden]: normal values, each row times its own power of ten between -2 and 2."""
    magnitude = 10.0 ** (4.0 * torch.rand(rows, 1, generator=generator) - 2.0)
    return (torch.randn(rows, hidden, generator=generator) * magnitude).to(torch.bfloat16)


_TWICE = ("q", "scale", "q", "scale")
CASES = (
    Case("fanout-7168", lambda: FanOut(7168, view=False), _TWICE, 7168, 1, timed=True),
    Case("fanout-1536", lambda: FanOut(1536, view=False), _TWICE, 1536, 1, timed=True),
    Case("fanout-view-7168", lambda: FanOut(7168, view=True), _TWICE, 7168, 1),
    Case("fanout-view-1536", lambda: FanOut(1536, view=True), _TWICE, 1536, 1),
    Case(
        "add-norm-7168", lambda: AddNorm(7168), ("q", "scale", "y", "sum"), 7168, 2, separate=True, timed=True
    ),
    Case(
        "updates-256",
        lambda: Updates(256),
        ("moved", "cleared", "filled", "scaled", "first", "second"),
        256,
        3,
        kernels=0,
    ),
    Case(
        "llama-2-layers",
        Llama,
        ("logits",),
        512,
        0,
        rows=(1, 3, 17, 128, 1024),
        example_rows=96,
        separate=True,
        kernels=None,
    ),
)


def case_named(name: str) -> Case:
    """The case called ``name``; UsageError naming every case."""
    for case in CASES:
        if case.name == name:
            return case
    raise UsageError(f"there is no case {name!r}; the cases are {', '.join(c.name for c in CASES)}")


# Weights ----------------------------------------------------------------------------------------


def build(case: Case) -> nn.Module:
    """The model of ``case`` with its random weights, on the cpu."""
    torch.manual_seed(0)
    model = case.build().eval().requires_grad_(False)
    if not case.ids:
        weight = tensors_of(model)["weight"]
        weight.copy_(1.0 + 0.25 * torch.randn(weight.shape))
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, the buffers that a state_dict leaves out included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def save_weights(model: nn.Module, path: Path) -> None:
    """Write ``tensors_of(model)`` to a .safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}, path)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Give ``model`` the tensors of ``path``; UsageError unless names, shapes and dtypes are the same."""
    from safetensors.torch import load_file

    own, packed = tensors_of(model), load_file(path)
    if own.keys() != packed.keys():
        different = ", ".join(sorted(own.keys() ^ packed.keys()))
        raise UsageError(f"{path} and the model built here do not have the same tensors: {different}")
    for name, tensor in own.items():
        if (tensor.shape, tensor.dtype) != (packed[name].shape, packed[name].dtype):
            raise UsageError(f"{path}: {name} is not what the model built here has")
        tensor.copy_(packed[name])
    return model


# The manifest -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """One case in the directory; paths are relative to it.

    kernels: the directory of kernels.json and the objects.  specs: what each kernel computes, by entry
    name, as ``patterns.contracts.RowSpec.to_dict`` writes it.  report: fused, unfused, dispatches.
    """

    name: str
    vmfb: str
    weights: str
    kernels: str
    specs: Mapping[str, Any]
    report: Mapping[str, int]
    example_rows: int
    parameters: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Hold what a directory holds and with what it was made."""

    target: str
    backend: Literal["cpu", "cuda", "hip"]
    arch: str
    versions: Mapping[str, str]
    cases: tuple[Packed, ...]
    version: int = VERSION

    def save(self, directory: Path) -> None:
        (directory / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: Path) -> Manifest:
        """Raises UsageError when ``directory`` holds no manifest of this version, or files are missing."""
        path = directory / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise UsageError(
                    f"{path} has version {data['version']}, this tool reads {VERSION}: pack again"
                )
            manifest = Manifest(**{**data, "cases": tuple(Packed(**case) for case in data["cases"])})
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}; run tools/gpu/pack.py") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no manifest: {error}") from error
        manifest.check_files(directory)
        return manifest

    def check_files(self, directory: Path) -> None:
        for case in self.cases:
            files = [case.vmfb, case.weights, f"{case.kernels}/kernels.json", case.parameters]
            missing = [name for name in files if name and not (directory / name).is_file()]
            if missing:
                raise UsageError(f"{directory} is incomplete: {', '.join(missing)} missing; pack again")

    def case(self, name: str) -> Packed:
        for case in self.cases:
            if case.name == name:
                return case
        raise UsageError(f"no case {name!r} was packed; there are {', '.join(c.name for c in self.cases)}")
