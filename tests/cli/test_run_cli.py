"""The command run-vmfb: inputs, outputs, exit codes, errors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lowering.cli import run as run_cli
from lowering.signature import Integer, TensorSpec
from tests.small_programs import compiled, signature

ROOT = Path(__file__).resolve().parents[2]
PAIR = """func.func @main(%x: tensor<?x4xbf16>, %n: tensor<?xi64>)
    -> (tensor<?x4xbf16>, tensor<?xi64>) @SIG(main) {
  %m = arith.addi %n, %n : tensor<?xi64>
  return %x, %m : tensor<?x4xbf16>, tensor<?xi64>
}"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    """main(x: bfloat16 [s0, 4], n: int64 [s1]) -> (x, n + n)."""
    specs = (TensorSpec("x", "bfloat16", ("s0", 4)), TensorSpec("n", "int64", ("s1",)))
    path = tmp_path_factory.mktemp("pair") / "pair.vmfb"
    path.write_bytes(compiled(PAIR, main=signature(specs, specs)))
    return str(path)


def test_run_prints_results(pair, capsys):
    assert run_cli.main([pair, "--input", "1x4xbf16=1.5", "--input", "3xi64=1,2,-3"]) == 0
    expected = "output_0: 1x4xbf16\n[[1.5000, 1.5000, 1.5000, 1.5000]]\noutput_1: 3xi64\n[ 2,  4, -6]\n"
    assert capsys.readouterr().out == expected


def test_inputs_may_be_named(pair, tmp_path, capsys):
    np.save(tmp_path / "n.npy", np.array([4, 5]))
    for inputs in (["n=3xi64=1,2,-3", "1x4xbf16=1.5"], ["n=3xi64=1,2,-3", "x=1x4xbf16=1.5"]):
        assert run_cli.main([pair, *(f"--input={text}" for text in inputs)]) == 0
        assert "output_1: 3xi64\n[ 2,  4, -6]\n" in capsys.readouterr().out
    assert run_cli.main([pair, f"--input=n=@{tmp_path / 'n.npy'}", "--input=1x4xbf16"]) == 0
    assert capsys.readouterr().out.endswith("[ 8, 10]\n")


def test_an_int_is_an_input(tmp_path, capsys):
    mlir = """func.func @main(%n: i64, %x: tensor<?xi64>) -> tensor<?xi64> @SIG(main) {
      %y = linalg.generic {
          indexing_maps = [affine_map<(i) -> (i)>, affine_map<(i) -> (i)>], iterator_types = ["parallel"]
        } ins(%x : tensor<?xi64>) outs(%x : tensor<?xi64>) {
        ^bb0(%a: i64, %b: i64):
          %c = arith.addi %a, %n : i64
          linalg.yield %c : i64
        } -> tensor<?xi64>
      return %y : tensor<?xi64>
    }"""
    x = TensorSpec("x", "int64", ("s1",))
    told = signature((Integer("n", "s0"), x), (x,), conditions=("2 <= s0",))
    path = tmp_path / "add.vmfb"
    path.write_bytes(compiled(mlir, main=told))
    for inputs in (["i64=7", "2xi64=1,2"], ["2xi64=1,2", "n=i64=7"]):
        assert run_cli.main([str(path), *(f"--input={text}" for text in inputs)]) == 0
        assert capsys.readouterr().out == "output_0: 2xi64\n[8, 9]\n"
    assert run_cli.main([str(path), "--input=f32=7", "--input=2xi64"]) == 2
    assert "n is an int, such as i64=7" in capsys.readouterr().err
    assert run_cli.main([str(path), "--input=i64=1", "--input=2xi64"]) == 1
    assert "argument n: 1: the model was exported for sizes with 2 <= n" in capsys.readouterr().err


def test_run_writes_and_reads_files(pair, tmp_path, capsys):
    both, x, n = tmp_path / "both.safetensors", tmp_path / "x.npy", tmp_path / "n.npy"
    inputs = ["--input", "5x4xbf16=rand:7", "--input", "2xi64=rand:1"]
    assert run_cli.main([pair, *inputs, "--output", f"@{both}"]) == 0
    assert run_cli.main([pair, *inputs, "--output", f"@{x}", "--output", f"@{n}"]) == 0
    assert capsys.readouterr().out == ""
    from safetensors.torch import load_file

    written = load_file(both)
    expected = torch.randn(5, 4, generator=torch.Generator().manual_seed(7)).bfloat16()
    assert torch.equal(written["output_0"], expected)
    assert np.array_equal(np.load(n), written["output_1"].numpy())
    again = tmp_path / "again.safetensors"
    for first in (f"@{x}", f"@{both}:output_0"):
        assert run_cli.main([pair, "--input", first, "--input", f"@{n}", "--output", f"@{again}"]) == 0
        assert torch.equal(load_file(again)["output_0"], expected)
        assert torch.equal(load_file(again)["output_1"], written["output_1"] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.safetensors", "both.safetensors", "n.npy", "x.npy",
    ]  # fmt: skip


def test_run_function_and_benchmark(double, capsys):
    assert run_cli.main([str(double), "--function", "negate", "--input", "0x4xf32"]) == 0
    assert capsys.readouterr().out == "output_0: 0x4xf32\n[], size=(0, 4)\n"
    assert run_cli.main([str(double), "--input", "2x4xf32=1", "--benchmark", "5"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("main: 5 calls, median ")
    assert "min" in line and "mean" in line and line.count("\n") == 1


X_ = "--input=1x4xbf16=1"
N_ = "--input=2xi64=1"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input=4xbf17=1"], 2, "unknown element type 'bf17'"),
        (["--input=axbf16=1"], 2, "expected sizes and an element type, such as 8x7168xbf16"),
        (["--input=4xi64=one", N_], 2, "expected rand:SEED or values, got 'one'"),
        (["--input=4xi8=300", N_], 2, "expected rand:SEED or values, got '300'"),
        (["--input=1x4xbf16=1,2", N_], 2, "expected 1 or 4 values, got 2"),
        (["--input=9999999999999999999xbf16", N_], 2, "no machine has memory for a tensor of this size"),
        (["--input=100000000000000xbf16=rand", N_], 1, "there is not enough memory for it"),
        (["--input=-4xbf16", N_], 2, "expected sizes and an element type, such as 8x7168xbf16"),
        (["--input=1x4xbf16=rand:99999999999999999999", N_], 2, "a seed is less than 2^64"),
        ([X_, N_, "--benchmark=-1"], 2, "expected a positive number of calls, got '-1'"),
        ([X_, N_, "--device=cuda:9999"], 1, "cannot run on cuda"),
        ([X_, N_, "--output=@/proc/y.npy", "--output=-"], 2, "cannot write /proc/y.npy"),
        ([X_, N_, "--output=@y.npy", "--output=@./y.npy"], 2, "has the same path as the output y.npy"),
        (["--input=1x4xbf16=rand:x", N_], 2, "expected rand:SEED, got 'rand:x'"),
        (["--input=@nowhere.npy"], 2, "there is no file nowhere.npy"),
        (["--input=@tests"], 2, "expected @FILE.npy or @FILE.safetensors[:NAME]"),
        ([X_, N_, "--output=y.npy"], 2, "expected -, @FILE.npy or @FILE.safetensors"),
        ([X_, N_, "--output=@nowhere/y.npy"], 2, "nowhere/y.npy cannot be written"),
        ([X_, N_, "--output=@y.npy"], 2, "main returns 2 tensors, y.npy holds one; use .safetensors"),
        ([X_, N_, "--output=-", "--output=-", "--output=-"], 2, "3 --output options given"),
        ([X_], 1, "main takes 2 inputs (x: bfloat16[s0, 4]; n: int64[s1]), got 1"),
        ([X_, "--input=m=2xi64=1"], 1, "n: int64[s1]), got 'm'"),
        (["--input=n=2xi64=1", "--input=n=2xi64=1"], 1, "got 'n' twice"),
        (["--input=1x4xf32=1", N_], 1, "argument x: expected bfloat16[s0, 4], got float32[1, 4]"),
        ([X_, N_, "--function=other"], 1, "the program has no function 'other'; it has main"),
        ([X_, N_, "--device=tpu"], 2, "unknown device 'tpu'"),
        ([X_, N_, "--benchmark=0"], 2, "expected a positive number of calls, got '0'"),
        ([X_, N_, "--parameters=w.irpa"], 1, "carries its own parameters"),
    ],
)
def test_run_with_bad_arguments(pair, capsys, arguments, code, message):
    try:
        result = run_cli.main([pair, *arguments])
    except SystemExit as stop:
        result = stop.code
    captured = capsys.readouterr()
    assert result == code
    assert captured.err.splitlines()[-1].startswith("run-vmfb: error: ")
    assert message in captured.err
    assert captured.out == ""


def test_run_refuses_damaged_input_files(pair, tmp_path, capsys):
    for name in ("x.npy", "x.safetensors"):
        (tmp_path / name).write_bytes(b"not a tensor")
        assert run_cli.main([pair, f"--input=@{tmp_path / name}", N_]) == 2
        assert f"{name} cannot be read: " in capsys.readouterr().err


def test_no_output_is_a_file_that_is_read(double, tmp_path, capsys):
    file, link = tmp_path / "x.safetensors", tmp_path / "link.safetensors"
    assert run_cli.main([str(double), "--input=1x4xf32=3", f"--output=@{file}"]) == 0
    link.hardlink_to(file)
    before = file.read_bytes()
    for arguments in ([f"--input=@{file}:output_0", f"--output=@{link}"],):
        assert run_cli.main([str(double), *arguments]) == 2
        assert "has the same path as the input" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_files_get_the_permissions_that_the_umask_gives(double, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    for name in ("y.npy", "y.safetensors"):
        assert run_cli.main([str(double), "--input=1x4xf32=3", f"--output=@{tmp_path / name}"]) == 0
        assert (tmp_path / name).stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_nobody_to_write_to(double):
    """A full disk is an error in one sentence; a reader who leaves (``| head``) is none."""
    command = f"{sys.executable} -m lowering.cli.run {double} --input 900x4xf32"
    for redirected, code, message in (
        (">/dev/full", 1, "run-vmfb: error: standard output cannot be written: No space left on device\n"),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
        (">&-", 0, ""),
    ):
        shell = ["bash", "-c", f"{command} {redirected}"]
        done = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stderr) == (code, message), redirected


@pytest.mark.parametrize(("number", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_ends_it_and_leaves_nothing(double, tmp_path, number, code, word):
    arguments = ["--input=1x4xf32=3", "--benchmark=1000000000", f"--output=@{tmp_path / 'y.npy'}"]
    command = [sys.executable, "-m", "lowering.cli.run", str(double), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not list(tmp_path.iterdir()):  # the output is reserved: torch is imported, and the run has begun
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, f"run-vmfb: error: {word}\n")
    assert not list(tmp_path.iterdir())


def test_run_as_a_command(pair):
    command = [sys.executable, "-m", "lowering.cli.run", "nowhere.vmfb"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "run-vmfb: error: nowhere.vmfb cannot be read: No such file or directory\n"
