"""Make the model of a checkpoint without its weights, and say where each of its tensors belongs.

The only file that knows transformers, which is an extra: its classes, the names its checkpoints had before,
what it ties and what it computes instead of storing.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .folder import Folder


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: ``target`` in the model, alone or as a part of what ``converter`` makes.

    pattern: which of the converter's sources it is.  expert: its number among tensors that are stacked.
    """

    target: str
    pattern: str | None = None
    converter: Any = None
    expert: int | None = None

    @property
    def part(self) -> int:
        """The number of its source among those that are joined."""
        return self.converter.source_patterns.index(self.pattern) if self.converter else 0


class Skeleton:
    """A model on the meta device, in the dtype of its checkpoint unless another is asked for."""

    def __init__(self, folder: Folder, dtype: torch.dtype | None, options: dict[str, Any]):
        config = _config(folder)
        with torch.device("meta"):
            self.model = _class(config, folder)._from_config(
                config, dtype=dtype or _dtype(folder, config), **options
            )
        self.model.eval().requires_grad_(False)
        self._state = self.model.state_dict()
        self._conversions = _conversions(self.model)

    def place(self, name: str) -> Place | None:
        """Where the tensor ``name`` of the checkpoint belongs; None if the model has no such place."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = self._conversions
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
        if target not in self._state:
            target, pattern = rename_source_key(name, [], [], prefix, self._state)
        if target not in self._state:
            return None
        if pattern is None:
            return Place(target)
        converter = next(c for c in converters if pattern in c.source_patterns)
        numbers = [part for part in name.split(".") if part.isdigit()]
        return Place(target, pattern, converter, int(numbers[-1]) if "*" in pattern else None)

    def dtype(self, target: str) -> torch.dtype:
        """The dtype of a parameter or buffer; some stay float32 in every model."""
        held = self._state[target].dtype
        strict = self.model._keep_in_fp32_modules_strict or ()
        lenient = self.model._keep_in_fp32_modules or ()
        kept = [*strict, *(lenient if held == torch.float16 else ())]
        narrow = held in (torch.float16, torch.bfloat16)
        return torch.float32 if narrow and any(re.search(_glob(k), target) for k in kept) else held

    def shape(self, target: str) -> torch.Size:
        """The shape of a parameter or buffer."""
        return self._state[target].shape

    def expected(self, name: str) -> bool:
        """Tell whether a tensor without a place is known to be left over, as layers for training are."""
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        return any(re.search(pattern, name) for pattern in ignored)

    def convert(self, place: Place, parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """What transformers makes of tensors that it stores in another form, by target."""
        converter = copy.deepcopy(place.converter)
        for pattern, tensors in parts.items():
            converter.collected_tensors[pattern].extend(tensors)
        made = converter.convert(place.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def finish(self, loaded: set[str]) -> nn.Module:
        """Tie what is tied, compute what no checkpoint stores, and require a value of everything."""
        model = self.model
        model.tie_weights(missing_keys=set(self._state) - loaded, recompute_mapping=False)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = not tensor.is_meta
        for name, buffer in list(model.named_non_persistent_buffers()):
            if buffer.is_meta:
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        self._check_complete()
        model.initialize_weights()
        return model

    def _check_complete(self) -> None:
        """Require a value of everything."""
        held = [*self.model.named_parameters(), *self.model.named_buffers()]
        empty = [name for name, tensor in held if tensor.is_meta]
        if empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise CheckpointError(
                f"{self.model.config.name_or_path}: the checkpoint has no tensor for {empty[0]}{more} of "
                f"{type(self.model).__name__}"
            )


def _glob(pattern: str) -> str:
    """``a.*.b`` of a model's own lists as a regex of whole names."""
    return r"(?:^|\.)" + re.escape(pattern).replace(r"\*", ".*") + r"(?:\.|$)"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "reading a checkpoint's folder needs transformers, which says what its model computes: "
            "pip install 'vmfuse[checkpoints]'"
        ) from error
    return transformers


def _config(folder: Folder) -> Any:
    """The configuration, without what it says of quantization: the layers of this project stand for that."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder.path), local_files_only=True)
    except (ValueError, KeyError, TypeError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{folder.path / 'config.json'}: transformers {transformers.__version__} makes no model of it: "
            f"{words[0]}"
        ) from error
    parts: list[Any] = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def _class(config: Any, folder: Folder) -> Any:
    """The class that ``architectures`` names."""
    transformers = _transformers()
    named = [name for name in config.architectures or () if hasattr(transformers, name)]
    if named:
        return getattr(transformers, named[0])
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    found = ", ".join(config.architectures or ()) or "none"
    raise CheckpointError(
        f"{folder.path / 'config.json'}: architectures ({found}) names no class of transformers "
        f"{transformers.__version__}; code that comes with a checkpoint is not run"
    )


def _dtype(folder: Folder, config: Any) -> torch.dtype:
    """That of the configuration, or of the first tensor that is no code."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    plain = (torch.bfloat16, torch.float16, torch.float32)
    return next((s.dtype for s in folder.tensors.values() if s.dtype in plain), torch.bfloat16)


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    found = get_model_conversion_mapping(model)
    return (
        [item for item in found if isinstance(item, WeightRenaming)],
        [item for item in found if isinstance(item, WeightConverter)],
    )
