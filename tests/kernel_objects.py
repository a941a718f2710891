"""Hold kernels to their bytes while the code around them is moved.

    pytest --kernel-objects before.json      # the first time: write the file
    pytest --kernel-objects before.json      # then: fail where an object differs, or is new

Every object that the tests compile counts, on every target: {"backend arch entry": sha256}.  A file holds
for one machine and its compilers: CPU objects depend on both.
"""

from __future__ import annotations

import hashlib
import json
from functools import wraps
from pathlib import Path

import pytest

_OBJECTS: dict[str, str] = {}
_FOUND = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel-objects", type=Path, metavar="F.json", help="write or compare kernels' hashes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--kernel-objects") is None:
        return
    config.stash[_FOUND] = _OBJECTS
    from lowering import toolchain

    compile_kernel = toolchain.compile_kernel

    @wraps(compile_kernel)
    def recorded(instance):
        data = compile_kernel(instance)
        name = f"{instance.target.backend} {instance.target.arch} {instance.entry}"
        _OBJECTS[name] = hashlib.sha256(data).hexdigest()
        return data

    toolchain.compile_kernel = recorded


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Take over what a worker of pytest-xdist has compiled."""
    _OBJECTS.update(getattr(node, "workeroutput", {}).get("kernel_objects", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--kernel-objects")
    if path is None:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernel_objects"] = _OBJECTS
    elif not path.exists():
        path.write_text(json.dumps(_OBJECTS, indent=0, sort_keys=True) + "\n")
    else:
        differences = _differences(json.loads(path.read_text()), _OBJECTS)
        print("\n".join(["", *differences, f"{len(_OBJECTS)} kernel objects, {len(differences)} differ"]))
        if differences:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """A line for every object that is another one or was not there; a run of fewer tests compiles fewer."""
    return [
        f"{name}: {'other bytes' if name in before else 'a new kernel'}"
        for name, digest in sorted(now.items())
        if before.get(name) != digest
    ]
