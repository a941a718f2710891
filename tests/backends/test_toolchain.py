"""Compiling kernels: the same bytes every time, the cache, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from lowering import host_compiler, object_cache
from lowering.backends import commands, cpu, cuda, hip, toolchain
from lowering.errors import ToolchainError, UsageError
from lowering.families.row import instance
from lowering.targets import Target
from tests.families.row_cases import CASES, CPU, GFX950, SM90


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
        patch.setattr(cpu.CCompiler, "run", lambda *_: pytest.fail("compiled again"))
        assert toolchain.compile_kernel(kernel) == data
    whole = entry.read_bytes()
    for damaged in (whole[:-1], b"", whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        entry.write_bytes(damaged)
        assert toolchain.compile_kernel(kernel) == data
        assert entry.read_bytes() == whole
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / "file"))
    assert toolchain.compile_kernel(kernel) == data
    monkeypatch.setenv("VMFUSE_CACHE_DIR", str(tmp_path / "unused"))
    monkeypatch.setenv("VMFUSE_NO_CACHE", "1")
    assert toolchain.compile_kernel(kernel) == data
    with object_cache.placed(tmp_path / "chosen", enabled=False):
        assert toolchain.compile_kernel(kernel) == data
    assert not (tmp_path / "unused").exists() and not (tmp_path / "chosen").exists()
    with object_cache.placed(tmp_path / "chosen"):
        assert toolchain.compile_kernel(kernel) == data
    assert [path.read_bytes() for path in (tmp_path / "chosen").iterdir()] == [whole]


KEYS = [f"{number:064x}" for number in range(10)]


def test_an_entry_under_another_name_is_a_miss(tmp_path: Path) -> None:
    with object_cache.placed(tmp_path):
        for key in KEYS[:2]:
            object_cache.write(key, key.encode())
        (tmp_path / KEYS[0]).replace(tmp_path / KEYS[1])
        assert object_cache.read(KEYS[0]) is None and object_cache.read(KEYS[1]) is None


def test_the_cache_is_bounded_and_drops_what_was_used_least_recently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMFUSE_CACHE_SIZE", "5200")
    (tmp_path / "notes").write_bytes(bytes(10_000))
    with object_cache.placed(tmp_path):
        for number, key in enumerate(KEYS[:5]):
            object_cache.write(key, bytes(1000))
            os.utime(tmp_path / key, (number, number))
        assert all(object_cache.read(key) for key in KEYS[1:5])  # 1032 bytes each: all five are there still
        object_cache.write(KEYS[5], bytes(1000))
        left = [key for key in KEYS if (tmp_path / key).exists()]
        assert KEYS[0] not in left and KEYS[5] in left and len(left) == 4
    assert (tmp_path / "notes").exists()
    monkeypatch.setenv("VMFUSE_CACHE_SIZE", "plenty")
    with object_cache.placed(tmp_path), pytest.raises(UsageError, match="VMFUSE_CACHE_SIZE is a number"):
        object_cache.write(KEYS[6], b"data")


def test_a_cache_that_anyone_may_write_to_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with object_cache.placed(tmp_path):
        object_cache.write(KEYS[0], b"data")
        assert not list(tmp_path.iterdir()) and object_cache.read(KEYS[0]) is None


def test_another_compiler_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that differs by an option of CC, or by its file."""
    kernel = instance(CASES["plain_smallest"], CPU)
    (command,) = host_compiler.c_compiler()
    keys = set()
    wrapper = tmp_path / "cc"
    for text in (f'exec {command} "$@"', f'exec {command} -fwrapv "$@"'):
        wrapper.write_text(f"#!/bin/sh\n{text}\n")
        wrapper.chmod(0o755)
        cpu.compiler_for.cache_clear()
        commands.version.cache_clear()
        for chosen in (str(wrapper), f"{wrapper} -fwrapv"):
            monkeypatch.setenv("CC", chosen)
            keys.add(toolchain.job_of(kernel).key)
    assert len(keys) == 4


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
    for cached in (hip.clang_and_lld, cuda.nvrtc):
        cached.cache_clear()
    for module in (hip, host_compiler):
        monkeypatch.setattr(module, "ziglang", lambda: None)
    monkeypatch.setattr(hip.shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    try:
        for target, extra in [(CPU, r"vmfuse\[hip\]"), (GFX950, r"vmfuse\[hip\]"), (SM90, r"vmfuse\[cuda\]")]:
            with pytest.raises(ToolchainError, match=extra):
                toolchain.compile_kernel(instance(CASES["plain_smallest"], target))
    finally:
        for cached in (hip.clang_and_lld, cuda.nvrtc):
            cached.cache_clear()
