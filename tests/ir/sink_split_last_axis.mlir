// RUN: %opt %s --steps raise,sink --report | %filecheck %s

// A view may split the last axis into whole groups, or join what holds whole groups: the groups are the same.
// The scale's last axis is split or joined like the row, counted in groups.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @split_into_heads
// CHECK:         %[[QUANT:.*]]:2 = torch.operator "vmfuse.group_quant"(%{{.*}}) {{{.*}}} : (!torch.vtensor<[?,256],bf16>) -> (!torch.vtensor<[?,256],f8E4M3FN>, !torch.vtensor<[?,4],f32>)
// CHECK:         torch.aten.view %[[QUANT]]#0, {{.*}} -> !torch.vtensor<[?,2,128],f8E4M3FN>
// CHECK:         %[[PER_HEAD:.*]] = torch.constant.int 2
// CHECK:         torch.prim.ListConstruct %{{.*}}, %{{.*}}, %[[PER_HEAD]]
// CHECK:         torch.aten.view %[[QUANT]]#1, {{.*}} -> !torch.vtensor<[?,2,2],f32>
func.func @split_into_heads(%x: !x, %w: !w) -> (!torch.vtensor<[?,2,128],f8E4M3FN>, !torch.vtensor<[?,2,2],f32>) {
  %eps = torch.constant.float 1.0e-06
  %minus1 = torch.constant.int -1
  %int2 = torch.constant.int 2
  %int128 = torch.constant.int 128
  %int64 = torch.constant.int 64
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %heads_shape = torch.prim.ListConstruct %minus1, %int2, %int128 : (!torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %heads = torch.aten.view %y, %heads_shape : !x, !torch.list<int> -> !torch.vtensor<[?,2,128],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%heads, %int64, %int24, %float32, %row) : (!torch.vtensor<[?,2,128],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,2,128],f8E4M3FN>, !torch.vtensor<[?,2,2],f32>)
  return %q, %s : !torch.vtensor<[?,2,128],f8E4M3FN>, !torch.vtensor<[?,2,2],f32>
}

// CHECK-LABEL: func.func @unflatten
// CHECK:         %[[QUANT:.*]]:2 = torch.operator "vmfuse.group_quant"(%{{.*}}) {{{.*}}} : (!torch.vtensor<[?,256],bf16>)
// CHECK:         torch.aten.unflatten.int %[[QUANT]]#0, {{.*}} -> !torch.vtensor<[?,2,128],f8E4M3FN>
// CHECK:         torch.aten.unflatten.int %[[QUANT]]#1, {{.*}} -> !torch.vtensor<[?,2,1],f32>
func.func @unflatten(%x: !x, %w: !w) -> (!torch.vtensor<[?,2,128],f8E4M3FN>, !torch.vtensor<[?,2,1],f32>) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %axis = torch.constant.int -1
  %two = torch.constant.int 2
  %half = torch.constant.int 128
  %l = torch.prim.ListConstruct %two, %half : (!torch.int, !torch.int) -> !torch.list<int>
  %heads = torch.aten.unflatten.int %y, %axis, %l : !x, !torch.int, !torch.list<int> -> !torch.vtensor<[?,2,128],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%heads, %int128, %int24, %float32, %row) : (!torch.vtensor<[?,2,128],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,2,128],f8E4M3FN>, !torch.vtensor<[?,2,1],f32>)
  return %q, %s : !torch.vtensor<[?,2,128],f8E4M3FN>, !torch.vtensor<[?,2,1],f32>
}

// CHECK-LABEL: func.func @join_heads
// CHECK:         %[[QUANT:.*]]:2 = torch.operator "vmfuse.group_quant"(%{{.*}}) {{{.*}}} : (!torch.vtensor<[?,4,64],bf16>) -> (!torch.vtensor<[?,4,64],f8E4M3FN>, !torch.vtensor<[?,4,1],f32>)
// CHECK:         torch.aten.view %[[QUANT]]#0, {{.*}} -> !torch.vtensor<[?,256],f8E4M3FN>
// CHECK:         torch.aten.view %[[QUANT]]#1, {{.*}} -> !torch.vtensor<[?,4],f32>
func.func @join_heads(%x: !torch.vtensor<[?,4,64],bf16>) -> (!q, !torch.vtensor<[?,4],f32>) {
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %minus1 = torch.constant.int -1
  %int256 = torch.constant.int 256
  %int64 = torch.constant.int 64
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %none, %eps) : (!torch.vtensor<[?,4,64],bf16>, !torch.none, !torch.float) -> !torch.vtensor<[?,4,64],bf16>
  %flat_shape = torch.prim.ListConstruct %minus1, %int256 : (!torch.int, !torch.int) -> !torch.list<int>
  %flat = torch.aten.view %y, %flat_shape : !torch.vtensor<[?,4,64],bf16>, !torch.list<int> -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%flat, %int64, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !torch.vtensor<[?,4],f32>)
  return %q, %s : !q, !torch.vtensor<[?,4],f32>
}
