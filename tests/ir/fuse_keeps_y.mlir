// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// The 16-bit result is written only if something besides the fused quantizations reads it.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @read_by_the_caller
// CHECK:         %[[ROW:.*]]:3 = torch.operator "vmfuse.row"{{.*}}writes_y = true
// CHECK-NEXT:    return %[[ROW]]#0, %[[ROW]]#1, %[[ROW]]#2
func.func @read_by_the_caller(%x: !x, %w: !w) -> (!x, !q, !s) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %y, %q, %s : !x, !q, !s
}

// CHECK-LABEL: func.func @read_by_an_operation
// CHECK:         %[[ROW:.*]]:3 = torch.operator "vmfuse.row"{{.*}}writes_y = true
// CHECK:         torch.aten.relu %[[ROW]]#0
func.func @read_by_an_operation(%x: !x, %w: !w) -> (!q, !s, !x) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  %z = torch.aten.relu %y : !x -> !x
  return %q, %s, %z : !q, !s, !x
}

// Also when it is read between norm and quantization: the kernel stands where the norm stood.
// CHECK-LABEL: func.func @read_before_the_quantization
// CHECK:         %[[ROW:.*]]:3 = torch.operator "vmfuse.row"{{.*}}writes_y = true
// CHECK-NEXT:    torch.aten.relu %[[ROW]]#0
func.func @read_before_the_quantization(%x: !x, %w: !w) -> (!q, !s, !x) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %z = torch.aten.relu %y : !x -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %z : !q, !s, !x
}

// What nobody reads does not read.
// CHECK-LABEL: func.func @read_by_a_dead_operation
// CHECK:         %[[ROW:.*]]:2 = torch.operator "vmfuse.row"
func.func @read_by_a_dead_operation(%x: !x, %w: !w) -> (!q, !s) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %z = torch.aten.relu %y : !x -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}
