"""Load a checkpoint's folder as it is stored: quantized layers keep their codes and scales.

Every tensor is mapped from its file, so what is loaded takes no memory until it is read; only what is stored
in another form than the model has it (a cast, stacked experts that are not quantized) is made, one at a time.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import QuantizedExperts
from . import formats
from .experts import check_experts
from .folder import Folder
from .schemes import Scheme
from .skeleton import Place, Skeleton

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def from_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **options: Any
) -> nn.Module:
    """Load the model of a folder with config.json and safetensors; nothing is downloaded.

    Layers that are quantized in the checkpoint become layers of ``lowering.nn`` with the very codes and
    scales.  dtype: of everything else, instead of the checkpoint's own.  options: of transformers' classes,
    such as attn_implementation.  Returns the model in evaluation mode, without gradients; its weights stay in
    their files, so the files have to stay.

    Raises CheckpointError, which names file, tensor and what was expected: a format without a layer,
    a missing or damaged file, a tensor that is missing or does not fit.
    """
    folder = Folder(path)
    plan = formats.plan(folder)
    skeleton = Skeleton(folder, dtype, options)
    loading = _Loading(folder, plan, skeleton)
    loading.quantized()
    loading.plain()
    return skeleton.finish(loading.loaded)


class _Loading:
    """One folder on its way into one model."""

    def __init__(self, folder: Folder, plan: formats.Plan | None, skeleton: Skeleton):
        self.folder, self.plan, self.skeleton = folder, plan, skeleton
        self.loaded: set[str] = set()
        """Names of the model's own parameters and buffers that have a value, or a layer, now."""
        self._schemes = [scheme for _, scheme in plan.groups] if plan else []
        self._rest = dict.fromkeys(folder.tensors)
        # {module of experts: {(parameter, part): {expert: layer}}}
        self._experts: dict[str, dict[tuple[str, int], dict[int, nn.Module]]] = defaultdict(dict)

    def quantized(self) -> None:
        """Put a layer of codes where the checkpoint has one."""
        for name in self.folder.tensors:
            weight = self._weight(name)
            if weight is not None:
                self._take(weight, self._scheme(name, weight))
        for module, layers in self._experts.items():
            self._put_experts(module, layers)

    def plain(self) -> None:
        """Fill the parameters that are no codes."""
        parts: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        places: dict[str, Place] = {}
        for name in sorted(self._rest, key=_natural):
            place = self.skeleton.place(name)
            if place is None:
                self._left_over(name)
            elif place.converter is None:
                self._fill(name, place.target, self.folder.tensor(name))
            else:
                places[place.target] = place
                parts[place.target][place.pattern or ""].append(self.folder.tensor(name))
        for target, place in places.items():
            for made, tensor in self.skeleton.convert(place, parts.pop(target)).items():
                self._fill(f"{self.folder.path}: {made}", made, tensor)

    # Quantized layers ---------------------------------------------------------------------------

    def _weight(self, name: str) -> str | None:
        """The weight whose codes ``name`` holds; None for other tensors."""
        tensors = self.folder.tensors
        for scheme in self._schemes:
            weights = (part.weight(name) for part in scheme.beside)
            if any(weight and scheme.codes.of(weight) in tensors for weight in weights):
                return None
            if scheme.codes.name and (weight := scheme.codes.weight(name)):
                return weight
        plain = [part for scheme in self._schemes if not scheme.codes.name for part in scheme.beside]
        has_parts = any(part.of(name) in tensors for part in plain)
        return name if has_parts or tensors[name].dtype in _CODES else None

    def _scheme(self, name: str, weight: str) -> Scheme:
        """How a weight is stored whose codes are ``name``."""
        scheme = self.plan.scheme(weight.removesuffix(".weight")) if self.plan else None
        if scheme is None:
            stored = self.folder.tensors[name]
            says = f"{self.plan.source.name} leaves it out" if self.plan else "nothing says how"
            raise CheckpointError(
                f"{self.folder.where(name)} is quantized ({_text(stored.dtype, stored.shape)}), but {says}; "
                "expected a 16 or 32-bit float, or a quantization_config that includes it"
            )
        return scheme

    def _take(self, name: str, scheme: Scheme) -> None:
        place = self.skeleton.place(name)
        names = [part.of(name) for part in scheme.parts]
        if place is None:
            self._left_over(*(part for part in names if part in self.folder.tensors))
            return
        module = place.target.rpartition(".")[0]
        owner = self.skeleton.model.get_submodule(module)
        if type(owner) is nn.Linear and place.converter is None:
            size = (owner.out_features, owner.in_features)
            layer = self._layer(name, scheme, self._tensors(name, scheme, size), owner.bias)
            self.skeleton.model.set_submodule(module, layer)
        else:
            self._take_expert(name, scheme, place, owner)
        self.loaded.add(place.target)
        for taken in names:
            self._rest.pop(taken, None)

    def _take_expert(self, name: str, scheme: Scheme, place: Place, owner: nn.Module) -> None:
        module, _, leaf = place.target.rpartition(".")
        self._check_joined(name, place, owner)
        count, rows, depth = self.skeleton.shape(place.target)
        parts = len(place.converter.source_patterns) if place.converter else 1
        for part in range(parts):
            self._experts[module].setdefault((leaf, part), {})
        layers = self._experts[module][leaf, place.part]
        if place.converter is not None:
            tensors = self._tensors(name, scheme, (rows // parts, depth))
            layers[place.expert or 0] = self._layer(name, scheme, tensors)
            return
        stacked = self._tensors(name, scheme, (rows, depth), count)
        for number in range(count):
            layers[number] = self._layer(name, scheme, {part: t[number] for part, t in stacked.items()})

    def _check_joined(self, name: str, place: Place, owner: nn.Module) -> None:
        """Require that ``name`` is one expert's matrix, or those of all of them."""
        shape = self.skeleton.shape(place.target)
        steps = [type(step).__name__ for step in place.converter.operations] if place.converter else []
        if len(shape) == 3 and steps in ([], ["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            check_experts(place.target.rpartition(".")[0], owner)
            return
        raise CheckpointError(
            f"{self.folder.where(name)} is quantized, and the model makes {place.target} of it, a parameter "
            f"of {type(owner).__name__}; expected the weight of an nn.Linear or of experts"
        )

    def _put_experts(self, module: str, layers: dict[tuple[str, int], dict[int, nn.Module]]) -> None:
        experts = self.skeleton.model.get_submodule(module)
        up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
        layers = {(up, 0): {}, ("down_proj", 0): {}, **layers}
        count = 0
        for (leaf, _), found in layers.items():
            count = self.skeleton.shape(f"{module}.{leaf}")[0]
            absent = [number for number in range(count) if number not in found]
            if absent:
                raise CheckpointError(
                    f"{self.folder.path}: of {module}, {leaf} of expert {absent[0]} is not quantized and "
                    f"others are; expected all {count} of them, in one format"
                )
        numbers = range(count)
        ups = [found for (leaf, _), found in sorted(layers.items()) if leaf == up]
        quantized = QuantizedExperts(
            experts,
            [[part[number] for part in ups] for number in numbers],
            [layers["down_proj", 0][number] for number in numbers],
        )
        self.skeleton.model.set_submodule(module, quantized)

    def _tensors(
        self, name: str, scheme: Scheme, size: tuple[int, int], count: int | None = None
    ) -> dict[str, Tensor]:
        """The tensors of one layer, by the name of their part, each compared with what the scheme expects."""
        self._check_whole(name, scheme, size)
        found = {}
        for part in scheme.parts:
            tensor, shapes = part.of(name), part.shapes(*size)
            shapes = shapes if count is None else tuple((count, *shape) for shape in shapes)
            stored = self.folder.tensors.get(tensor)
            wanted = f"{scheme.format}: expected {_text(part.dtypes, *shapes)}"
            if stored is None and part.optional:
                continue
            if stored is None:
                raise CheckpointError(
                    f"{self.folder.where(scheme.codes.of(name))} has no {tensor} beside it; {wanted}"
                )
            if stored.dtype not in part.dtypes or stored.shape not in shapes:
                raise CheckpointError(
                    f"{self.folder.where(tensor)} is {_text(stored.dtype, stored.shape)}; {wanted}"
                )
            found[part.name] = self.folder.tensor(tensor)
            if part is not scheme.codes and found[part.name].is_floating_point():
                _check_scale(self.folder.where(tensor), found[part.name], zero=not part.positive)
        return found

    def _check_whole(self, name: str, scheme: Scheme, size: tuple[int, int]) -> None:
        for what, length, multiple in zip(("rows", "columns"), size, scheme.whole, strict=True):
            if length % multiple:
                raise CheckpointError(
                    f"{self.folder.where(scheme.codes.of(name))}: {scheme.format}: the weight has {length} "
                    f"{what}, expected a multiple of {multiple}"
                )

    def _layer(
        self, name: str, scheme: Scheme, parts: dict[str, Tensor], bias: nn.Parameter | None = None
    ) -> nn.Module:
        try:
            return scheme.layer(parts, bias)
        except ValueError as error:
            raise CheckpointError(f"{self.folder.where(scheme.codes.of(name))}: {error}") from error

    # Everything else ----------------------------------------------------------------------------

    def _fill(self, name: str, target: str, tensor: Tensor) -> None:
        where = self.folder.where(name) if name in self.folder.tensors else name
        dtype, shape = self.skeleton.dtype(target), self.skeleton.shape(target)
        same = tensor.dtype == dtype or (tensor.dtype in _FLOATS and dtype in _FLOATS)
        if not same or tensor.shape != shape:
            raise CheckpointError(
                f"{where} is {_text(tensor.dtype, tensor.shape)}; "
                f"{target} of the model is {_text(dtype, shape)}"
            )
        parent, _, leaf = target.rpartition(".")
        owner = self.skeleton.model.get_submodule(parent)
        held = tensor.to(dtype)
        if leaf in owner._buffers:
            owner._buffers[leaf] = held
        else:
            owner._parameters[leaf] = nn.Parameter(held, requires_grad=False)
        self.loaded.add(target)

    def _left_over(self, *names: str) -> None:
        """Say that the model has no place for tensors; some are known to be nobody's."""
        if not self.skeleton.expected(names[0]):
            kind = type(self.skeleton.model).__name__
            warnings.warn(f"{self.folder.where(names[0])}: {kind} has no such tensor", stacklevel=4)
        for name in names:
            self._rest.pop(name, None)


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_scale(where: str, scale: Tensor, *, zero: bool) -> None:
    """Refuse scales that are no positive number; ``zero``: a block of zeros may have that."""
    values = scale.to(torch.float32)
    wrong = torch.nonzero(~(((values >= 0) if zero else (values > 0)) & (values < float("inf"))))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise CheckpointError(
            f"{where}: the scale at {list(place)} is {float(values[place])}; "
            f"expected finite numbers {'that are not negative' if zero else 'above zero'}"
        )


def _text(dtypes: torch.dtype | tuple[torch.dtype, ...], *shapes: Any) -> str:
    """``float32 or bfloat16 [2, 4]``."""
    several = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in several)
    return f"{names} {' or '.join(str(list(shape)) for shape in shapes)}"


def _natural(name: str) -> tuple[Any, ...]:
    """Order by numbers where a name has numbers: expert 2 before expert 10."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split("."))
