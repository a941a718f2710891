"""Open a checkpoint's folder: its configuration, its index, and tensors that stay in their files.

Everything that can be wrong with the files themselves is found here, from their headers alone, before a model
is made: a shard that is missing, a download that stopped, a pointer where a file should be.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100 << 20  # the library's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, as the file's header has it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The room it takes in its file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Folder:
    """A folder with ``config.json`` and safetensors; ``tensors`` is what the headers announce, by name.

    Raises CheckpointError naming the file that is missing, cut short or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            kind = "is a file" if self.path.exists() else "does not exist"
            raise CheckpointError(
                f"{self.path} {kind}; expected a folder with config.json and safetensors "
                "(checkpoints are read from disk and never downloaded)"
            )
        self.config = _json(self.path / "config.json")
        self.tensors = {name: stored for file in self._files() for name, stored in _header(file).items()}
        self._check_index()
        self._open: dict[Path, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped from its file: nothing is read until it is used, and nothing is copied."""
        file = self.tensors[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file].get_tensor(name)

    def where(self, name: str) -> str:
        """``FILE: NAME``, for errors about a tensor of this folder."""
        return f"{self.tensors[name].file}: {name}"

    @cached_property
    def quantization(self) -> tuple[Path, dict[str, Any]] | None:
        """What the folder says of its quantization and the file that says it; None where nothing does."""
        config = self.config
        for part in (config, config.get("text_config"), config.get("thinker_config")):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part, dict) and part.get(key):
                    return self.path / "config.json", _mapping(part[key], self.path / "config.json", key)
        beside = self.path / "hf_quant_config.json"
        if not beside.is_file():
            return None
        found = _mapping(_json(beside).get("quantization"), beside, "quantization")
        return beside, {"quant_method": "modelopt", **found}

    def _files(self) -> list[Path]:
        if not self._shards:
            files = sorted(self.path.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{self.path}: no safetensors file{self._other_weights()}")
            return files
        names = sorted(set(self._shards.values()))
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of the {len(names)} files that {_INDEX} names are missing: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
            )
        return [self.path / name for name in names]

    @cached_property
    def _shards(self) -> dict[str, str]:
        """{tensor: file} of the index; empty where there is none."""
        index = self.path / _INDEX
        if not index.is_file():
            return {}
        return _mapping(_json(index).get("weight_map"), index, "weight_map")

    def _other_weights(self) -> str:
        others = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in self.path.glob(s))
        return f" (there is {others[0]}; convert it to safetensors)" if others else ""

    def _check_index(self) -> None:
        for name, file in self._shards.items():
            if name not in self.tensors:
                raise CheckpointError(f"{self.path / file}: no tensor {name}, which {_INDEX} says is there")


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")), path, "the file")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint's folder has one") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def _mapping(value: Any, path: Path, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} is no JSON object of names and values")
    return value


def _header(path: Path) -> dict[str, Stored]:
    """What is in ``path``, after comparing its length with what its header announces."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if begin.startswith(b"version "):
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull`")
        if size < 8 or length > _LARGEST_HEADER:
            raise CheckpointError(f"{path} is no safetensors file")
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path} ends within its header: {size} bytes of at least {8 + length}")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read") from None
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path} has {size} bytes where its header announces {8 + length + end}: "
            + ("the download stopped" if size < 8 + length + end else "something was appended")
        )
    _check_readable(path)
    return {name: _stored(path, name, entry) for name, entry in entries.items()}


def _check_readable(path: Path) -> None:
    """Let the library judge the header too: overlapping tensors, sizes that fit no shape."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _stored(path: Path, name: str, entry: dict[str, Any]) -> Stored:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}, which PyTorch has not")
    return Stored(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
