"""Compiling kernels: the same bytes every time, the cache, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from row_cases import CASES, CPU, GFX950, SM90

from lowering import toolchain
from lowering.errors import ToolchainError
from lowering.kernel import instance
from lowering.targets import Target


@pytest.mark.parametrize("target", [CPU, SM90, GFX950], ids=lambda t: t.name)
def test_objects_are_reproducible(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = instance(CASES["add_exact_all"], target)
    objects = set()
    for turn in range(2):
        monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / str(turn)))
        objects.add(toolchain.compile_kernel(kernel))
    assert len(objects) == 1


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call compiles nothing, a damaged entry is a miss, a cache that cannot be written no error."""
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / "cache"))
    kernel = instance(CASES["plain_smallest"], CPU)
    data = toolchain.compile_kernel(kernel)
    (entry,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(toolchain._Cpu, "run", lambda *_: pytest.fail("compiled again"))
        assert toolchain.compile_kernel(kernel) == data
    entry.write_bytes(entry.read_bytes()[:-1])
    assert toolchain.compile_kernel(kernel) == data
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / "file"))
    assert toolchain.compile_kernel(kernel) == data


def test_a_failed_compile_shows_message_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path))
    for target, command in [
        (CPU, "row.c"),
        (SM90, "--gpu-architecture=sm_90a"),
        (GFX950, "--offload-arch=gfx950"),
    ]:
        kernel = instance(CASES["plain_smallest"], target)
        broken = dataclasses.replace(kernel, defines=(("ENTRY", "0"), *kernel.defines[1:]))
        with pytest.raises(ToolchainError, match="error") as caught:
            toolchain.compile_kernel(broken)
        assert command in str(caught.value)


def test_a_missing_compiler_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (toolchain._hip, toolchain._nvrtc):
        cached.cache_clear()
    monkeypatch.setattr(toolchain, "_ziglang", lambda: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    try:
        for target, extra in [(CPU, r"vmfuse\[hip\]"), (GFX950, r"vmfuse\[hip\]"), (SM90, r"vmfuse\[cuda\]")]:
            with pytest.raises(ToolchainError, match=extra):
                toolchain.compile_kernel(instance(CASES["plain_smallest"], target))
    finally:
        for cached in (toolchain._hip, toolchain._nvrtc):
            cached.cache_clear()
