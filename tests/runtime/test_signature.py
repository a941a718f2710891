"""What a program says of its arguments and results, as JSON; sizes as expressions; the host's name."""

from __future__ import annotations

import json

import pytest

from lowering.signature import (
    Constant,
    Parameters,
    Signature,
    TensorSpec,
    holds,
    host_arch,
    missing_on_host,
    resolve,
    solve,
)
from tests.small_programs import signature


def test_signatures_survive_json():
    said = signature(
        (TensorSpec("x", "bfloat16", ("s0", 7168)), Constant(1.5), Constant(None)),
        (TensorSpec("s", "float32", ("2*s0", 56), "column_tma"), TensorSpec("q", "float8_e4m3fn", None)),
        input_tree="[1, {}]",
        parameters=Parameters("model", "abc"),
        placed=((0,), (1,)),
        conditions=("2 <= s0 <= 16",),
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


def test_a_signature_of_an_earlier_release_is_read():
    data = json.loads(signature((TensorSpec("x", "float32", ("s0",)),)).to_json())
    for field in ("placed", "conditions"):
        del data[field]
    old = Signature.from_json(json.dumps({**data, "version": 1}))
    assert old.conditions == () and old.placed == () and old.version == 1
    with pytest.raises(ValueError, match="its signature has version 99"):
        Signature.from_json(json.dumps({**data, "version": 99}))


def test_conditions_on_sizes():
    symbols = {"s0": 6, "s1": 4}
    for text in (
        "2 <= s0 <= 6",
        "s0 % 3 == 0 and not s0 == s1",
        "Mod(s0, 2) == 0",
        "Max(1, s0 - s1) == 2",
        "Ne(s0, 1)",
    ):
        assert holds(text, symbols) is True, text
    for text in ("2 <= s0 < 6", "s0 == s1 or s0 != 6", "Eq(s0, -6)", "s0*s1 > 24"):
        assert holds(text, symbols) is False, text
    for text in ("s2 > 1", "exit(s0)", "s0 // 0 == 1", "s0 is s1", "s0 <"):
        assert holds(text, symbols) is None, text


def test_a_size_gives_its_symbol_a_value():
    assert solve("2*s0 + 1", 7, {}) == solve("2*s0 + 1", 8, {}) == {"s0": 3}
    assert solve("s0*s1", 12, {"s0": 3}) == {"s1": 4}
    for dim in ("s0*s1", "7", "s0 - s0", "s0 //"):
        assert solve(dim, 12, {}) == {}


def test_host_arch():
    assert missing_on_host(host_arch()) is None
    assert missing_on_host("native") is None
