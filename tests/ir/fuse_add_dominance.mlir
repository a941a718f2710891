// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// When the sum is read before the norm, the kernel that writes it must stand where the add stood.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @sum_read_before_the_norm
// CHECK:         %[[ROW:.*]]:3 = torch.operator "vmfuse.row"(%arg0, %arg1, %arg2) {{{.*}}residual = "rounded"
// CHECK-NEXT:    %[[EARLY:.*]] = torch.aten.relu %[[ROW]]#0
// CHECK-NEXT:    return %[[ROW]]#1, %[[ROW]]#2, %[[EARLY]]
func.func @sum_read_before_the_norm(%x: !x, %r: !x, %w: !w) -> (!q, !s, !x) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !x, !x, !torch.int -> !x
  %early = torch.aten.relu %sum : !x -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %early : !q, !s, !x
}

// There the weight must be known already.  Here it is computed in between: the add stays outside.
// CHECK-LABEL: func.func @weight_made_from_the_sum
// CHECK:         %[[SUM:.*]] = torch.aten.add.Tensor %arg0, %arg1
// CHECK-NEXT:    %[[EARLY:.*]] = torch.aten.relu %[[SUM]]
// CHECK-NEXT:    %[[WEIGHT:.*]] = torch.aten.relu %arg2
// CHECK-NEXT:    torch.operator "vmfuse.row"(%[[SUM]], %[[WEIGHT]]) {
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant
func.func @weight_made_from_the_sum(%x: !x, %r: !x, %v: !w) -> (!q, !s, !x) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !x, !x, !torch.int -> !x
  %early = torch.aten.relu %sum : !x -> !x
  %w = torch.aten.relu %v : !w -> !w
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %early : !q, !s, !x
}

// Read only afterwards, the sum may come as late as the norm, and the weight too.
// CHECK-LABEL: func.func @sum_read_after_the_norm
// CHECK:         %[[WEIGHT:.*]] = torch.aten.relu %arg2
// CHECK-NEXT:    %[[ROW:.*]]:3 = torch.operator "vmfuse.row"(%arg0, %arg1, %[[WEIGHT]]) {
// CHECK-NEXT:    torch.aten.relu %[[ROW]]#0
func.func @sum_read_after_the_norm(%x: !x, %r: !x, %v: !w) -> (!q, !s, !x) {
  %int1 = torch.constant.int 1
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %sum = torch.aten.add.Tensor %x, %r, %int1 : !x, !x, !torch.int -> !x
  %w = torch.aten.relu %v : !w -> !w
  %y = torch.operator "torch.lowering.rms_norm"(%sum, %w, %eps) : (!x, !w, !torch.float) -> !x
  %late = torch.aten.relu %sum : !x -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %late : !q, !s, !x
}
