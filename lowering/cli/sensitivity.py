"""Measure, on the model itself, how far apart two right evaluations of it may be.

A compiled program adds in another order than eager PyTorch, and its exp is another one: the last bit of a
float32 differs here and there.  What becomes of that bit depends on the model.  It is lost in most; in a
quantized one it moves a value by a whole fp8 step when that lies on a rounding boundary, and a router may
choose another expert.  No constant says how much is legitimate, so the model is evaluated

- as eager does it, with the results of every operation whose last bit is open moved by what another order of
  summation would move them, a few times (``nudged``), and
- with those operations computed in float64 and rounded once, to the type the graph says (``exact``); every
  rounding the model asks for is kept.

Operations that are exact given their operands (casts, quantizations, products and quotients of elements,
views) are left as they are, which is why a rounding that a program leaves out, or one too many, is not
excused.  The weights are not copied as a whole: the operands of one operation at a time are widened, and none
that takes more than ``_WIDENED`` bytes then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_WIDENED = 1 << 30
"""Bytes in float64 beyond which an operand is not widened: eager's own result stands for the exact one."""

# By the name of the operation without its overload.  Sums, in any order:
_SUMS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul", "einsum"),
    *(
        "sum",
        "mean",
        "nansum",
        "var",
        "var_mean",
        "std",
        "std_mean",
        "cumsum",
        "cumprod",
        "prod",
        "logcumsumexp",
    ),
    *("linalg_vector_norm", "norm", "convolution", "_convolution", "conv1d", "conv2d", "conv3d"),
    *("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "logsumexp"),
    *("native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "rms_norm", "_fused_rms_norm"),
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_grouped_mm"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_mm"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math", "_scaled_grouped_mm"),
    *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "bilinear", "index_add"),
    *("scatter_add", "scatter_reduce", "upsample_bilinear2d", "_weight_norm", "cdist", "_trilinear"),
}
# Functions whose last bit depends on the library; a sum of two products is one where it is contracted.
_FUNCTIONS = {
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh"),
    *(
        "asin",
        "acos",
        "atan",
        "atan2",
        "erf",
        "erfc",
        "erfinv",
        "sigmoid",
        "log_sigmoid_forward",
        "silu",
        "gelu",
    ),
    *("softplus", "mish", "elu", "celu", "selu", "rsqrt", "pow", "lgamma", "digamma", "logit", "xlogy"),
    *("add", "sub", "rsub", "addcmul", "addcdiv", "lerp", "hardswish", "hardsigmoid"),
}

# Another order moves a sum by a few units in the last place of what is summed up, for which the elements
# beside it stand; a function by one of its own.
_SUM_MOVES = 2.0**-22
_FUNCTION_MOVES = 2.0**-24

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MANTISSA = {torch.bfloat16: 8, torch.float16: 11}


class _Mode(TorchDispatchMode):
    """Lets every operation run, and replaces the float results of those whose last bit is open."""

    def __init__(self, change: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]):
        super().__init__()
        self._change = change
        self.unsorted: set[int] = set()
        """The k of every top-k whose order the model leaves open."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        name = _name(func)
        if name == "topk" and _argument(func, args, kwargs, "sorted") is False:
            self.unsorted.add(int(_argument(func, args, kwargs, "k")))
        if func._schema.is_mutable or not _is_open(func, name):
            return results
        return self._change(func, args, kwargs, results)


def nudged(seed: int, times: float = 1.0) -> _Mode:
    """Evaluates a model with other last bits; ``seed`` says which, and they move ``times`` as far."""
    generator = torch.Generator().manual_seed(seed)

    def change(func: Any, args: Any, kwargs: Any, results: Any) -> Any:
        moves, is_sum = (_SUM_MOVES, True) if _name(func) not in _FUNCTIONS else (_FUNCTION_MOVES, False)
        return _over_floats(results, lambda result: _moved(result, times * moves, is_sum, generator))

    return _Mode(change)


def exact() -> _Mode:
    """Evaluates a model with sums and functions in float64, each rounded once to the type it has."""
    return _Mode(_widened)


def plain() -> _Mode:
    """Evaluates a model as it is, and looks on."""
    return _Mode(lambda func, args, kwargs, results: results)


def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def _is_open(func: Any, name: str) -> bool:
    """Tell whether the last bit of its results is open; also in another library, unless it quantizes."""
    if func.namespace == "aten":
        return name in _SUMS or name in _FUNCTIONS
    return func.namespace not in ("prim", "prims") and "quant" not in name


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            given = args[position] if position < len(args) else argument.default_value
            return kwargs.get(name, given)
    return None


def _over_floats(results: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def changed(leaf: Any) -> Any:
        return change(leaf) if type(leaf) is Tensor and leaf.dtype in _FLOATS and leaf.numel() else leaf

    return pytree.tree_map(changed, results)


def _moved(result: Tensor, moves: float, is_sum: bool, generator: torch.Generator) -> Tensor:
    wide = result.to(torch.float64 if result.dtype == torch.float64 else torch.float32)
    size = wide.abs()
    if is_sum and wide.dim():
        finite = size.nan_to_num(0.0, 0.0, 0.0)
        size = torch.maximum(size, finite.square().mean(-1, keepdim=True).sqrt())
    by = size * (moves * (2.0**-29 if result.dtype == torch.float64 else 1.0)) * _uniform(wide, generator)
    if result.dtype in _MANTISSA:
        # Where in its rounding interval the value was is not known any more: anywhere.
        unit = torch.ldexp(torch.ones_like(wide), torch.frexp(wide)[1] - _MANTISSA[result.dtype])
        inside = 0.5 * unit * _uniform(wide, generator)
        by = torch.where(((inside + by).abs() > 0.5 * unit) & wide.isfinite(), unit * by.sign(), 0.0)
    return torch.where(by.isfinite(), wide + by, wide).to(result.dtype)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers between -1 and 1."""
    return (2 * torch.rand(like.shape, generator=generator, dtype=like.dtype) - 1).to(like.device)


def _widened(func: Any, args: Any, kwargs: Any, results: Any) -> Any:
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if func.namespace != "aten" or any(not _can_widen(x) for x in leaves):
        return results

    def wide(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dtype in _FLOATS:
            return leaf.to(torch.float64)
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _FLOATS else leaf

    try:
        computed = func(*pytree.tree_map(wide, args), **pytree.tree_map(wide, kwargs))
    except (RuntimeError, NotImplementedError, TypeError):  # one that has no float64 form
        return results
    return pytree.tree_map(_rounded, computed, results)


def _can_widen(tensor: Tensor) -> bool:
    plain_type = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return plain_type and tensor.dtype.itemsize > 1 and tensor.numel() * 8 <= _WIDENED


def _rounded(computed: Any, result: Any) -> Any:
    if not isinstance(result, Tensor) or result.dtype not in _FLOATS:
        return result
    return computed.to(result.dtype) if computed.shape == result.shape else result


# The model's own state --------------------------------------------------------------------------


@contextmanager
def state_kept(module: torch.nn.Module) -> Iterator[None]:
    """Put back what a model writes into its parameters and buffers while the block runs.

    A tensor is copied just before it is first written, so what a model only reads is never copied.
    """
    with _Journal(module) as journal:
        yield
    journal.restore()


class _Journal(TorchDispatchMode):
    def __init__(self, module: torch.nn.Module):
        super().__init__()
        held = [*module.parameters(), *module.buffers()]
        self._held = {
            _memory(tensor): tensor for tensor in held if type(tensor) in (Tensor, torch.nn.Parameter)
        }
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and type(leaf) in (Tensor, torch.nn.Parameter):
                    self._keep(leaf)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> None:
        held = self._held.pop(_memory(tensor), None)
        if held is not None:
            self._before.append((held, held.detach().clone()))

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, before in self._before:
                tensor.copy_(before)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
