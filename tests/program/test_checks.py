"""What a program asserts of sizes is checked before it computes anything."""

from __future__ import annotations

from iree.compiler import ir

from lowering.program.checks import check_first

ASSERTIONS = """
util.func public @f(%view: !hal.buffer_view, %other: !hal.buffer_view) -> tensor<?x8xf32> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c4 = arith.constant 4 : index
  %n = hal.buffer_view.dim<%view : !hal.buffer_view>[0] : index
  %x = hal.tensor.import %view : !hal.buffer_view -> tensor<?x2x4xf32>{%n}
  %m = hal.buffer_view.dim<%other : !hal.buffer_view>[0] : index
  %y = hal.tensor.import %other : !hal.buffer_view -> tensor<?xi64>{%m}
  %flat = tensor.collapse_shape %x [[0, 1], [2]] : tensor<?x2x4xf32> into tensor<?x4xf32>
  %rows = tensor.dim %flat, %c0 : tensor<?x4xf32>
  %empty = tensor.empty(%rows) : tensor<?x4xf32>
  %copy = linalg.copy ins(%flat : tensor<?x4xf32>) outs(%empty : tensor<?x4xf32>) -> tensor<?x4xf32>
  %size = tensor.dim %copy, %c0 : tensor<?x4xf32>
  %long = arith.cmpi sge, %size, %c4 : index
  cf.assert %long, "of a size that is computed"
  %half = arith.divui %size, %c4 : index
  %part = tensor.extract_slice %copy[0, 0] [%half, 4] [1, 1] : tensor<?x4xf32> to tensor<?x4xf32>
  %cut = tensor.dim %part, %c0 : tensor<?x4xf32>
  %some = arith.cmpi ne, %cut, %c0 : index
  cf.assert %some, "of a slice"
  %first = tensor.extract %y[%c0] : tensor<?xi64>
  %place = arith.index_cast %first : i64 to index
  %inside = arith.cmpi slt, %place, %rows : index
  cf.assert %inside, "of a value"
  %wide = tensor.expand_shape %part [[0], [1, 2]] output_shape [%cut, 4, 1]
      : tensor<?x4xf32> into tensor<?x4x1xf32>
  %high = tensor.dim %wide, %c0 : tensor<?x4x1xf32>
  %even = arith.cmpi eq, %high, %cut : index
  cf.assert %even, "of another shape"
  %result = tensor.empty(%high) : tensor<?x8xf32>
  util.return %result : tensor<?x8xf32>
}
"""


def test_those_of_sizes_come_first() -> None:
    with ir.Context():
        module = ir.Module.parse(ASSERTIONS)
    check_first(module)
    assert module.operation.verify()
    (function,) = module.body.operations
    found: list[str] = []
    for op in (op.operation for op in function.regions[0].blocks[0].operations):
        if op.name == "cf.assert":
            found.append(ir.StringAttr(op.attributes["msg"]).value)
        elif op.name in ("tensor.collapse_shape", "tensor.extract"):
            found.append(op.name)
    first = ["of a size that is computed", "of a slice", "of another shape"]
    assert found == [*first, "tensor.collapse_shape", "tensor.extract", "of a value"]
