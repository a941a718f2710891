"""Quantized layers, and the one call that puts them into a loaded model."""

from .experts import QuantizedExperts
from .layers import BlockScaledLinear, ScaledLinear, quantize_weight
from .quantizing import LM_HEAD, Quantization, quantization, quantize

__all__ = [
    "LM_HEAD",
    "BlockScaledLinear",
    "Quantization",
    "QuantizedExperts",
    "ScaledLinear",
    "quantization",
    "quantize",
    "quantize_weight",
]
