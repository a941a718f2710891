"""What a program says of its arguments and results, as JSON; sizes as expressions; the host's name."""

from __future__ import annotations

import pytest
from small_programs import signature

from lowering.signature import (
    Constant,
    Parameters,
    Signature,
    TensorSpec,
    host_arch,
    missing_on_host,
    resolve,
)


def test_signatures_survive_json():
    said = signature(
        (TensorSpec("x", "bfloat16", ("s0", 7168)), Constant(1.5), Constant(None)),
        (TensorSpec("s", "float32", ("2*s0", 56), "column_tma"), TensorSpec("q", "float8_e4m3fn", None)),
        input_tree="[1, {}]",
        parameters=Parameters("model", "abc"),
        placed=((0,), (1,)),
    )
    assert Signature.from_json(said.to_json()) == said
    assert Signature.from_json(signature().to_json()) == signature()
    for text in ("", "[]", "{}", '{"version": 1}'):
        with pytest.raises(ValueError, match="signature cannot be read"):
            Signature.from_json(text)


def test_unknown_strides_are_refused():
    said = signature((), (TensorSpec("s", "float32", (4, 2), "column"),)).to_json()
    with pytest.raises(ValueError, match="its signature names the unknown strides 'swizzled'"):
        Signature.from_json(said.replace('"column"', '"swizzled"'))


def test_sizes():
    symbols = {"s0": 6, "s1": 4}
    assert [resolve(d, symbols) for d in (3, None, "s0", "s2", "s0*s1 - 1", "(s0 + 3)//4*4", "s0 % 4")] == [
        3, None, 6, None, 23, 8, 2,
    ]  # fmt: skip
    for other in ("__import__('os')", "s0//0", "Mod(s0, 2)", "s0 +"):
        assert resolve(other, symbols) is None


def test_host_arch():
    assert missing_on_host(host_arch()) is None
    assert missing_on_host("native") is None
