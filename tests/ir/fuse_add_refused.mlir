// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// Adds that are not x + residual stay outside; norm and quantization still fuse behind them.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>
!row = !torch.vtensor<[256],bf16>

// CHECK-LABEL: func.func @alpha_two
// CHECK:         %[[SUM:.*]] = torch.aten.add.Tensor
// CHECK-NEXT:    torch.operator "vmfuse.row"(%[[SUM]], %arg2) {
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant
func.func @alpha_two(%x: !x, %r: !x, %w: !w) -> (!q, !s) {
  %int2 = torch.constant.int 2
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int2 : !x, !x, !torch.int -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// CHECK-LABEL: func.func @broadcast_bias
// CHECK:         %[[SUM:.*]] = torch.aten.add.Tensor
// CHECK-NEXT:    torch.operator "vmfuse.row"(%[[SUM]], %arg2) {
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant
func.func @broadcast_bias(%x: !x, %bias: !row, %w: !w) -> (!q, !s) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %bias, %int1 : !x, !row, !torch.int -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// CHECK-LABEL: func.func @mixed_dtypes
// CHECK:         %[[SUM:.*]] = torch.aten.add.Tensor
// CHECK-NEXT:    torch.operator "vmfuse.row"(%[[SUM]]) {
func.func @mixed_dtypes(%x: !x, %r: !torch.vtensor<[?,256],f32>) -> (!q, !s) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !x, !torch.vtensor<[?,256],f32>, !torch.int -> !torch.vtensor<[?,256],f32>
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %none, %eps) : (!torch.vtensor<[?,256],f32>, !torch.none, !torch.float) -> !torch.vtensor<[?,256],f32>
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!torch.vtensor<[?,256],f32>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}
