"""Eager PyTorch once more: in float64, and with its rounding errors drawn anew.

How far eager is from float64 and how far it moves when every operation is rounded a little otherwise is what
a compiled program may be away from it: that measures what a model does with an error, also where a
quantization makes a whole step of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_NARROW = (torch.float16, torch.bfloat16, torch.float32)
# They move data and round nothing; what a cast rounds has been disturbed where it was made.
_EXACT = frozenset(
    [
        "_local_scalar_dense",
        "_to_copy",
        "abs",
        "amax",
        "amin",
        "arange",
        "cat",
        "ceil",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clone",
        "constant_pad_nd",
        "copy",
        "embedding",
        "empty",
        "expand_copy",
        "flip",
        "floor",
        "full",
        "full_like",
        "gather",
        "index",
        "index_copy",
        "index_fill",
        "index_put",
        "index_select",
        "isnan",
        "lift_fresh_copy",
        "masked_fill",
        "masked_scatter",
        "max",
        "maximum",
        "min",
        "minimum",
        "nan_to_num",
        "neg",
        "new_full",
        "new_zeros",
        "ones",
        "ones_like",
        "relu",
        "repeat",
        "roll",
        "round",
        "scalar_tensor",
        "scatter",
        "select_scatter",
        "sign",
        "slice_scatter",
        "sort",
        "stack",
        "take_along_dim",
        "topk",
        "tril",
        "triu",
        "trunc",
        "where",
        "zeros",
        "zeros_like",
    ]
)

# The order of equal elements is not defined: PyTorch on the cpu takes another with each size.
_UNORDERED = ("topk", "sort")

# Of 16-bit operands: their float32 result is exact, often a tie, and there is one way to round it.
_ROUNDED_ONCE = ("add", "sub", "rsub", "mul", "div")


# Of gelu: half of what 1 + erf is off, which nearly cancels where x is negative, in eager and in ours.
_ONE_AND_ERF = 2.0**-24


class InFloat64(TorchDispatchMode):
    """Whatever would be float32 or narrower is float64; 8-bit floats stay as they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        if func.namespace == "lowering":  # these take no float64
            args = tree_map(lambda t: _cast(t, torch.float32, (torch.float64,)), args)
        return tree_map(lambda t: _cast(t, torch.float64, _NARROW), func(*args, **kwargs))


class Disturbed(TorchDispatchMode):
    """Every operation that rounds is off by a little more, up or down, relative to its result: ``noise``.

    Whole numbers stay: what computes them does so exactly.  Without noise, equal elements have another order.
    """

    def __init__(self, seed: int, noise: float) -> None:
        super().__init__()
        self.noise = noise
        product = partial(_product, overflown=(math.nan, math.inf, -math.inf)[seed % 3])
        self.otherwise = {**_OTHERWISE, "mm": product, "bmm": product}
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _UNORDERED and not self.noise:
            return self._reordered(func, args, kwargs)
        if func.is_view or func._schema.is_mutable or name in _EXACT or not self.noise:
            return func(*args, **kwargs)
        plain = func(*args, **kwargs)
        if func.namespace != "lowering" and not _has_floats(plain):
            return plain
        if name in _ROUNDED_ONCE and plain.dtype.itemsize == 2:
            return plain
        wide = tree_map(lambda t: self._moved(_cast(t, torch.float32, _NARROW)), (args, kwargs))
        try:
            found = self.otherwise.get(name, func)(*wide[0], **wide[1])
        except (RuntimeError, ValueError):  # an operation of one dtype
            return tree_map(self._moved, plain)
        if name == "gelu":
            x = wide[0][0]
            found = found + _finite(x) * _ONE_AND_ERF * self._signs(x.shape)
        return tree_map(lambda new, old: _narrowed(self._moved(new), old), found, plain)

    def _reordered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The values and indices of a sort or top-k of the elements in another order."""
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        x, axis = given["self"], given.get("dim", -1)
        if x.dim() == 0 or given.get("stable"):
            return func(*args, **kwargs)
        order = torch.rand(x.shape, generator=self.generator).argsort(axis)
        values, index = func(**{**given, "self": x.gather(axis, order)})
        return values, order.gather(axis, index)

    def _moved(self, value: Any) -> Any:
        """``value``, each element moved where it is a float."""
        if not isinstance(value, torch.Tensor) or value.dtype not in (*_NARROW, torch.float64):
            return value
        moved = (value * (1 + self._signs(value.shape) * self.noise)).to(value.dtype)
        return torch.where(value == value.round(), value, moved)

    def _signs(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=self.generator) * 2 - 1


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """Without the cancellation where x is negative."""
    if approximate == "tanh":
        return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * torch.erfc(-x * math.sqrt(0.5))


def _layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean first, then the squares of what is left: they overflow elsewhere than in one pass."""
    axes = list(range(-len(shape), 0))
    mean = x.mean(axes, keepdim=True)
    scale = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + eps)
    value = (x - mean) * scale
    value = value if weight is None else value * weight
    return value if bias is None else value + bias, mean, scale


def _product(x: torch.Tensor, y: torch.Tensor, overflown: float) -> torch.Tensor:
    """In float64; ``overflown`` where a sum in float32 overflows on its way or not, which its order decides.

    An infinite element decides its sums by itself, whatever their order, unless the others overflow.
    """
    x, y = x.double(), y.double()
    largest = _finite(x).abs() @ _finite(y).abs()
    return torch.where(largest > torch.finfo(torch.float32).max, overflown, x @ y).float()


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isfinite(), x, 0.0)


# What eager does inside one operation, in another way.
_OTHERWISE = {"gelu": _gelu, "native_layer_norm": _layer_norm}


def _cast(value: Any, to: torch.dtype, of: Iterable[torch.dtype]) -> Any:
    return value.to(to) if isinstance(value, torch.Tensor) and value.dtype in of else value


def _narrowed(new: Any, old: Any) -> Any:
    return new.to(old.dtype) if isinstance(old, torch.Tensor) else new


def _has_floats(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(t, torch.Tensor) and t.dtype in _NARROW for t in values)


@contextmanager
def flushing() -> Iterator[None]:
    """Denormals are zero, on one thread since each has a setting of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def without_denormals(t: torch.Tensor) -> torch.Tensor:
    """A copy with zeros in their place, for functions that do without the processor's setting.

    Those of float16 are none: they are ordinary numbers of float32, which it is computed in.
    """
    if t.dtype not in (torch.float32, torch.bfloat16):
        return t.clone()
    return torch.where(t.abs() < torch.finfo(torch.float32).tiny, t * 0, t)


def in_float64(module: Callable[..., Any], args: Iterable[Any]) -> list[torch.Tensor] | None:
    """The results in float64, None where the module takes none (it looks at bits)."""
    try:
        with torch.no_grad(), InFloat64():
            return list(module(*(_cast(a, torch.float64, _NARROW) for a in args)))
    except (RuntimeError, ValueError):
        return None


def disturbed(module: Callable[..., Any], args: Iterable[Any], seed: int, noise: float) -> list[torch.Tensor]:
    """The results with other rounding errors."""
    with torch.no_grad(), Disturbed(seed, noise):
        return list(module(*args))
