"""The half of step 1 that stands on torch-mlir: its release, and its verifier."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
import torch_mlir.ir as mlir
from iree.compiler import ir
from torch import nn

from lowering.errors import CompileError, ToolchainError
from lowering.importing import torch_dialect
from lowering.importing.importer import TORCH_MLIR, import_module


@pytest.mark.parametrize(("installed", "said"), [(None, "not installed"), ("20200101", "20200101")])
def test_another_torch_mlir_is_one_clear_sentence(monkeypatch, installed: str | None, said: str) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ToolchainError, match=rf"{said}.*: pip install torch-mlir=={TORCH_MLIR}$") as caught:
        import_module(nn.Identity(), (torch.zeros(2),), ir.Context())
    assert "\n" not in str(caught.value)


def test_the_release_is_the_one_that_is_declared() -> None:
    declared = importlib.metadata.requires("vmfuse") or []
    assert f"torch-mlir=={TORCH_MLIR}" in declared


def test_what_is_imported_is_verified_before_it_crosses(monkeypatch) -> None:
    """A constant with two results is found, and named."""
    original = torch_dialect.GraphNodeImporter._import_torch_op_overload

    def broken(self, loc: mlir.Location, *others) -> None:
        with loc:
            type_ = mlir.Type.parse("!torch.int")
            mlir.Operation.create("torch.constant.int", results=[type_, type_])
        original(self, loc, *others)

    monkeypatch.setattr(torch_dialect.GraphNodeImporter, "_import_torch_op_overload", broken)
    with pytest.raises(CompileError, match=r"torch\.constant\.int"):
        import_module(nn.ReLU(), (torch.zeros(2),), ir.Context())
