"""Check on a GPU the products that add a residual: bit for bit the plain product's result plus the residual.

    python -m tools.gpu.residuals pack DIR --target h200     # where the compilers are; needs no GPU
    python -m tools.gpu.residuals run DIR                    # on the GPU, or on the cpu for --target cpu

A program for each kind of weight returns the product, another one the sum; that it has one kernel for both is
checked when packing.  Prints a line for each kind.  Exit codes: 0 all is well, 1 something failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lowering
from lowering.errors import CompileError
from patterns.contracts import MatmulSpec
from patterns.packed_matmul import PackedSpec

LOW = torch.ops.lowering
COLUMNS, K = 1536, 1024
ROWS = (1, 3, 16, 17, 64, 130, 1024)


class Product(nn.Module):
    """x [T, K] and a residual [T, COLUMNS] to x . weight^T, or to its sum with the residual if ``adds``."""

    def __init__(self, kind: str, *, adds: bool):
        super().__init__()
        self.kind, self.adds = kind, adds
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(COLUMNS, K, generator=generator)
        if kind == "int4":
            codes = torch.randint(256, (COLUMNS, K // 2), generator=generator).to(torch.uint8)
            scale = torch.rand(COLUMNS, K // 128, generator=generator).bfloat16()
        elif kind == "blocks":
            codes = weight.to(torch.float8_e4m3fn)
            scale = torch.rand(COLUMNS // 128, K // 128, generator=generator)
        else:
            codes, scale = LOW.group_quant(weight, 0, dtype=_DTYPES[kind])
        self.codes, self.scale = nn.Buffer(codes), nn.Buffer(scale)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.kind == "int4":
            y = LOW.packed_matmul(x, self.codes, self.scale)
        else:
            q, scale = LOW.group_quant(x, 128 if self.kind == "blocks" else 0, dtype=_DTYPES[self.kind])
            y = LOW.block_scaled_matmul(q, self.codes, scale, self.scale, torch.bfloat16)
        return residual + y if self.adds else y


_DTYPES = {"blocks": torch.float8_e4m3fn, "rows": torch.float8_e4m3fn, "int8": torch.int8}
KINDS = (*_DTYPES, "int4")


def examples(rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, residual = (torch.randn(rows, size, generator=generator).bfloat16() for size in (K, COLUMNS))
    return x.to(device), residual.mul(8).to(device)


def path_of(directory: Path, kind: str, *, adds: bool) -> Path:
    return directory / f"{kind}{'_adds' if adds else ''}.vmfb"


def pack(directory: Path, target: str) -> None:
    """Compile all programs for ``target``; CompileError where a residual is not in the product's kernel."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = torch.export.Dim("rows")
    for kind in KINDS:
        for adds in (False, True):
            compiled = lowering.compile(
                Product(kind, adds=adds), examples(17), target=target, dynamic_shapes=({0: rows}, {0: rows})
            )
            specs = [launch.kernel.spec for launch in compiled.dispatched.launches]
            products = [spec.residual for spec in specs if isinstance(spec, MatmulSpec | PackedSpec)]
            if products != [adds]:
                raise CompileError(f"{kind}: the kernels of products add residuals as {products}, not [{adds}]")
            compiled.save(path_of(directory, kind, adds=adds))


def run(directory: Path) -> bool:
    """Compare every kind at every number of rows; tells whether all is well."""
    well = True
    for kind in KINDS:
        plain, adding = (lowering.load(path_of(directory, kind, adds=adds)) for adds in (False, True))
        device, wrong = plain["main"].device, []
        for rows in ROWS:
            x, residual = examples(rows, device)
            expected = residual + plain(x, residual)
            differing = int((adding(x, residual).view(torch.int16) != expected.view(torch.int16)).sum())
            wrong += [f"{differing} of {expected.numel()} differ at {rows} rows"] if differing else []
        print(f"{kind}: {'; '.join(wrong) or 'equal at ' + ', '.join(map(str, ROWS)) + ' rows'}")
        well = well and not wrong
    return well


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check products that add a residual, on a GPU.")
    parser.add_argument("command", choices=("pack", "run"))
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--target", default="h200", help="what to compile for (pack)")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        pack(options.directory, options.target)
        return 0
    return 0 if run(options.directory) else 1


if __name__ == "__main__":
    sys.exit(main())
