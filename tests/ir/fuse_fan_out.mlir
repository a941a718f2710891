// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// The fan-out this project started from: a norm whose result is quantized twice.  One row kernel takes all three;
// equal quantizations are written once and returned twice.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @equal_quantizations_once
// CHECK:         %[[X:.*]] = torch.aten.relu %arg0
// CHECK-NEXT:    %[[ROW:.*]]:2 = torch.operator "vmfuse.row"(%[[X]], %arg1) {sites = [0, 1, 2], spec = {{{.*}}hidden = 256 : i64, norm = {{{.*}}}, quantizations = [{{{[^}]*}}}], weight_dtype = "bfloat16"}}
// CHECK-NEXT:    return %[[ROW]]#0, %[[ROW]]#1, %[[ROW]]#0, %[[ROW]]#1
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} fused as norm_quant
// CHECK-NEXT:  // site 2: group_quant at line {{[0-9]+}} fused as norm_quant
func.func @equal_quantizations_once(%x: !x, %w: !w) -> (!q, !s, !q, !s) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %r = torch.aten.relu %x : !x -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%r, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q0, %s0 = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  %q1, %s1 = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q0, %s0, %q1, %s1 : !q, !s, !q, !s
}

// A view between them changes nothing.
// CHECK-LABEL: func.func @through_a_view
// CHECK:         %[[ROW:.*]]:2 = torch.operator "vmfuse.row"(%{{.*}}, %arg1) {sites = [0, 1, 2]
// CHECK-NOT:     vmfuse
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} fused as norm_quant
// CHECK-NEXT:  // site 2: group_quant at line {{[0-9]+}} fused as norm_quant
func.func @through_a_view(%x: !x, %w: !w) -> (!q, !s, !q, !s) {
  %eps = torch.constant.float 1.0e-06
  %minus1 = torch.constant.int -1
  %int256 = torch.constant.int 256
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %r = torch.aten.relu %x : !x -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%r, %w, %eps) : (!x, !w, !torch.float) -> !x
  %v_shape = torch.prim.ListConstruct %minus1, %int256 : (!torch.int, !torch.int) -> !torch.list<int>
  %v = torch.aten.view %y, %v_shape : !x, !torch.list<int> -> !x
  %q0, %s0 = torch.operator "torch.lowering.group_quant"(%v, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  %q1, %s1 = torch.operator "torch.lowering.group_quant"(%v, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q0, %s0, %q1, %s1 : !q, !s, !q, !s
}

// Different quantizations are outputs of their own, of the same kernel.
// CHECK-LABEL: func.func @different_quantizations
// CHECK:         %[[ROW:.*]]:6 = torch.operator "vmfuse.row"(%arg0, %arg1) {sites = [0, 1, 2, 3], {{.*}}quantizations = [{{{.*}}group = 128 : i64}, {{{.*}}group = 64 : i64}, {{{.*}}group = 128 : i64, layout = "column_tma"}]
// CHECK-NEXT:    return %[[ROW]]#0, %[[ROW]]#1, %[[ROW]]#2, %[[ROW]]#3, %[[ROW]]#4, %[[ROW]]#5
func.func @different_quantizations(%x: !x, %w: !w) -> (!q, !s, !q, !torch.vtensor<[?,4],f32>, !q, !s) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %int64 = torch.constant.int 64
  %column_tma = torch.constant.str "column_tma"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q0, %s0 = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  %q1, %s1 = torch.operator "torch.lowering.group_quant"(%y, %int64, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !torch.vtensor<[?,4],f32>)
  %q2, %s2 = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %column_tma) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q0, %s0, %q1, %s1, %q2, %s2 : !q, !s, !q, !torch.vtensor<[?,4],f32>, !q, !s
}

// A norm nobody quantizes is a row kernel too.
// CHECK-LABEL: func.func @no_quantization
// CHECK:         torch.operator "vmfuse.row"{{.*}}writes_y = true
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm
func.func @no_quantization(%x: !x, %w: !w) -> !x {
  %eps = torch.constant.float 1.0e-06
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  return %y : !x
}

// Two norms of one tensor are two kernels: neither reads what the other makes.
// CHECK-LABEL: func.func @two_norms_of_one_tensor
// CHECK:         torch.operator "vmfuse.row"{{.*}}sites = [0, 2]
// CHECK:         torch.operator "vmfuse.row"{{.*}}sites = [1, 3]
func.func @two_norms_of_one_tensor(%x: !x, %w: !w) -> (!q, !s, !q, !s) {
  %eps = torch.constant.float 1.0e-06
  %eps2 = torch.constant.float 1.0e-05
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %z = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps2) : (!x, !w, !torch.float) -> !x
  %q0, %s0 = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  %q1, %s1 = torch.operator "torch.lowering.group_quant"(%z, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q0, %s0, %q1, %s1 : !q, !s, !q, !s
}
