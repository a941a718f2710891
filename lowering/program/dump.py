"""Write what ``--dump-kernels`` asks for: each kernel object, and how a program would launch them all."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..families.instance import KernelInstance
from ..passes.dispatch import Dispatched, Launch

_SUFFIX = {"cpu": ".o", "cuda": ".cubin", "hip": ".hsaco"}


def dump_kernels(dispatched: Dispatched, directory: Path) -> None:
    """Write every object and ``kernels.json`` to ``directory``, which is made if need be.

    Launches are in execution order, with grid, shapes and constants for the example arguments; where
    a row count is not known (a model from MLIR with dynamic sizes) those are null.  ``grid_rule`` and each
    binding's ``dims``, where T is the number of rows and T4 that rounded up to a multiple of 4, say what they
    are for any other number of rows.  Of a binding with ``columns`` [first, end) only those are touched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for entry, kernel in dispatched.kernels.items():
        (directory / _object_name(kernel)).write_bytes(dispatched.objects[entry])
    document = {"launches": [_describe(launch) for launch in dispatched.launches]}
    (directory / "kernels.json").write_text(json.dumps(document, indent=2) + "\n")


def _object_name(kernel: KernelInstance) -> str:
    return kernel.entry + _SUFFIX[kernel.target.backend]


def _describe(launch: Launch) -> dict[str, Any]:
    kernel, rows = launch.kernel, launch.rows
    return {
        "entry": kernel.entry,
        "object": _object_name(kernel),
        "arch": kernel.target.arch,
        "grid": None if rows is None else list(kernel.grid(rows)),
        "grid_rule": asdict(kernel.grid_rule),
        "block": list(kernel.block),
        "dynamic_shared": kernel.dynamic_shared,
        "bindings": [
            {
                "name": binding.name,
                "dtype": binding.dtype,
                "dims": list(binding.shape),
                "shape": None if rows is None else list(kernel.shape(binding, rows)),
                "access": binding.access,
                "columns": binding.columns,
            }
            for binding in kernel.bindings
        ],
        "constants": None if rows is None else [rows],
    }
