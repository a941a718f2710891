"""Recognise a checkpoint's format by what its configuration says; one reader for each ``quant_method``.

What is known but has no layer is refused by name, with what can be done: never dequantized in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError
from . import schemes
from .folder import Folder
from .schemes import Scheme

Matches = Callable[[str], bool]
_E4M3 = torch.float8_e4m3fn
_CODES: dict[Any, torch.dtype] = {("float", 8): _E4M3, ("int", 8): torch.int8}


@dataclass(frozen=True)
class Plan:
    """Which layers of a checkpoint are quantized and how, by their names in the checkpoint.

    source: the file that says so.  groups: the first that matches a name counts.  ignored: names that are
    left as they are, whatever matches.
    """

    source: Path
    groups: tuple[tuple[Matches, Scheme], ...]
    ignored: Matches

    def scheme(self, name: str) -> Scheme | None:
        """How the layer ``name`` is stored; None if it is not quantized."""
        if self.ignored(name):
            return None
        return next((scheme for matches, scheme in self.groups if matches(name)), None)


def plan(folder: Folder) -> Plan | None:
    """Read how ``folder`` is quantized; None if it is not.

    Raises CheckpointError naming the format where this project has no layer for it.
    """
    if folder.quantization is None:
        return None
    source, config = folder.quantization
    method = str(config.get("quant_method", "")).lower()
    if method in _READERS:
        return _READERS[method](source, config)
    if method in _NO_LAYER:
        _refuse(source, _NO_LAYER[method])
    known = ", ".join(sorted(_READERS))
    raise CheckpointError(f"{source}: quant_method {method!r} is unknown; those that are read: {known}")


def _refuse(where: Path | str, what: str) -> NoReturn:
    """Refuse a format; ``where``: the file that names it, or what is quantized so."""
    subject = f"{where}: the checkpoint" if isinstance(where, Path) else where
    raise CheckpointError(
        f"{subject} is quantized as {what}, for which there is no layer yet. "
        "Load it with its own library in 16 bits and call lowering.quantize(model), which makes FP8 in "
        "blocks of it, or take a checkpoint in FP8 blocks"
    )


# quant_method "fp8" -------------------------------------------------------------------------------


def _fp8(source: Path, config: Mapping[str, Any]) -> Plan:
    """DeepSeek, Qwen, GLM, MiniMax, Mistral: weight, weight_scale_inv, and activation_scale where static."""
    block, scheme = config.get("weight_block_size"), str(config.get("activation_scheme", "dynamic"))
    if str(config.get("fmt", "e4m3")) != "e4m3":
        _refuse(source, f"FP8 of fmt {config['fmt']!r}")
    if config.get("expert_dtype", "fp8") != "fp8":
        _refuse(source, f"FP8 with experts in {config['expert_dtype']} (DeepSeek-V4)")
    if scheme not in ("dynamic", "static"):
        raise CheckpointError(f"{source}: activation_scheme {scheme!r} is neither 'dynamic' nor 'static'")
    scale_format = config.get("scale_fmt") or "float"
    if scale_format not in ("float", "ue8m0"):
        raise CheckpointError(f"{source}: scale_fmt {scale_format!r} is neither 'float' nor 'ue8m0'")
    if block is None:
        given = ".activation_scale" if scheme == "static" else None
        layer = schemes.scaled(_E4M3, "_scale_inv", channels=False, input_scale=given)
    elif scheme == "static":
        _refuse(source, "FP8 in blocks with static activations")
    else:
        powers = scale_format == "ue8m0"
        layer = schemes.block_fp8(_square(source, block), "_scale_inv", powers_of_two=powers)
    ignored = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    return Plan(source, ((_everything, layer),), _transformers_names(ignored))


def _square(source: Path | str, block: Any) -> int:
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"{source}: a block has two positive sizes, as [128, 128], not {block!r}")
    if sizes[0] != sizes[1]:
        _refuse(source, f"FP8 in blocks of {sizes[0]} x {sizes[1]}, which are not square")
    return sizes[0]


def _everything(name: str) -> bool:
    return True


def _transformers_names(patterns: Any) -> Matches:
    """``modules_to_not_convert``: the name from its start up to a dot, as a regex, or its end."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    expressions = [re.compile(f"(?:{pattern}){boundary}") for pattern in patterns]

    def matches(name: str) -> bool:
        return any(found.match(name) for found in expressions) or name.endswith(tuple(patterns))

    return matches


# quant_method "compressed-tensors" ----------------------------------------------------------------


def _compressed_tensors(source: Path, config: Mapping[str, Any]) -> Plan:
    """llm-compressor's: config_groups, each with targets and a scheme; ignore."""
    if config.get("sparsity_config", {}).get("format", "dense") != "dense":
        _refuse(source, "compressed-tensors with sparse weights")
    groups = config.get("config_groups") or {}
    if not groups:
        raise CheckpointError(f"{source}: quant_method 'compressed-tensors' without config_groups")
    read = [
        (
            tuple(group.get("targets") or ()),
            compressed_group(f"{source}: the checkpoint", {"format": config.get("format"), **group}),
        )
        for group in groups.values()
    ]
    # Names before classes of layers: the narrower target counts.
    read.sort(key=lambda item: "Linear" in item[0])
    return Plan(
        source,
        tuple((_compressed_names(targets), scheme) for targets, scheme in read),
        _compressed_names(config.get("ignore") or ()),
    )


def compressed_group(where: str, group: Mapping[str, Any]) -> Scheme:
    """The scheme of one of config_groups, or of a layer in memory; ``where`` begins a refusal."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    words = ", ".join([*_words("weights", weights), *_words("activations", inputs)])
    format = group.get("format")
    described = f"compressed-tensors {getattr(format, 'value', format) or ''} ({words})"
    kind: Any = (weights.get("type"), weights.get("num_bits"))
    of = weights.get("strategy")
    if kind in (("int", 4), ("int", 8)) and not inputs and "pack" in described and of in ("group", "channel"):
        group_size: Any = weights.get("group_size") if of == "group" else None
        return schemes.packed_integers(kind[1], group_size, zeros=not weights.get("symmetric", True))
    codes = _CODES.get(kind)
    symmetric = weights.get("symmetric", True) and inputs.get("symmetric", True)
    if codes is None or kind != (inputs.get("type"), inputs.get("num_bits")) or not symmetric:
        _refuse(where, described)
    inputs_of = (inputs.get("strategy"), inputs.get("dynamic", False))
    if (of, inputs_of) == ("block", ("group", True)) and codes == _E4M3:
        size = _square(where, _sizes(weights.get("block_structure")))
        if inputs.get("group_size") == size:
            return schemes.block_fp8(size, "_scale")
    if of in ("channel", "tensor") and inputs_of in (("token", True), ("tensor", False)):
        given = None if inputs_of[1] else ".input_scale"
        return schemes.scaled(codes, "_scale", channels=of == "channel", input_scale=given)
    _refuse(where, described)


def _sizes(block: Any) -> Any:
    """``"128x128"`` of older files as [128, 128]."""
    return [int(size) for size in block.split("x")] if isinstance(block, str) else block


def _words(what: str, arguments: Mapping[str, Any]) -> list[str]:
    if not arguments:
        return [f"{what} as they are"]
    dynamic = " dynamic" if arguments.get("dynamic") is True else ""
    kind = f"{arguments.get('type', '?')}{arguments.get('num_bits', '?')}"
    return [f"{what} {kind} per {arguments.get('strategy', '?')}{dynamic}"]


def _compressed_names(targets: Any) -> Matches:
    """Names in full, regexes behind "re:", and "Linear" for every layer there is a scheme for."""
    expressions = [re.compile(t.removeprefix("re:")) for t in targets if t.startswith("re:")]
    names = {t for t in targets if not t.startswith("re:")}

    def matches(name: str) -> bool:
        return "Linear" in names or name in names or any(found.match(name) for found in expressions)

    return matches


# quant_method "modelopt" --------------------------------------------------------------------------


def _modelopt(source: Path, config: Mapping[str, Any]) -> Plan:
    """NVIDIA's: quant_algo, exclude_modules."""
    algorithm = config.get("quant_algo")
    channels = {"FP8": False, "FP8_PER_CHANNEL_PER_TOKEN": True}.get(str(algorithm))
    if channels is None:
        _refuse(source, f"ModelOpt {algorithm or '(quant_algo is not given)'}")
    given = None if channels else ".input_scale"
    ignored = config.get("exclude_modules") or config.get("ignore") or ()
    layer = schemes.scaled(_E4M3, "_scale", channels=channels, input_scale=given)
    return Plan(source, ((_everything, layer),), _modelopt_names(ignored))


def _modelopt_names(patterns: Any) -> Matches:
    """``exclude_modules``: names with * for anything, of a layer or of a module around it."""

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)

    return matches


# quant_method "gptq", "awq" -----------------------------------------------------------------------


def _gptq(source: Path, config: Mapping[str, Any]) -> Plan:
    """GPTQModel, AutoGPTQ: qweight, qzeros, scales, g_idx."""
    bits, version = config.get("bits"), config.get("checkpoint_format") or "gptq"
    if bits not in (4, 8) or version not in ("gptq", "gptq_v2") or config.get("dynamic"):
        overrides = " with dynamic overrides" if config.get("dynamic") else ""
        _refuse(source, f"GPTQ of {bits} bits, checkpoint_format {version}{overrides}")
    layer = schemes.gptq(bits, _group(config), above=int(version == "gptq"))
    return Plan(source, ((_everything, layer),), _nothing)


def _awq(source: Path, config: Mapping[str, Any]) -> Plan:
    """AutoAWQ: qweight, qzeros, scales."""
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not config.get("zero_point", True):
        zero = "" if config.get("zero_point", True) else " without zero points"
        _refuse(source, f"AWQ of {bits} bits, version {version}{zero}")
    ignored = config.get("modules_to_not_convert") or ()
    return Plan(source, ((_everything, schemes.awq(_group(config))),), _transformers_names(ignored))


def _group(config: Mapping[str, Any]) -> int | None:
    """``group_size``; None for whole columns, which is written as -1."""
    size = config.get("group_size", config.get("q_group_size"))
    return size if isinstance(size, int) and size > 0 else None


def _nothing(name: str) -> bool:
    return False


_READERS: dict[str, Callable[[Path, Mapping[str, Any]], Plan]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}

_NO_LAYER = {
    "torchao": "torchao tensors",
    "mxfp4": "MXFP4 (blocks and scales, as gpt-oss)",
    "nvfp4": "NVFP4",
    "quark": "Quark (AMD)",
    "fbgemm_fp8": "FBGEMM FP8 (one scale for a row)",
    "bitsandbytes": "bitsandbytes",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "higgs": "HIGGS",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "bitnet": "BitNet",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
}
"""What is met in practice and refused by name."""
