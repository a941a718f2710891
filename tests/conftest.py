"""What every test shares: one thread per worker, no network, and skipping what the machine lacks."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("LOWERING_VERIFY", "1")  # the IR is checked after every step
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are built from configs; nothing is looked up
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.kernel_objects", "tests.quicker"]

# What these modules assert is explained as in a test.
pytest.register_assert_rewrite("tests.families.host_kernels", "tests.families.row_reference")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # In a shell's background Ctrl-C is ignored, and so it would be by the programs that tests interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        return
    import torch

    torch.set_num_threads(1)  # the workers are the parallelism


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Each test draws the same numbers every time, whatever ran before it, so that what fails fails again."""
    import torch

    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What launches a kernel instance on this host; each is built once."""
    from tests.families import host_kernels

    return cache(lambda kernel: host_kernels.launcher(kernel, tmp_path_factory.mktemp("kernel")))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a module for a target; the path of the vmfb."""
    import lowering

    directory = tmp_path_factory.mktemp("programs")

    def compile_for(target: str, module: Any, arguments: Sequence[Any], shapes: Any = None) -> Path:
        path = directory / f"{len(list(directory.iterdir()))}-{target}.vmfb"
        compiled = lowering.compile(module, tuple(arguments), dynamic_shapes=shapes, target=target)
        compiled.save(path)
        return path

    return compile_for


@pytest.fixture(scope="session")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program: main(x) = x + x and negate(x) = -x for float32 [s0, 4]."""
    from tests.small_programs import DOUBLE, X, compiled, signature

    path = tmp_path_factory.mktemp("double") / "double.vmfb"
    path.write_bytes(compiled(DOUBLE, main=signature((X,), (X,)), negate=signature((X,), (X,))))
    return path
