"""Say what a fused kernel is measured against: the same rows by other means.

unfused     one kernel that makes y, then one for each quantization of it
apart       the fused kernel of one quantization, run once for each (what vLLM does where a norm feeds two)
flashinfer  its FusedAddRMSNormFP8BlockQuant, compiled on this machine from the headers in its wheel
inductor    torch.compile of the reference, default and max-autotune
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.errors import RunError
from patterns.contracts import RowSpec
from tools.gpu.timing import inductor_row

Call = Callable[[], Any]

_FLASHINFER = """
#include <cuda_fp8.h>
#include <flashinfer/norm.cuh>
extern "C" int run(void *x, void *sum, void *weight, void *q, void *scale, void *y, unsigned rows,
                   unsigned hidden, float eps, void *stream) {
  using bf16 = nv_bfloat16;
  return (int)flashinfer::norm::FusedAddRMSNormFP8BlockQuant<bf16, __nv_fp8_e4m3>(
      (bf16 *)x, (bf16 *)sum, (bf16 *)weight, (__nv_fp8_e4m3 *)q, (float *)scale, (bf16 *)y, rows, hidden,
      hidden, hidden, hidden, hidden, (rows + 3) / 4 * 4, eps, false, (cudaStream_t)stream);
}
"""
# Headers of libraries its headers include and the kernel does not use.
_UNUSED_HEADERS = ("cublasLt.h", "cublas_v2.h", "curand_kernel.h")


@dataclass(frozen=True)
class Step:
    """One launch of a kernel; ``renamed`` says which tensor a binding is, where not the one of its name."""

    spec: RowSpec
    renamed: Mapping[str, str] = field(default_factory=dict)


def ways(spec: RowSpec) -> dict[str, list[Step]]:
    """The launches of our own kernels that compute ``spec``, by the name of the way."""
    found = {"fused": [Step(spec)]}
    quants = spec.quantizations
    if spec.norm or spec.gate:
        producer = replace(spec, quantizations=(), writes_y=True)
        found["unfused"] = [Step(producer), *(_plain(spec, index) for index in range(len(quants)))]
    if len(quants) > 1 and not spec.writes_sum:
        found["apart"] = [
            Step(replace(spec, quantizations=(quant,)), {"q0": f"q{index}", "scale0": f"scale{index}"})
            for index, quant in enumerate(quants)
        ]
    return found


def _plain(spec: RowSpec, index: int) -> Step:
    """The quantization of y by itself."""
    alone = RowSpec(spec.hidden, spec.dtype, quantizations=(spec.quantizations[index],))
    return Step(alone, {"x": "y", "q0": f"q{index}", "scale0": f"scale{index}"})


class FlashInfer:
    """The kernel of FlashInfer; ``include`` holds its headers."""

    def __init__(self, include: Path) -> None:
        self._directory = tempfile.TemporaryDirectory()
        directory = Path(self._directory.name)
        (directory / "kernel.cu").write_text(_FLASHINFER)
        for name in _UNUSED_HEADERS:
            (directory / name).touch()
        options = ["-gencode=arch=compute_90a,code=sm_90a", "-O3", "--expt-relaxed-constexpr", "-std=c++17"]
        command = ["nvcc", *options, "-shared", "-Xcompiler", "-fPIC", f"-I{include}", f"-I{directory}"]
        subprocess.run(
            [*command, str(directory / "kernel.cu"), "-o", str(directory / "kernel.so")], check=True
        )
        self._run = ctypes.CDLL(str(directory / "kernel.so")).run
        self._run.argtypes = [*[ctypes.c_void_p] * 6, *[ctypes.c_uint] * 2, ctypes.c_float, ctypes.c_void_p]

    def calls(self, spec: RowSpec, sets: Sequence[Mapping[str, Tensor]]) -> list[Call] | None:
        """One call for each set; None where it has no kernel for ``spec``.  The sum replaces the residual."""
        known = spec.writes_sum and spec.writes_y and len(spec.quantizations) == 1 and spec.hidden % 256 == 0
        return [lambda each=each: self._call(spec, each) for each in sets] if known else None

    def _call(self, spec: RowSpec, tensors: Mapping[str, Tensor]) -> None:
        assert spec.norm
        names = ("x", "sum", "weight", "q0", "scale0", "y")
        pointers = [tensors[name].data_ptr() for name in names]
        stream = torch.cuda.current_stream().cuda_stream
        if status := self._run(*pointers, tensors["x"].shape[0], spec.hidden, spec.norm.eps, stream):
            raise RunError(f"FlashInfer's kernel fails: {status}")


def inductor_calls(spec: RowSpec, sets: Sequence[Mapping[str, Tensor]], mode: str) -> list[Call]:
    """torch.compile of ``spec``, its scales row major, which suits it best; compiled and warm."""
    rows = tuple(replace(quant, layout="row") for quant in spec.quantizations)
    compiled = inductor_row(replace(spec, quantizations=rows), mode)
    inputs = [{name: each[name] for name in ("x", "residual", "weight") if name in each} for each in sets]
    for _ in range(3):
        compiled(inputs[0])
    return [lambda each=each: compiled(each) for each in inputs]
