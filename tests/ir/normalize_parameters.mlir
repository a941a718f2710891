// RUN: %opt %s --steps normalize | %filecheck %s

// Parameters are known from the start: their loads and casts stand before everything else, so that a
// kernel may stand anywhere and still find its weight.

util.global private @weight = #flow.parameter.named<"model"::"weight"> : tensor<8xbf16>

// CHECK-LABEL: func.func @main
// CHECK:         %[[LOADED:.*]] = util.global.load immutable @weight
// CHECK-NEXT:    %[[WEIGHT:.*]] = torch_c.from_builtin_tensor %[[LOADED]]
// CHECK:         %[[Y:.*]] = torch.aten.relu %arg0
// CHECK:         torch.aten.mul.Tensor %[[Y]], %[[WEIGHT]]
func.func @main(%x: !torch.vtensor<[?,8],bf16>) -> !torch.vtensor<[?,8],bf16> {
  %y = torch.aten.relu %x : !torch.vtensor<[?,8],bf16> -> !torch.vtensor<[?,8],bf16>
  %loaded = util.global.load immutable @weight : tensor<8xbf16>
  %weight = torch_c.from_builtin_tensor %loaded : tensor<8xbf16> -> !torch.vtensor<[8],bf16>
  %z = torch.aten.mul.Tensor %y, %weight : !torch.vtensor<[?,8],bf16>, !torch.vtensor<[8],bf16> -> !torch.vtensor<[?,8],bf16>
  return %z : !torch.vtensor<[?,8],bf16>
}
