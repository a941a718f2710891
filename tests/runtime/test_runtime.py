"""Loading and calling programs: tensors in and out, checks, bad files, threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from lowering import ops
from lowering.errors import RunError, UsageError
from lowering.runtime import program as runtime
from lowering.runtime import session
from lowering.signature import (
    SIGNATURE_KEY,
    Constant,
    Parameters,
    Signature,
    TensorSpec,
    host_arch,
    parameter_digest,
)
from tests.small_programs import DOUBLE, ELEMENTS, X, attributes, compiled, signature

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(double) -> runtime.Program:
    return runtime.load(double)


# --- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 3, 64])
def test_tensors_in_and_out(program, rows):
    x = torch.randn(rows, 4)
    torch.testing.assert_close(program(x), x + x, rtol=0, atol=0)


def test_functions(program):
    x = torch.randn(3, 4)
    assert program.functions == ("main", "negate")
    assert torch.equal(program["negate"](x), -x)
    with pytest.raises(RunError, match="no function 'forward'; it has main, negate"):
        program["forward"]


def test_a_call_says_why_it_is_no_graph(program, double):
    assert program.explain_call(torch.ones(2, 4)) == "no graph: it runs on the CPU"
    # It has no memory to put its results in.
    assert "the call itself tells sizes" in program["main"]._why_no_graph()
    with pytest.raises(RunError):
        program.explain_call(torch.ones(2, 5))
    with pytest.raises(UsageError, match="graphs is 'auto' or 'off', not 'on'"):
        runtime.load(double, graphs="on")


def test_bytes_and_plain_device_names(double):
    x = torch.ones(2, 4)
    for device in ("cpu", torch.device("cpu"), None):
        assert torch.equal(runtime.load(double.read_bytes(), device=device)(x), x + x)


def test_views_and_requires_grad(program):
    base = torch.randn(9, 8, requires_grad=True)
    for x in (base[:, ::2], base[1:, 4:], base.t()[:, :4], base.view(-1)[1:21].view(5, 4), base[:0, :4]):
        assert torch.equal(program(x), (x + x).detach())
    assert not program(base[:, :4]).requires_grad


def test_results_outlive_the_program(double):
    x = torch.randn(5, 4)
    y = runtime.load(double)(x)
    y += 1
    assert torch.equal(y, x + x + 1)


@pytest.fixture(scope="module")
def passthrough() -> runtime.Program:
    """Returns one tensor [n] of each dtype as it came in."""
    specs = tuple(TensorSpec(f"x_{name}", name, ("n",)) for name in ELEMENTS)
    types = ", ".join(f"tensor<?x{ELEMENTS[spec.dtype]}>" for spec in specs)
    args = ", ".join(f"%x{i}: tensor<?x{ELEMENTS[spec.dtype]}>" for i, spec in enumerate(specs))
    names = ", ".join(f"%x{i}" for i in range(len(specs)))
    mlir = f"func.func @main({args}) -> ({types}) @SIG(main) {{ return {names} : {types} }}"
    return runtime.load(compiled(mlir, main=signature(specs, specs)))


@pytest.mark.parametrize("size", [0, 1, 100])
def test_every_dtype_crosses_without_a_copy(passthrough, size):
    """Into IREE and back; a result that is an argument is a copy, so that nobody changes one by the other."""
    session = passthrough["main"]._session
    tensors = [(torch.rand(size) * 4).to(getattr(torch, name)) for name in ELEMENTS]
    crossed = [session.to_torch(session.to_iree(x), x.dtype) for x in tensors]
    for x, y, z in zip(tensors, passthrough(*tensors), crossed, strict=True):
        for result in (y, z):
            assert (result.dtype, result.shape) == (x.dtype, x.shape)
            assert torch.equal(result.view(torch.uint8), x.view(torch.uint8))
        assert size == 0 or z.data_ptr() == x.data_ptr() != y.data_ptr()


def test_fp8_and_unsigned_are_computed_in_their_type():
    mlir = """func.func @main(%x: tensor<?xf32>, %b: tensor<?xi8>)
        -> (tensor<?xf8E4M3FN>, tensor<?xbf16>, tensor<?xi8>) @SIG(main) {
      %q = arith.truncf %x : tensor<?xf32> to tensor<?xf8E4M3FN>
      %h = arith.truncf %x : tensor<?xf32> to tensor<?xbf16>
      %c = arith.addi %b, %b : tensor<?xi8>
      return %q, %h, %c : tensor<?xf8E4M3FN>, tensor<?xbf16>, tensor<?xi8>
    }"""
    inputs = (TensorSpec("x", "float32", ("n",)), TensorSpec("b", "uint8", ("m",)))
    outputs = tuple(TensorSpec(name, name, (None,)) for name in ("float8_e4m3fn", "bfloat16", "uint8"))
    x = torch.randn(33).sign() * (0.1 + torch.rand(33))  # IREE narrows wrongly near 2^-6
    b = torch.arange(100, 120).to(torch.uint8)
    for said in (outputs, None):
        q, h, c = runtime.load(compiled(mlir, main=signature(inputs, said)))(x, b)
        assert torch.equal(q.float(), x.to(torch.float8_e4m3fn).float())
        assert torch.equal(h, x.bfloat16())
        assert torch.equal(c.view(torch.uint8), b + b)
        assert c.dtype == (torch.uint8 if said else torch.int8)


def test_wrong_result_type_is_an_error(double):
    said = signature((X,), (TensorSpec("y", "bfloat16", (None, 4)),))
    broken = runtime.load(compiled(DOUBLE.replace("@SIG(negate)", ""), main=said))
    with pytest.raises(RunError, match="a result is float32, the signature says bfloat16"):
        broken(torch.ones(2, 4))


# --- checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(), r"main takes 1 argument \(x\), got 0"),
        (lambda p: p(torch.ones(1, 4), 2), r"main takes 1 argument \(x\), got 2"),
        (lambda p: p([1.0]), "argument x: expected a tensor, got list"),
        (lambda p: p(torch.ones(2, 5)), r"argument x: expected float32\[s0, 4\], got float32\[2, 5\]$"),
        (lambda p: p(torch.ones(4)), r"argument x: expected float32\[s0, 4\], got float32\[4\]$"),
        (lambda p: p(torch.ones(2, 4).half()), r"expected float32\[s0, 4\], got float16\[2, 4\]$"),
        (lambda p: p(torch.ones(2, 4, device="meta")), "argument x is on meta, the program runs on cpu"),
        (lambda p: p(x=torch.ones(2, 4)), r"main takes 1 argument \(x\) and no keywords, got x"),
    ],
)
def test_wrong_calls(program, call, message):
    with pytest.raises(RunError, match=message):
        call(program)


def test_shapes_that_passed_once_admit_no_others(program, monkeypatch):
    """Checks are remembered by dtype, shape and device; more shapes than are remembered work as well."""
    monkeypatch.setattr("lowering.runtime.function._REMEMBERED_PLANS", 2)
    for rows in (1, 2, 3, 1, 2, 3):
        x = torch.randn(rows, 4)
        assert torch.equal(program(x), x + x)
        for wrong in (x.half(), x.t().contiguous().repeat(2, 1), x.to("meta"), x.numpy()):
            with pytest.raises(RunError, match="argument x"):
                program(wrong)


def test_symbols_are_one_size_everywhere():
    inputs = (
        TensorSpec("pairs", "float32", ("2*s0", "s1 + 1")),
        TensorSpec("x", "float32", ("s0", "s1")),
        TensorSpec("y", "float32", ("s0", None)),
    )
    mlir = """func.func @main(%a: tensor<?x?xf32>, %b: tensor<?x?xf32>, %c: tensor<?x?xf32>)
      -> tensor<?x?xf32> @SIG(main) { return %c : tensor<?x?xf32> }"""
    program = runtime.load(compiled(mlir, main=signature(inputs, (TensorSpec("y", "float32", None),))))

    def call(*shapes):
        return program(*(torch.zeros(shape) for shape in shapes))

    assert call((6, 5), (3, 4), (3, 7)).shape == (3, 7)
    with pytest.raises(
        RunError, match=r"argument y: expected float32\[s0, \?\], got float32\[2, 7\] where s0 = 3"
    ):
        call((6, 5), (3, 4), (2, 7))
    with pytest.raises(RunError, match=r"argument pairs: .* where 2\*s0 = 6"):
        call((5, 5), (3, 4), (3, 7))


def test_structured_arguments_and_results():
    def tree(value):
        return pytree.treespec_dumps(pytree.tree_structure(value))

    a, b = (TensorSpec(name, "float32", (2,)) for name in "ab")
    told = signature(
        (a, Constant(3), b, Constant(None)),
        (b, Constant("yes"), a),
        input_tree=tree((([0, 0],), {"mask": 0, "cache": None})),
        output_tree=tree({"b": 0, "rest": (0, 0)}),
    )
    mlir = """func.func @main(%a: tensor<2xf32>, %b: tensor<2xf32>) -> (tensor<2xf32>, tensor<2xf32>)
      @SIG(main) { return %b, %a : tensor<2xf32>, tensor<2xf32> }"""
    program = runtime.load(compiled(mlir, main=told))
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    result = program([x, 3], cache=None, mask=y)
    assert torch.equal(result["b"], y) and result["rest"][0] == "yes" and torch.equal(result["rest"][1], x)
    with pytest.raises(RunError, match="argument 1 was compiled as the constant 3, got 4"):
        program([x, 4], mask=y, cache=None)
    with pytest.raises(RunError, match=r"argument 1 was compiled as the constant 3, got 3\.0"):
        program([x, 3.0], mask=y, cache=None)
    with pytest.raises(RunError, match=r"keywords mask, cache.*got 1 positional and keywords mask"):
        program([x, 3], mask=y)


def test_unknown_containers_give_a_flat_tuple():
    class Strange:
        pass

    pytree.register_pytree_node(
        Strange, lambda s: ([], None), lambda leaves, _: Strange(), serialized_type_name="strange"
    )
    text = pytree.treespec_dumps(pytree.tree_structure((1, Strange()))).replace("strange", "stranger")
    mlir = "func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> @SIG(main) { return %x : tensor<2xf32> }"
    x = TensorSpec("x", "float32", (2,))
    program = runtime.load(compiled(mlir, main=signature((x,), (x,), output_tree=text)))
    assert torch.equal(program(torch.ones(2)), torch.ones(2))


def test_column_tma_results_are_the_logical_view():
    mlir = """func.func @main(%x: tensor<?x?x8xf32>, %physical: tensor<2x?xf32>) -> tensor<2x?xf32>
      @SIG(main) { return %physical : tensor<2x?xf32> }"""
    inputs = (TensorSpec("x", "float32", ("b", "t", 8)), TensorSpec("p", "float32", (2, "(b*t + 3)//4*4")))
    physical = torch.arange(16.0).view(2, 8)
    for shape in (("b", "t", 2), ("b*t", 2)):
        scale = TensorSpec("scale", "float32", shape, "column_tma")
        result = runtime.load(compiled(mlir, main=signature(inputs, (scale,))))(
            torch.zeros(2, 3, 8), physical
        )
        assert result.shape == ((2, 3, 2) if len(shape) == 3 else (6, 2))
        assert result.stride() == ((3, 1, 8) if len(shape) == 3 else (1, 8))
        assert torch.equal(result.flatten(0, -2), physical.t()[:6])
    unknown = TensorSpec("scale", "float32", (None, 2), "column_tma")
    with pytest.raises(RunError, match=r"result scale: the size of .* does not follow"):
        runtime.load(compiled(mlir, main=signature(inputs, (unknown,))))(torch.zeros(2, 3, 8), physical)


@pytest.mark.parametrize("rows", [1, 4, 6, 9])
@pytest.mark.parametrize(
    ("layout", "element", "padded"),
    [
        ("column", "float32", "rows"),
        ("column_tma", "float32", "(rows + 3)//4*4"),
        ("ue8m0_packed", "int32", "(rows + 3)//4*4"),
    ],
)
def test_scale_layouts(layout, element, padded, rows):
    type_ = f"tensor<2x?x{ELEMENTS[element]}>"
    mlir = f"""func.func @main(%x: tensor<?x256xf32>, %physical: {type_}) -> {type_} @SIG(main) {{
      return %physical : {type_} }}"""
    inputs = (TensorSpec("x", "float32", ("rows", 256)), TensorSpec("p", element, (2, padded)))
    program = runtime.load(
        compiled(mlir, main=signature(inputs, (TensorSpec("scale", element, ("rows", 2), layout),)))
    )
    logical = torch.arange(2 * rows).view(rows, 2).to(getattr(torch, element))
    physical = ops.to_physical(logical, layout)
    result = program(torch.zeros(rows, 256), physical)
    assert torch.equal(result, logical)
    assert result.dtype == logical.dtype and result.stride() == (1, physical.shape[1])
    assert result.untyped_storage().nbytes() == physical.nbytes  # a view of what the program returned


def test_functions_of_the_torch_pipeline_are_listed_once():
    twin = DOUBLE.replace("@negate(", "@main$async(").replace("@SIG(negate)", "@SIG(main)")
    program = runtime.load(compiled(twin, main=signature((X,), (X,))))
    assert program.functions == ("main",)
    assert torch.equal(program(torch.ones(2, 4)), torch.full((2, 4), 2.0))


def test_unstated_signature_runs_unchecked():
    program = runtime.load(compiled(DOUBLE.replace("@SIG(negate)", ""), main=signature()))
    x = torch.randn(2, 4)
    assert torch.equal(program(x), x + x)
    with pytest.raises(RunError, match=r"main failed: .*expected 1 arguments but passed 2"):
        program(x, x)


@pytest.mark.parametrize("shared", [True, False])
def test_threads(program, double, shared):
    """Threads that call one program, and threads that load one each."""
    wrong: list[int] = []

    def work(rows: int) -> None:
        called = program if shared else runtime.load(double)
        x = torch.full((rows, 4), float(rows))
        wrong.extend(rows for _ in range(50) if not torch.equal(called(x), x + x))

    threads = [threading.Thread(target=work, args=(rows,)) for rows in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- files -------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_so(program, double):
    """IREE's threads are not in it: a call would wait for ever."""
    x = torch.ones(2, 4)
    program(x)
    child = os.fork()
    if child == 0:
        said = 0
        for attempt in (lambda: program(x), lambda: program(torch.ones(7, 4)), lambda: runtime.load(double)):
            try:
                attempt()
            except RunError as error:
                said += "forked" in str(error) and "spawn" in str(error)
        os._exit(said)
    for _ in range(300):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 3
    assert torch.equal(program(x), x + x)


def test_what_compile_returns_is_no_file() -> None:
    with pytest.raises(UsageError, match=r"not a dict; .* load\(compiled.vmfb\)"):
        runtime.load({})  # pyright: ignore[reportArgumentType]


def test_missing_and_foreign_files(tmp_path, double):
    with pytest.raises(RunError, match=r"nowhere.vmfb cannot be read: No such file"):
        runtime.load(tmp_path / "nowhere.vmfb")
    with pytest.raises(RunError, match="cannot be read: Is a directory"):
        runtime.load(tmp_path)
    model = tmp_path / "model.pt2"
    torch.save({"a": torch.ones(1)}, model)
    for foreign in (model, Path(__file__), Path(sys.executable)):
        with pytest.raises(RunError, match="is not a compiled program"):
            runtime.load(foreign)
    with pytest.raises(RunError, match=f"was not made by compile-to-vmfb: it carries no {SIGNATURE_KEY}"):
        runtime.load(
            compiled("func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> { return %x : tensor<2xf32> }")
        )


def test_a_later_version_is_named():
    with pytest.raises(RunError, match="signature has version 99, this vmfuse reads 4"):
        runtime.load(compiled(DOUBLE.replace("@SIG(negate)", ""), main=signature(version=99)))


def test_programs_of_earlier_releases_are_called_as_they_were():
    """Their signatures say nothing of an entry point that writes into the caller's memory."""
    said = signature((X,), (X,))
    earlier = said.to_json().replace('"placed":[],', "")
    assert earlier != said.to_json() and Signature.from_json(earlier) == said
    text = attributes(said).replace(r"\22placed\22:[],", "")
    assert "placed" not in text
    program = runtime.load(compiled(DOUBLE.replace("@SIG(main)", text), negate=said))
    assert torch.equal(program(torch.ones(3, 4)), torch.full((3, 4), 2.0))


def test_truncated_and_damaged_files_are_refused(double, tmp_path):
    """In a process of its own: what is being tested for is a crash."""
    script = """
import sys
from lowering.runtime import program as runtime
from lowering.errors import RunError
data = open(sys.argv[1], "rb").read()
lengths = {*range(0, 200), *range(200, len(data), 211), *range(len(data) - 200, len(data))}
flips = range(0, len(data), 97)
damaged = (data[:at] + bytes([data[at] ^ 255]) + data[at + 1:] for at in flips)
loaded = 0
for number, broken in enumerate([*(data[:n] for n in sorted(lengths)), *damaged]):
    path = sys.argv[2]
    open(path, "wb").write(broken)
    for source in (path, broken):
        try:
            runtime.load(source)
            loaded += 1
            assert len(broken) == len(data)
        except RunError as error:
            assert "\\n" not in str(error)
print("loaded", loaded)
"""
    command = [sys.executable, "-c", script, str(double), str(tmp_path / "broken.vmfb")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("loaded")


@pytest.mark.parametrize(
    ("target", "device", "message"),
    [
        (("gfx950", "hip", "gfx950"), "cuda", r"was compiled for gfx950 \(hip\) and cannot run on cuda"),
        (("gfx950", "hip", "gfx950"), "cpu", r"was compiled for gfx950 \(hip\) and cannot run on cpu"),
        (("cpu", "cpu", ""), "cuda", r"was compiled for cpu \(cpu\) and cannot run on cuda"),
        (("cpu", "cpu", ""), "tpu", "unknown device 'tpu'; known devices: cpu, cuda"),
        (("cpu", "cpu", "riscv64"), None, "was compiled for cpu; this machine lacks a riscv64 processor"),
        (("cpu", "cpu", host_arch() + "+avx99"), None, "was compiled for cpu; this machine lacks avx99"),
    ],
)
def test_other_devices_are_refused(target, device, message):
    name, backend, arch = target
    told = signature((X,), (X,), target=name, backend=backend, arch=arch)
    data = compiled(DOUBLE.replace("@SIG(negate)", ""), main=told)
    with pytest.raises((RunError, UsageError), match=message):
        runtime.load(data, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(("name", "backend"), [("sm_90", "cuda"), ("gfx950", "hip")])
def test_a_missing_driver_is_named(name, backend):
    told = signature((X,), (X,), target=name, backend=backend, arch=name)
    data = compiled(DOUBLE.replace("@SIG(negate)", ""), main=told)
    with pytest.raises(RunError, match=f"there is no {backend.upper()} driver or device on this machine"):
        runtime.load(data)


@pytest.mark.parametrize(
    ("backend", "arch", "message"),
    [
        ("cuda", "sm_90a", None),
        ("cuda", "sm_100a", "was compiled for sm_100a; cuda:0 is sm_90"),
        ("hip", "gfx950", r"was compiled for gfx950; the torch \S+ here is built for CUDA"),
    ],
)
def test_another_gpu_is_refused(monkeypatch, backend, arch, message):
    """On a pretended machine: torch for CUDA, and one sm_90."""
    monkeypatch.setattr(session, "hal_device", lambda backend, index: None)
    monkeypatch.setattr(session, "emulated_arch", lambda backend, index: None)
    monkeypatch.setattr(session, "gpu_arch", lambda index: "sm_90")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = signature(target=arch, backend=backend, arch=arch)
    if message is None:
        assert str(session.Place.for_program(told, None, "m.vmfb")) == "cuda:0"
        with pytest.raises(RunError, match="this machine has no cuda:1"):
            session.Place.for_program(told, "cuda:1", "m.vmfb")
        return
    with pytest.raises(RunError, match=message):
        session.Place.for_program(told, None, "m.vmfb")


def test_code_for_another_processor_is_an_error():
    from iree import compiler

    text = DOUBLE.replace("@SIG(negate)", "").replace(
        "@SIG(main)", attributes(signature((X,), (X,), arch=""))
    )
    flags = ["--iree-llvmcpu-target-triple=aarch64-unknown-linux-gnu"]
    data = compiler.compile_str(text, target_backends=["llvm-cpu"], extra_args=flags)
    with pytest.raises(RunError, match="cannot be loaded on cpu"):
        runtime.load(data)


# --- parameters --------------------------------------------------------------------------------

WEIGHTED = """
util.global private @w = #flow.parameter.named<"model"::"w"> : tensor<4xf32>
func.func @main(%x: tensor<4xf32>) -> tensor<4xf32> @SIG(main) {
  %w = util.global.load @w : tensor<4xf32>
  %y = arith.mulf %x, %w : tensor<4xf32>
  return %y : tensor<4xf32>
}
"""


def write_archive(path: Path, **weights: np.ndarray) -> Path:
    from iree import runtime as iree

    iree.save_archive_file(weights, path)
    return path


def test_parameters_in_a_file(tmp_path):
    weights = np.array([1, 2, 3, 4], dtype=np.float32)
    right = write_archive(tmp_path / "right.irpa", w=weights)
    other = write_archive(tmp_path / "other.irpa", w=weights + 1)
    cut = tmp_path / "cut.irpa"
    cut.write_bytes(right.read_bytes()[:-3900])
    x = TensorSpec("x", "float32", (4,))
    told = signature((x,), (x,), parameters=Parameters("model", parameter_digest(right)))
    data = compiled(WEIGHTED, main=told)
    result = runtime.load(data, parameters=right)(torch.ones(4))
    assert torch.equal(result, torch.from_numpy(weights))
    for path, message in [
        (None, "keeps its parameters in a separate .irpa file"),
        (other, "other.irpa does not hold the parameters that the program was compiled with"),
        (tmp_path / "none.irpa", "parameters .*none.irpa cannot be read: No such file"),
        (cut, "parameters .*cut.irpa cannot be used: it is truncated"),
        (Path(__file__), "cannot be used: it is not an .irpa parameter archive"),
    ]:
        with pytest.raises(RunError, match=message):
            runtime.load(data, parameters=path)


def test_parameters_that_are_not_wanted(double, tmp_path):
    path = write_archive(tmp_path / "w.irpa", w=np.ones(4, dtype=np.float32))
    with pytest.raises(RunError, match="carries its own parameters and takes none from"):
        runtime.load(double, parameters=path)


def test_the_digest_sees_every_region_of_a_large_file(tmp_path):
    weights = np.zeros(4 << 20, dtype=np.float32)
    digests = {parameter_digest(write_archive(tmp_path / "w.irpa", w=weights))}
    for scale in (1, 2):
        weights[:] = scale
        digests.add(parameter_digest(write_archive(tmp_path / "w.irpa", w=weights)))
    weights[-1] = 7
    digests.add(parameter_digest(write_archive(tmp_path / "w.irpa", w=weights)))
    assert len(digests) == 4


def test_only_the_runtime_is_imported(double):
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch_mlir", "safetensors") or name.startswith("iree.compiler"):
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Refuse())
import torch
import lowering
program = lowering.load(sys.argv[1])
assert torch.equal(program(torch.ones(2, 4)), torch.full((2, 4), 2.0))
from lowering.cli import run as run_cli
assert run_cli.main([sys.argv[1], "--input", "2x4xf32=1"]) == 0
assert not any(name.startswith("iree.compiler") for name in sys.modules)
"""
    command = [sys.executable, "-c", script, str(double)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
