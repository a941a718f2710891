// RUN: %opt %s --steps raise,sink --report | %filecheck %s

// A view between producer and quantization moves below the quantization: q and scale are viewed instead of y.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>
!x3 = !torch.vtensor<[?,4,256],bf16>
!q2 = !torch.vtensor<[?,256],f8E4M3FN>
!s2 = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @flatten_rows
// CHECK:         %[[Y:.*]] = torch.operator "vmfuse.norm"(%arg0, %arg1)
// CHECK:         %[[QUANT:.*]]:2 = torch.operator "vmfuse.group_quant"(%[[Y]]) {{{.*}}} : (!torch.vtensor<[?,4,256],bf16>) -> (!torch.vtensor<[?,4,256],f8E4M3FN>, !torch.vtensor<[?,4,2],f32>)
// CHECK:         %[[Q:.*]] = torch.aten.view %[[QUANT]]#0, {{.*}} -> !torch.vtensor<[?,256],f8E4M3FN>
// CHECK:         %[[S:.*]] = torch.aten.view %[[QUANT]]#1, {{.*}} -> !torch.vtensor<[?,2],f32>
// CHECK:         return %[[Q]], %[[S]]
func.func @flatten_rows(%x: !x3, %w: !w) -> (!q, !s) {
  %eps = torch.constant.float 1.0e-06
  %minus1 = torch.constant.int -1
  %int256 = torch.constant.int 256
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x3, !w, !torch.float) -> !x3
  %flat_shape = torch.prim.ListConstruct %minus1, %int256 : (!torch.int, !torch.int) -> !torch.list<int>
  %flat = torch.aten.view %y, %flat_shape : !x3, !torch.list<int> -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%flat, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// CHECK-LABEL: func.func @unsqueeze
// CHECK:         %[[QUANT:.*]]:2 = torch.operator "vmfuse.group_quant"(%{{.*}}) {{{.*}}} : (!torch.vtensor<[?,256],bf16>)
// CHECK-NEXT:    %[[Q:.*]] = torch.aten.unsqueeze %[[QUANT]]#0
// CHECK-NEXT:    %[[S:.*]] = torch.aten.unsqueeze %[[QUANT]]#1
// CHECK-NEXT:    return %[[Q]], %[[S]]
func.func @unsqueeze(%x: !x, %w: !w) -> (!torch.vtensor<[1,?,256],f8E4M3FN>, !torch.vtensor<[1,?,2],f32>) {
  %eps = torch.constant.float 1.0e-06
  %int0 = torch.constant.int 0
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %y3 = torch.aten.unsqueeze %y, %int0 : !x, !torch.int -> !torch.vtensor<[1,?,256],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%y3, %int128, %int24, %float32, %row) : (!torch.vtensor<[1,?,256],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[1,?,256],f8E4M3FN>, !torch.vtensor<[1,?,2],f32>)
  return %q, %s : !torch.vtensor<[1,?,256],f8E4M3FN>, !torch.vtensor<[1,?,2],f32>
}

// The 16-bit view has a reader of its own and stays for it.
// CHECK-LABEL: func.func @the_view_stays_for_its_other_reader
// CHECK:         %[[Y:.*]] = torch.operator "vmfuse.norm"
// CHECK:         %[[QUANT:.*]]:2 = torch.operator "vmfuse.group_quant"(%[[Y]])
// CHECK:         %[[VIEW:.*]] = torch.aten.unsqueeze %[[Y]]
// CHECK:         torch.aten.relu %[[VIEW]]
func.func @the_view_stays_for_its_other_reader(%x: !x, %w: !w) -> (!torch.vtensor<[1,?,256],f8E4M3FN>, !torch.vtensor<[1,?,2],f32>, !torch.vtensor<[1,?,256],bf16>) {
  %eps = torch.constant.float 1.0e-06
  %int0 = torch.constant.int 0
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %y3 = torch.aten.unsqueeze %y, %int0 : !x, !torch.int -> !torch.vtensor<[1,?,256],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%y3, %int128, %int24, %float32, %row) : (!torch.vtensor<[1,?,256],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[1,?,256],f8E4M3FN>, !torch.vtensor<[1,?,2],f32>)
  %other = torch.aten.relu %y3 : !torch.vtensor<[1,?,256],bf16> -> !torch.vtensor<[1,?,256],bf16>
  return %q, %s, %other : !torch.vtensor<[1,?,256],f8E4M3FN>, !torch.vtensor<[1,?,2],f32>, !torch.vtensor<[1,?,256],bf16>
}
