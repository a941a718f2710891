"""Operations that are written with others when a model is imported: their values, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering


class Results(nn.Module):
    """What several functions give, in one program."""

    def __init__(self, functions: Sequence[Callable[..., object]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, *args: Tensor) -> list[object]:
        return [function(*args) for function in self.functions]


def check(functions: Sequence[Callable[..., object]], *args: Tensor) -> None:
    """Compare with eager PyTorch within what torch.testing allows: sums in another order."""
    model = Results(functions)
    program = lowering.load(lowering.compile(model, args).vmfb)
    for number, (ours, eager) in enumerate(zip(program(*args), model(*args), strict=True)):
        torch.testing.assert_close(ours, eager, equal_nan=True, msg=lambda m, n=number: f"result {n}: {m}")


def test_signs_medians_and_running_logarithms() -> None:
    x, y = torch.randn(2, 6, 7)
    x[0, 0], x[1, 2], y[2] = -0.0, torch.nan, -0.0
    functions = [
        lambda x, y: torch.signbit(x),
        lambda x, y: torch.signbit(F.leaky_relu(x, 0.1)),
        torch.copysign,
        lambda x, y: torch.copysign(x, -2.0),
        lambda x, y: torch.copysign(x, y[0, 0]),
        lambda x, y: torch.angle(x),
        lambda x, y: torch.hypot(x * 1e30, y * 1e30),
        lambda x, y: tuple(x.median(1)),
        lambda x, y: tuple(x.median(0, keepdim=True)),
        lambda x, y: tuple(x.nanmedian(1)),
        lambda x, y: y.median(),
        lambda x, y: (y * 300).logcumsumexp(0),  # one running sum of exponentials would overflow
        lambda x, y: y[:, 0].addmv(y, y[0]),
        lambda x, y: torch.dist(y, y * 2),
        lambda x, y: y[0, 0].gather(0, torch.zeros(1, dtype=torch.long)),
        lambda x, y: y[0, 0].view(torch.int32),
    ]
    check(functions, x, y)


def test_reductions_at_indices_and_bags_of_embeddings() -> None:
    x, source = torch.randn(2, 6, 5)
    index, wide = torch.tensor([0, 2, 2, 5, 0, 3]), torch.randint(0, 6, (3, 5))
    offsets, weights = torch.tensor([0, 2, 2, 4]), torch.rand(6)
    functions: list[Callable[..., object]] = [
        *(lambda x, s, i, w, o, p, r=r: x.index_reduce(0, i, s, r) for r in ("mean", "prod", "amax")),
        lambda x, s, i, w, o, p: x.index_reduce(0, i, s, "amin", include_self=False),
        *(lambda x, s, i, w, o, p, r=r: x.scatter(0, w, s, reduce=r) for r in ("add", "multiply")),
        lambda x, s, i, w, o, p: x.scatter(0, w, 2.5, reduce="add"),
        lambda x, s, i, w, o, p: x.put(w.flatten(), s.flatten()[:15], accumulate=True),
        lambda x, s, i, w, o, p: F.embedding_bag(i, x, o, mode="sum", per_sample_weights=p),
        *(lambda x, s, i, w, o, p, m=m: F.embedding_bag(i, x, o, mode=m) for m in ("mean", "max")),
        lambda x, s, i, w, o, p: F.embedding_bag(i, x, o, mode="sum", padding_idx=2),
        lambda x, s, i, w, o, p: F.embedding_bag(i, x, o, mode="sum", include_last_offset=True),
        lambda x, s, i, w, o, p: F.embedding_bag(w % 6, x, mode="mean"),
    ]
    check(functions, x, source, index, wide, offsets, weights)


def test_pools_samples_of_grids_and_transposed_convolutions() -> None:
    x, weight = torch.randn(2, 4, 9, 10), torch.randn(4, 2, 3, 2)
    functions: list[Callable[..., object]] = [
        lambda x, w: F.max_pool2d(x, (3, 2), 2, (1, 0), (1, 2), ceil_mode=True, return_indices=True),
        lambda x, w: F.max_pool2d(x[0], 3, 2, ceil_mode=True),
        lambda x, w: F.max_pool2d(x[:, :, :3], 3, 2, ceil_mode=True),
        lambda x, w: F.max_pool1d(x[0, 0][None], 2),
        lambda x, w: F.adaptive_max_pool2d(x[0], 3),
        lambda x, w: F.adaptive_avg_pool2d(x, (5, 7)),
        lambda x, w: F.grid_sample(x, x[:, :2].tanh().permute(0, 2, 3, 1), align_corners=False),
        lambda x, w: F.conv_transpose2d(x, w, None, (2, 3), (1, 0), (1, 2), 2),
        lambda x, w: F.conv_transpose2d(x, w, None, 1, 1, 0, 2, (2, 1)),
        lambda x, w: F.conv_transpose1d(x[0, :, 0], w[:, :, 0], w[0, 0, 0].repeat(2), 3, 1, 2, 2, 4),
    ]
    check(functions, x, weight)


def with_elements(x: Tensor, key: tuple[object, ...], values: Tensor | float) -> Tensor:
    x = x.clone()
    x[key] = values  # pyright: ignore[reportArgumentType]
    return x


def test_fake_quantizations_and_updates_at_separated_axes() -> None:
    x, scale, zero = torch.randn(4, 6, 5) * 3, torch.rand(6) / 8 + 0.02, torch.randint(-3, 4, (6,))
    i, j = torch.tensor([3, 0, 1]), torch.tensor([4, 2, 0])
    functions: list[Callable[..., object]] = [
        lambda x, s, z, i, j: torch.fake_quantize_per_tensor_affine(x, 0.05, 3, -128, 127),
        lambda x, s, z, i, j: torch.fake_quantize_per_tensor_affine(x, s[0], z[0], 0, 255),
        lambda x, s, z, i, j: torch.fake_quantize_per_channel_affine(x, s, z, 1, -8, 7),
        lambda x, s, z, i, j: with_elements(x, (i, slice(None), j), x[:3, :, 0]),
        lambda x, s, z, i, j: with_elements(x, (i[:, None], slice(None), j), 2.0),
        lambda x, s, z, i, j: with_elements(x[None], (0, i, slice(1, 4), j), x[:3, :3, 0]),
        lambda x, s, z, i, j: with_elements(x[None], (i * 0, slice(None), i, j), x[:3, :4, 0]),
    ]
    check(functions, x, scale, zero.to(torch.int32), i, j)


class Split(nn.Module):
    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        return torch.tensor_split(x, at)


def test_an_element_of_a_slice_that_is_a_number() -> None:
    x, at = torch.arange(10.0), torch.tensor([2, 5])
    program = lowering.load(lowering.compile(Split(), (x, at)).vmfb)
    assert all(map(torch.equal, program(x, at), torch.tensor_split(x, at)))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x.to_sparse(), "torch.sparse_coo"),
        (lambda x: x.to_sparse_csr(), "torch.sparse_csr"),
        (lambda x: x.to(torch.uint16), "torch.uint16"),
    ],
)
def test_tensors_without_a_type_are_refused_with_their_line(
    function: Callable[[Tensor], Tensor], what: str
) -> None:
    with pytest.raises(lowering.CompileError, match=rf"test_decompositions.py:\d+: .*{what}, which cannot"):
        lowering.compile(Results([function]), (torch.randn(3, 4),))
