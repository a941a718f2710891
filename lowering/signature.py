"""Write down what a compiled function takes and returns, as JSON inside the program.

The compiler writes one ``Signature`` per exported function, under ``SIGNATURE_KEY`` of its
``iree.reflection``; the runtime checks every call against it.  Both sides import this module, so
it needs nothing but the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
import platform
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

SIGNATURE_KEY = "vmfuse.signature"
PARAMETER_SCOPE = "model"
VERSION = 4

ASYNC = "$async"
"""After the name of a function: its twin that takes fences, which IREE's torch pipeline makes."""
INTO = "$into"
"""After the name of a function: the one that writes into memory of the caller's (``lowering.storage``)."""
SCRATCH_SIZE = ASYNC + "_transients_size"
"""After that: how many bytes of scratch memory it takes; it has the arguments of the twin."""
INITIAL = "state$initial"
"""The function that returns the initial values of ``Signature.stored``."""

RESERVED = (
    *("functions", "session", "state", "state_dict", "reset", "save", "load", "close"),
    INITIAL.partition("$")[0],
)
"""What no function of a program may be called: what programs have themselves."""

Dim = int | str | None
"""A size; a symbol or an expression of symbols in ``+ - * // % **``; None: whatever it is."""

Symbols = dict[str, int]

Strides = Literal["column", "column_tma", "ue8m0_packed"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor argument or result.

    dtype: torch's name, 'bfloat16'.  shape: None when even the rank is unstated; the same symbol
    has the same value in every shape of a signature.
    strides (results only), a column-major scale layout: the program returns the physical buffer, [S, M] for
    ``column`` and [S, Mp], Mp = M rounded up to 4, for ``column_tma`` and ``ue8m0_packed``; ``shape`` is the
    logical one, leading dims of product M + (S,), and each of the leading sizes follows from the arguments'
    symbols.  S is the groups in a row, for ``ue8m0_packed`` (dtype int32) the groups of four of them.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None
    strides: Strides | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a tensor all of whose sizes are known."""
        return tuple(size for size in self.shape or () if isinstance(size, int))

    def __str__(self) -> str:
        sizes = "..." if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.dtype}[{sizes}]"


@dataclass(frozen=True)
class Constant:
    """A leaf of the argument or result tree that is no tensor: its value was burned in."""

    value: int | float | bool | str | None


@dataclass(frozen=True)
class Parameters:
    """The parameter archive a program needs: its scope, and ``parameter_digest`` of the file."""

    scope: str
    digest: str


@dataclass(frozen=True)
class Integer:
    """An int argument that differs between calls, or an int result; ``size``: what it is in terms of symbols.

    An argument is passed to the program as it is, a result is computed by the caller and not returned.
    Since version 3.
    """

    name: str
    size: str

    def __str__(self) -> str:
        return "int"


Leaf = TensorSpec | Integer | Constant


@dataclass(frozen=True)
class Written:
    """A tensor that is passed to a program and has a new value after the call.

    argument: its number among what is passed, the state behind the arguments.  result: the number, among the
    tensors that are returned, of the new value; None where it is written into the argument's memory.
    """

    argument: int
    result: int | None = None


@dataclass(frozen=True)
class Signature:
    """One exported function.

    target, backend, arch: as in ``lowering.targets``; for the cpu, ``arch`` is ``host_arch()`` of the
    machine whose instructions are used, or 'native' or '' when nothing is to be checked.
    inputs, outputs: one entry per leaf of the trees, in order; None when unstated (no checks; every
    result is returned as the runtime describes it).
    input_tree, output_tree: ``torch.utils._pytree.treespec_dumps`` of ``(args, kwargs)`` and of the
    result; None: the arguments are the leaves, the result is a flat tuple, or bare if there is one.
    placed: of the entry point that writes into memory of the caller's (``lowering.storage``): for each buffer
    the tensors of the result, by number, that it holds, several where one is returned several times.  Empty
    where there is no such entry point, as in programs of earlier releases.
    conditions: what holds for the sizes that the model was exported for, such as ``2 <= s0 <= 16`` or
    ``s0 % 8 == 0``; a call with others is refused.  Since version 2.
    state: the tensors that live from call to call, passed behind the arguments; their names are the same in
    all functions of a program.  stored: the names of those that begin as other than zeros, as the function
    ``INITIAL`` returns them.  written: what a call gives new values; those that are returned are behind the
    results.  checks: what the model asserts of values, each named by what is said where it does not hold;
    they are the last that is returned.  Since version 4.
    """

    target: str
    backend: str
    arch: str
    inputs: tuple[Leaf, ...] | None = None
    outputs: tuple[Leaf, ...] | None = None
    input_tree: str | None = None
    output_tree: str | None = None
    parameters: Parameters | None = None
    placed: tuple[tuple[int, ...], ...] = ()
    conditions: tuple[str, ...] = ()
    state: tuple[TensorSpec, ...] = ()
    stored: tuple[str, ...] = ()
    written: tuple[Written, ...] = ()
    checks: tuple[TensorSpec, ...] = ()
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Signature:
        """Raises ValueError when ``text`` is no signature, or one of a later version."""
        try:
            data = json.loads(text)
            if data["version"] > VERSION:
                raise ValueError(f"its signature has version {data['version']}, this vmfuse reads {VERSION}")
            data["inputs"] = _leaves(data["inputs"])
            data["outputs"] = _leaves(data["outputs"])
            data["placed"] = tuple(map(tuple, data.get("placed", ())))
            data["conditions"] = tuple(data.get("conditions", ()))
            data["state"] = _leaves(data.get("state", []))
            data["checks"] = _leaves(data.get("checks", []))
            data["stored"] = tuple(data.get("stored", ()))
            data["written"] = tuple(Written(**item) for item in data.get("written", ()))
            data["parameters"] = Parameters(**data["parameters"]) if data["parameters"] else None
            return Signature(**{field.name: data[field.name] for field in fields(Signature)})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"its signature cannot be read ({error})") from error


def _leaves(items: list[dict[str, Any]] | None) -> tuple[Leaf, ...] | None:
    return None if items is None else tuple(_leaf(item) for item in items)


def _leaf(item: dict[str, Any]) -> Leaf:
    if "value" in item:
        return Constant(item["value"])
    if "size" in item:
        return Integer(item["name"], item["size"])
    shape = None if item["shape"] is None else tuple(item["shape"])
    if item["strides"] not in (None, *get_args(Strides)):
        raise ValueError(f"its signature names the unknown strides {item['strides']!r}")
    return TensorSpec(item["name"], item["dtype"], shape, item["strides"])


def returned_tensors(signature: Signature) -> tuple[TensorSpec, ...]:
    """The tensors that a function returns: its results, new values of what it is passed, and its checks."""
    results = tuple(leaf for leaf in signature.outputs or () if isinstance(leaf, TensorSpec))
    passed = [
        leaf for leaf in (*(signature.inputs or ()), *signature.state) if not isinstance(leaf, Constant)
    ]
    new = [passed[item.argument] for item in signature.written if item.result is not None]
    return (*results, *(leaf for leaf in new if isinstance(leaf, TensorSpec)), *signature.checks)


def known_sizes(signature: Signature) -> tuple[int, ...]:
    """The tensors that are returned, by number, whose bytes all follow from the arguments' shapes.

    None of float64, which IREE computes, and would store, in float32.
    """
    shapes = map(sizes_of, signature.inputs or ())
    symbols = {dim: 1 for shape in shapes for dim in shape if isinstance(dim, str) and dim.isidentifier()}
    return tuple(
        number
        for number, spec in enumerate(returned_tensors(signature))
        if spec.dtype != "float64"
        and spec.shape is not None
        and all(resolve(dim, symbols) is not None for dim in spec.shape)
    )


def sizes_of(leaf: Leaf) -> tuple[Dim, ...]:
    """The sizes that ``leaf`` tells: the axes of a tensor, the value of an int."""
    if isinstance(leaf, Integer):
        return (leaf.size,)
    return (leaf.shape or ()) if isinstance(leaf, TensorSpec) else ()


def sizes_are_open(leaf: Leaf) -> bool:
    """Tell whether a size of ``leaf`` may differ from call to call."""
    return any(not isinstance(dim, int) for dim in sizes_of(leaf))


# --- sizes -------------------------------------------------------------------------------------

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    # Of conditions.
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
}


_COMPARISONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

# As sympy and torch write them.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Max": max,
    "max": max,
    "Min": min,
    "min": min,
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Abs": abs,
}


def resolve(dim: Dim, symbols: Mapping[str, int]) -> int | None:
    """The value of ``dim``; None when it is unstated or names a symbol that has no value."""
    if isinstance(dim, int) or dim is None:
        return dim
    if dim in symbols:
        return symbols[dim]
    return _value(dim, symbols)


def holds(condition: str, symbols: Mapping[str, int]) -> bool | None:
    """Tell whether ``condition`` is true; None when it cannot be told."""
    value = evaluate(condition, symbols)
    return None if value is None else bool(value)


def evaluate(text: str, symbols: Mapping[str, int]) -> int | None:
    """The value of an expression that may have functions, such as ``Max(1, s0)``; None if it has none."""
    return _value(text, {**_FUNCTIONS, **symbols})


def _value(text: str, names: Mapping[str, Any]) -> int | None:
    try:
        return _evaluate(ast.parse(text, mode="eval").body, names)
    except (KeyError, SyntaxError, ZeroDivisionError):
        return None


def names_in(dim: Dim) -> set[str]:
    """The symbols of a size or a condition; none if it cannot be read."""
    try:
        tree = ast.parse(str(dim), mode="eval")
    except SyntaxError:
        return set()
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}


def solve(dim: Dim, size: int, symbols: Mapping[str, int]) -> Symbols:
    """The value of the one symbol of ``dim`` that ``symbols`` lacks, if ``dim`` is a multiple of it and more.

    Empty where that is not so.  Where no value fits, 15 for ``2*s0``, it is the nearest below.
    """
    unknown = names_in(dim) - set(symbols) - {"None"}
    if len(unknown) != 1:
        return {}
    (name,) = unknown
    base, step = resolve(dim, {**symbols, name: 0}), resolve(dim, {**symbols, name: 1})
    if base is None or step is None or step == base:
        return {}
    return {name: (size - base) // (step - base)}


def _evaluate(node: ast.expr, symbols: Mapping[str, Any]) -> int:
    """Raises KeyError for anything but integers, known names, their arithmetic, comparisons and calls."""
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_evaluate(node.left, symbols), _evaluate(node.right, symbols))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return symbols[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        value = _evaluate(node.operand, symbols)
        return -value if isinstance(node.op, ast.USub) else not value
    if isinstance(node, ast.BoolOp):
        values = [bool(_evaluate(value, symbols)) for value in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare):
        values = [_evaluate(value, symbols) for value in (node.left, *node.comparators)]
        pairs = zip(node.ops, values, values[1:], strict=False)
        return all(_COMPARISONS[type(op)](left, right) for op, left, right in pairs)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return symbols[node.func.id](*(_evaluate(each, symbols) for each in node.args))
    raise KeyError(ast.dump(node))


# --- parameter archives ------------------------------------------------------------------------

IRPA_HEADER = struct.Struct("<4sHHQQQQ6Q")
_SAMPLES = 256
_SAMPLE_BYTES = 4096


def parameter_digest(path: str | Path) -> str:
    """A digest of an .irpa file, cheap for any size: its index, its length, and samples of its data.

    The index of an archive written here holds the SHA-256 of every tensor, so archives of different content
    have different digests.  Of bytes that were changed in the file later, a few megabytes are looked at.
    Raises ValueError if ``path`` is no complete .irpa file, OSError if it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        data_begin = _irpa_data_offset(file, size)
        digest = hashlib.sha256(str(size).encode())
        file.seek(0)
        digest.update(file.read(data_begin))
        step = max(_SAMPLE_BYTES, (size - data_begin) // _SAMPLES)
        for offset in (*range(data_begin, size, step), max(data_begin, size - _SAMPLE_BYTES)):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _irpa_data_offset(file: BinaryIO, size: int) -> int:
    """Find where the data of the archive begins: behind its header, entries and metadata."""
    header = file.read(IRPA_HEADER.size)
    if not header.startswith(b"IRPA"):
        raise ValueError("it is not an .irpa parameter archive")
    if len(header) < IRPA_HEADER.size:
        raise ValueError("it is truncated")
    offset, length = IRPA_HEADER.unpack(header)[-2:]
    if offset + length > size:
        raise ValueError(f"it is truncated: {size} bytes of {offset + length}")
    return offset


# --- the machine -------------------------------------------------------------------------------

# Instruction sets that compilers choose by themselves, where /proc/cpuinfo and LLVM agree on the
# name but for punctuation.
_VECTOR_FEATURE = re.compile(r"avx|fma|f16c|bmi2|amx|asimd|sve|i8mm|bf16")


def host_arch() -> str:
    """This machine's processor and vector instruction sets, e.g. 'x86_64+avx+avx2+fma'."""
    return "+".join((platform.machine(), *sorted(_host_features())))


def _host_features() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = match.group(1).split() if match else []
    return {_plain(word) for word in words if _VECTOR_FEATURE.match(word)}


def _plain(feature: str) -> str:
    return re.sub(r"[^a-z0-9]", "", feature.lower())


def missing_on_host(arch: str) -> str | None:
    """Name what this machine lacks for code of ``arch`` (a ``host_arch()`` or LLVM's); None if nothing."""
    machine, *features = arch.split("+")
    if machine in ("", "native"):
        return None
    if machine != platform.machine():
        return f"a {machine} processor (this is {platform.machine()})"
    present = _host_features()
    missing = [name for name in features if _VECTOR_FEATURE.match(name) and _plain(name) not in present]
    # Without /proc/cpuinfo nothing is known, and nothing is refused.
    return ", ".join(missing) if present and missing else None
