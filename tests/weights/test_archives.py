"""Archives of parameters: read by IREE, the same bytes every time, written in little memory, or refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowering
from lowering.errors import RunError, UsageError
from lowering.weights.parameters import archived, write_archive


class Multiplies(nn.Module):
    def __init__(self, w: Tensor):
        super().__init__()
        self.register_buffer("w", w)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


TENSORS = {
    "matrix": torch.arange(1000, dtype=torch.float32).view(10, 100),
    "codes": torch.arange(100, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "columns.€": torch.arange(12).view(3, 4).t(),
}


@pytest.mark.parametrize("names", [[], ["scalar"], list(TENSORS)])
def test_iree_reads_what_is_written(names: list[str], tmp_path: Path) -> None:
    import iree.runtime as rt

    path, told = tmp_path / "w.irpa", []
    chosen = {name: TENSORS[name] for name in names}
    write_archive(chosen, path, lambda phase, detail: told.append((phase, detail)))
    index = rt.ParameterIndex()
    index.load(str(path))
    read = dict(index.items())
    assert list(read) == names
    for name, tensor in chosen.items():
        assert read[name].length == tensor.nbytes
        stored = bytes(read[name].file_view) if tensor.nbytes else b""
        assert stored == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    assert [phase for phase, _ in told] == ["weights"] * len(names)
    assert not told or told[-1][1].startswith(f"{len(names)} of {len(names)}, ")


def test_an_archive_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        write_archive(TENSORS, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_archive_of_another_compilation_is_refused_whatever_differs(tmp_path: Path) -> None:
    """One bit of a large weight, which no sample of the data would find."""
    w = torch.randn(2048, 1024)
    other = w.clone()
    other[1111, 777] *= 2
    programs = []
    for name, tensor in (("first", w), ("second", other), ("again", w)):
        model, path = Multiplies(tensor), tmp_path / f"{name}.irpa"
        compiled = lowering.compile(model, (torch.randn(2, 2048),), parameters=path)
        programs.append((compiled.vmfb, path))
    (vmfb, right), (_, wrong), (_, again) = programs
    lowering.load(vmfb, parameters=right)
    lowering.load(vmfb, parameters=again)
    with pytest.raises(RunError, match=r"second\.irpa does not hold the parameters .* was compiled with"):
        lowering.load(vmfb, parameters=wrong)


def flipped(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_one_flipped_bit_of_a_weight_is_found(tmp_path: Path) -> None:
    """In a file of its own and inside the program, between the samples of the digest."""
    args = (torch.randn(1, 4096),)
    model, archive, inside = Multiplies(torch.randn(4096, 1500)), tmp_path / "w.irpa", tmp_path / "m.vmfb"
    outside = lowering.compile(model, args, parameters=archive).vmfb
    lowering.compile(model, args).save(inside)
    expected = lowering.load(outside, parameters=archive)(*args)
    assert torch.equal(lowering.load(inside, check="headers")(*args), expected)
    flipped(archive, 12_345_678)
    with pytest.raises(RunError, match=r"parameters .*w\.irpa are damaged: the checksum of w "):
        lowering.load(outside, parameters=archive)
    assert lowering.load(outside, parameters=archive, check="headers") is not None
    flipped(inside, 12_345_678)
    for source in (inside, inside.read_bytes()):
        with pytest.raises(RunError, match=r"is damaged: the checksum of _const\.bin is not that"):
            lowering.load(source)
    assert lowering.load(inside, check="headers") is not None
    inside.write_bytes(inside.read_bytes()[:-100])
    with pytest.raises(RunError, match="truncated or damaged"):
        lowering.load(inside, check="headers")


def test_an_archive_that_cannot_be_written_is_a_wrong_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w": torch.zeros(1000)}
    with pytest.raises(UsageError, match="cannot write"), archived(tensors, tmp_path / "missing" / "w.irpa"):
        pass

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    path = tmp_path / "w.irpa"
    with pytest.raises(UsageError, match=r"cannot write .*w\.irpa: No space left"), archived(tensors, path):
        pass
    assert not list(tmp_path.iterdir())


STREAMED = '''
import sys, threading, time
import torch
from torch import Tensor, nn
from torch import nn
import lowering

kind, path, archive = sys.argv[1:]
LAYERS = 8
SIDE, dtype, target = (4096, torch.float32, "cpu") if kind == "scaled" else (8192, torch.uint8, "gfx950")
largest = SIDE * SIDE * dtype.itemsize
LOW = torch.ops.lowering

class Model(nn.Module):
    """Weights that lie in a file until they are read, none of them in the form it is needed in."""
    def __init__(self):
        super().__init__()
        whole = torch.from_file(path, shared=True, size=LAYERS * SIDE * SIDE, dtype=dtype)
        self.register_buffer("scale", torch.ones(SIDE // 128, SIDE // 128))
        for layer, part in enumerate(whole.split(SIDE * SIDE)):
            w = part.view(SIDE, SIDE)
            self.register_buffer(f"w{layer}", w if kind == "scaled" else w.view(torch.float8_e4m3fn))
    def forward(self, x):
        for layer in range(LAYERS):
            w = getattr(self, f"w{layer}")
            if kind == "scaled":
                x = x @ (w.t() if layer % 2 else (w * 0.5).t())
            else:  # every other one is the two halves of a checkpoint, joined
                q, scale = LOW.group_quant(x, 128)
                w = torch.cat(w.chunk(2)[::-1]) if layer % 2 else w
                x = LOW.block_scaled_matmul(q, w, scale, self.scale, torch.float32)
        return x

def held():
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

peak, start = 0, {}
def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.001)

def progress(name, detail):
    global peak
    if name == "dispatch":
        peak = start["before"] = held()
        threading.Thread(target=watch, daemon=True).start()
    if name == "compile":
        print(peak - start["before"], largest, LAYERS * largest)

compiled = lowering.compile(
    Model(), (torch.zeros(1, SIDE),), target=target, parameters=archive, progress=progress
)
assert len(compiled.report.folded) == LAYERS and len(compiled.vmfb) < 1 << 20
'''


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("kind", ["scaled", "shuffled"])
def test_memory_is_bounded_by_the_largest_tensor(kind: str, tmp_path: Path) -> None:
    """A model of 537 MB, every weight rewritten: at most twice a weight, 67 MB, and a constant are held."""
    source = tmp_path / "weights.bin"
    with source.open("wb") as file:
        file.truncate(8 * 4 * 4096 * 4096)
    command = [sys.executable, "-c", STREAMED, kind, str(source), str(tmp_path / "w.irpa")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peak, largest, total = map(int, done.stdout.split())
    assert total == 8 * largest
    assert largest < peak < 2 * largest + (64 << 20), f"{peak / 1e6:.0f} MB"
    assert (tmp_path / "w.irpa").stat().st_size >= total
    (tmp_path / "w.irpa").unlink()
