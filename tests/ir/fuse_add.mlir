// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// The residual add before the norm goes into the kernel, with the rounding it had.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// An eager x + r is rounded to bfloat16 before the norm reads it.  Nobody else reads the sum: it is not written.
// CHECK-LABEL: func.func @eager_add
// CHECK:         %[[ROW:.*]]:2 = torch.operator "vmfuse.row"(%arg0, %arg1, %arg2) {{{.*}}norm = {{{.*}}residual = "rounded"}
// CHECK-NOT:     torch.aten.add
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as add_norm_quant
func.func @eager_add(%x: !x, %r: !x, %w: !w) -> (!q, !s) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !x, !x, !torch.int -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// CHECK-LABEL: func.func @eager_add_read_again
// CHECK:         %[[ROW:.*]]:3 = torch.operator "vmfuse.row"(%arg0, %arg1, %arg2) {{{.*}}residual = "rounded"{{.*}}writes_sum = true
// CHECK-NEXT:    return %[[ROW]]#1, %[[ROW]]#2, %[[ROW]]#0
func.func @eager_add_read_again(%x: !x, %r: !x, %w: !w) -> (!q, !s, !x) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !x, !x, !torch.int -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %sum : !q, !s, !x
}

// add_rms_norm does not round before the statistic; its second result is the rounded sum.
// CHECK-LABEL: func.func @add_rms_norm
// CHECK:         %[[ROW:.*]]:3 = torch.operator "vmfuse.row"(%arg0, %arg1, %arg2) {{{.*}}residual = "exact"}{{.*}}writes_sum = true
// CHECK-NEXT:    return %[[ROW]]#1, %[[ROW]]#2, %[[ROW]]#0
func.func @add_rms_norm(%x: !x, %r: !x, %w: !w) -> (!q, !s, !x) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y, %sum = torch.operator "torch.lowering.add_rms_norm"(%x, %r, %w, %eps) : (!x, !x, !w, !torch.float) -> (!x, !x)
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %sum : !q, !s, !x
}

// CHECK-LABEL: func.func @add_rms_norm_sum_unread
// CHECK:         torch.operator "vmfuse.row"(%arg0, %arg1, %arg2) {{{.*}}residual = "exact"
func.func @add_rms_norm_sum_unread(%x: !x, %r: !x, %w: !w) -> (!q, !s) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y, %sum = torch.operator "torch.lowering.add_rms_norm"(%x, %r, %w, %eps) : (!x, !x, !w, !torch.float) -> (!x, !x)
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// In float32 there is nothing to round, and both are one contract.
// CHECK-LABEL: func.func @float32_add
// CHECK:         torch.operator "vmfuse.row"(%arg0, %arg1) {{{.*}}residual = "exact"
func.func @float32_add(%x: !torch.vtensor<[?,256],f32>, %r: !torch.vtensor<[?,256],f32>) -> (!q, !s) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !torch.vtensor<[?,256],f32>, !torch.vtensor<[?,256],f32>, !torch.int -> !torch.vtensor<[?,256],f32>
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %none, %eps) : (!torch.vtensor<[?,256],f32>, !torch.none, !torch.float) -> !torch.vtensor<[?,256],f32>
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!torch.vtensor<[?,256],f32>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// One add is the kernel's; the one before it stays.
// CHECK-LABEL: func.func @an_add_before_add_rms_norm
// CHECK:         %[[SUM:.*]] = torch.aten.add.Tensor
// CHECK:         torch.operator "vmfuse.row"(%[[SUM]], %arg1, %arg2) {{{.*}}residual = "exact"
func.func @an_add_before_add_rms_norm(%x: !x, %r: !x, %w: !w) -> (!q, !s) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !x, !x, !torch.int -> !x
  %y, %t = torch.operator "torch.lowering.add_rms_norm"(%sum, %r, %w, %eps) : (!x, !x, !w, !torch.float) -> (!x, !x)
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}
