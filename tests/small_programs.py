"""Programs written as MLIR, with a signature: what the runtime's tests load."""

from __future__ import annotations

from lowering.signature import SIGNATURE_KEY, Signature, TensorSpec, host_arch

ELEMENTS = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
    "float8_e4m3fn": "f8E4M3FN",
    "float8_e4m3fnuz": "f8E4M3FNUZ",
    "float8_e5m2": "f8E5M2",
    "float8_e8m0fnu": "f8E8M0FNU",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "i8",
    "bool": "i1",
}


def signature(inputs=None, outputs=None, **fields) -> Signature:
    return Signature(
        **{"target": "cpu", "backend": "cpu", "arch": host_arch(), **fields}, inputs=inputs, outputs=outputs
    )


def attributes(value: Signature) -> str:
    text = value.to_json().replace("\\", "\\5C").replace('"', "\\22")
    return f'attributes {{iree.reflection = {{{SIGNATURE_KEY} = "{text}"}}}}'


def compiled(mlir: str, **signatures: Signature) -> bytes:
    """A cpu program; ``@SIG(name)`` in ``mlir`` stands for the attributes of that function."""
    from iree import compiler

    for name, value in signatures.items():
        mlir = mlir.replace(f"@SIG({name})", attributes(value))
    flags = ["--iree-llvmcpu-target-cpu=host"]
    return compiler.compile_str(mlir, target_backends=["llvm-cpu"], extra_args=flags)


X = TensorSpec("x", "float32", ("s0", 4))
DOUBLE = """
func.func @main(%x: tensor<?x4xf32>) -> tensor<?x4xf32> @SIG(main) {
  %y = arith.addf %x, %x : tensor<?x4xf32>
  return %y : tensor<?x4xf32>
}
func.func @negate(%x: tensor<?x4xf32>) -> tensor<?x4xf32> @SIG(negate) {
  %y = arith.negf %x : tensor<?x4xf32>
  return %y : tensor<?x4xf32>
}
"""
