// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// What no kernel computes is left out, and the ledger says why.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @dtype
// CHECK:         torch.operator "vmfuse.norm"
// CHECK-NOT:     vmfuse.row
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} unfused: float64 rows have no kernel; bfloat16, float16, float32 have
func.func @dtype(%x: !torch.vtensor<[?,256],f64>) -> !torch.vtensor<[?,256],f64> {
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %y = torch.operator "torch.lowering.rms_norm"(%x, %none, %eps) : (!torch.vtensor<[?,256],f64>, !torch.none, !torch.float) -> !torch.vtensor<[?,256],f64>
  return %y : !torch.vtensor<[?,256],f64>
}

// CHECK-LABEL: func.func @unknown_row_size
// CHECK:         torch.operator "vmfuse.norm"
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} unfused: the size of the last axis is unknown until run time; a kernel is made for one size
func.func @unknown_row_size(%x: !torch.vtensor<[?,?],bf16>) -> !torch.vtensor<[?,?],bf16> {
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %y = torch.operator "torch.lowering.rms_norm"(%x, %none, %eps) : (!torch.vtensor<[?,?],bf16>, !torch.none, !torch.float) -> !torch.vtensor<[?,?],bf16>
  return %y : !torch.vtensor<[?,?],bf16>
}

// The norm becomes a kernel of its own and writes y for the quantization, which is left to IREE.
// CHECK-LABEL: func.func @group_size_without_kernel
// CHECK:         %[[Y:.*]] = torch.operator "vmfuse.row"(%arg0, %arg1) {{{.*}}writes_y = true
// CHECK:         torch.operator "vmfuse.group_quant"(%[[Y]])
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} unfused: The row kernel quantizes groups of 32, 64 or 128 elements, not 16.
func.func @group_size_without_kernel(%x: !x, %w: !w) -> (!q, !torch.vtensor<[?,16],f32>) {
  %eps = torch.constant.float 1.0e-06
  %int16 = torch.constant.int 16
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int16, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !torch.vtensor<[?,16],f32>)
  return %q, %s : !q, !torch.vtensor<[?,16],f32>
}

// One quantization without a kernel does not keep the other from the norm.
// CHECK-LABEL: func.func @one_of_two
// CHECK:         %[[ROW:.*]]:3 = torch.operator "vmfuse.row"(%arg0, %arg1) {sites = [0, 2]
// CHECK:         torch.operator "vmfuse.group_quant"(%[[ROW]]#0)
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} unfused: The row kernel quantizes groups of 32, 64 or 128 elements, not 16.
// CHECK-NEXT:  // site 2: group_quant at line {{[0-9]+}} fused as norm_quant
func.func @one_of_two(%x: !x, %w: !w) -> (!q, !torch.vtensor<[?,16],f32>, !q, !s) {
  %eps = torch.constant.float 1.0e-06
  %int16 = torch.constant.int 16
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %int128 = torch.constant.int 128
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q0, %s0 = torch.operator "torch.lowering.group_quant"(%y, %int16, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !torch.vtensor<[?,16],f32>)
  %q1, %s1 = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q0, %s0, %q1, %s1 : !q, !torch.vtensor<[?,16],f32>, !q, !s
}

// CHECK-LABEL: func.func @group_does_not_divide
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} unfused: Rows of 192 elements do not divide into groups of 128.
func.func @group_does_not_divide(%x: !torch.vtensor<[?,192],bf16>) -> (!torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,1],f32>) {
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %none, %eps) : (!torch.vtensor<[?,192],bf16>, !torch.none, !torch.float) -> !torch.vtensor<[?,192],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!torch.vtensor<[?,192],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,1],f32>)
  return %q, %s : !torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,1],f32>
}
