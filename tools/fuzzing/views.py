"""Steps that move data: views with several dynamic sizes, slices, concatenations, expansions."""

from __future__ import annotations

from .graph import Step
from .scope import Scope, Value


def _deep(v: Value) -> bool:
    return v.rank >= 2


def reshaped(s: Scope) -> Step:
    """Axes joined and split."""
    x, out = s.pick(_deep), s.out()
    last = x.last
    parts = [k for k in (2, 4, 8, 32) if last and last % k == 0 and last > k]
    options = [
        "{x}.flatten(0, 1)",
        "{x}.reshape(-1)",
        "{x}.flatten(-2)",
        "{x}.unsqueeze(0)",
        "{x}[..., None]",
    ]
    if last:
        options += [f"{{x}}.reshape(-1, {last})", f"{{x}}.contiguous().view(-1, {last})"] * 2
    if parts:
        k = s.choice(parts)
        options += [
            f"{{x}}.unflatten(-1, ({k}, -1))",
            f"{{x}}.unflatten(-1, (-1, {k}))",
            f"{{x}}.reshape(*{{x}}.shape[:-1], {last // k}, {k})",
            f"{{x}}.reshape({{x}}.shape[0], -1, {k})",
            f"{{x}}.reshape(-1, {k})",
            f"{{x}}.reshape({{x}}.shape[0], {{x}}.shape[1], -1, {k}).transpose(1, 2)",
            f"{{x}}.unflatten(-1, ({k}, -1)).movedim(-2, 0).flatten(1, 2)",
            f"{{x}}.unflatten(-1, (-1, {k})).transpose(-3, -2).reshape({{x}}.shape[0], -1, {last})",
            f"{{x}}.unflatten(-1, (-1, {k})).transpose(-3, -2).reshape(-1, {last // k})",
        ]
    if x.rank >= 3:
        options += ["{x}.flatten(0, 2)", "{x}.reshape({x}.shape[0] * {x}.shape[1], -1)", "{x}.flatten(1)"]
    return Step(f"{out} = {s.choice(options).format(x=x)}", (out,))


def permuted(s: Scope) -> Step:
    """Axes in another order."""
    x, out = s.pick(_deep), s.out()
    order = list(range(x.rank))
    s.random.shuffle(order)
    options = [f"{x}.transpose(-1, -2)", f"{x}.permute({order})", f"{x}.transpose(0, 1)"]
    options += [f"{x}.movedim(0, -1)", f"{x}.mT", f"{x}.permute({order}).contiguous()"]
    return Step(f"{out} = {s.choice(options)}", (out,))


def unit(s: Scope) -> Step:
    """Axes of size one, added and taken."""
    x, out = s.pick(lambda v: 1 <= v.rank <= 4), s.out()
    axis = s.random.randrange(-x.rank - 1, x.rank + 1)
    options = [f"{x}.unsqueeze({axis})", f"{x}.unsqueeze({axis}).expand(*{_expanded(x, axis)})"]
    if 1 in x.sizes:
        options += [f"{x}.squeeze({x.sizes.index(1)})", f"{x}.squeeze({x.sizes.index(1) - x.rank})"]
    return Step(f"{out} = {s.choice(options)}", (out,))


def _expanded(x: Value, axis: int) -> str:
    sizes = ["-1"] * x.rank
    sizes.insert(axis if axis >= 0 else axis + x.rank + 1, "3")
    return f"({', '.join(sizes)})"


def sliced(s: Scope) -> Step:
    """A part of one axis, a dynamic one too."""
    x, out = s.pick(lambda v: v.rank >= 1), s.out()
    axis = s.axis(x)
    least = min(t.shape[axis] for t in x.tensors)
    if least < 2:
        return Step(f"{out} = {x}.select({axis}, 0)", (out,))
    options = [f"{x}.select({axis}, {s.choice([0, -1, 1])})"]
    before = ":, " * (axis % x.rank)
    size = x.sizes[axis]
    cuts = [":2", "-2:", "-1:"]
    if size or least >= 5:  # what may be of size one torch.export refuses
        cuts += ["1:", ":-1", "::2", "1::3", "1:-1"]
    if size:
        cuts += [f":{least + 9}", f"-{least + 9}:"]
        options.append(f"{x}.narrow({axis}, 1, {least - 1})")
    options += [f"{x}[{before}{cut}]" for cut in cuts]
    if size and size % 2 == 0:
        options += [
            f"{x}.chunk(2, {axis})[1]",
            f"{x}.split({size // 2}, {axis})[0]",
            f"{x}.unbind({axis})[1]",
        ]
    return Step(f"{out} = {s.choice(options)}", (out,))


def joined(s: Scope) -> Step:
    """Two tensors, or one repeated, rolled, turned round, padded."""
    x, out = s.pick(lambda v: v.rank >= 1), s.out()
    y = s.pick(x.like, lambda v: v.dtype == x.dtype)
    axis = s.axis(x)
    options = [
        f"torch.cat([{x}, {y}], {axis})",
        f"torch.stack([{x}, {y}], {axis})",
        f"{x}.roll(1, {axis})",
        f"{x}.flip({axis})",
        f"{x}.repeat_interleave(2, {axis})",
        f"{x}.repeat({', '.join(['2', *['1'] * (x.rank - 1)])})",
    ]
    if x.rank >= 2:
        options += [f"F.pad({x}, (1, 2))", f"torch.tril({x})", f"F.pad({x}, (0, 0, 1, 0), value=0.5)"]
    if x.last and x.last % 2 == 0:
        h = x.last // 2
        options.append(f"torch.cat([-{x}[..., {h}:], {x}[..., :{h}]], -1)")
    return Step(f"{out} = {s.choice(options)}", (out,))


STEPS = ((4, reshaped), (2, permuted), (2, unit), (3, sliced), (2, joined))
