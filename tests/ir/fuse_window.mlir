// RUN: %opt %s --steps normalize,raise,sink,fuse | %filecheck %s

// A slice of the last axis is read where it is; a slice of a slice too, and one below a view of the other axes.

!wide = !torch.vtensor<[?,768],bf16>
!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @a_part
// CHECK-NOT:     torch.aten.slice
// CHECK:         torch.operator "vmfuse.row"(%arg0, %arg1) {{{.*}}x_window = {offset = 384 : i64, pitch = 768 : i64}
func.func @a_part(%wide: !wide, %w: !w) -> (!q, !s) {
  %int1 = torch.constant.int 1
  %int24 = torch.constant.int 24
  %int128 = torch.constant.int 128
  %int384 = torch.constant.int 384
  %int640 = torch.constant.int 640
  %eps = torch.constant.float 1.0e-06
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %x = torch.aten.slice.Tensor %wide, %int1, %int384, %int640, %int1 : !wide, !torch.int, !torch.int, !torch.int, !torch.int -> !x
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// Residual and x from one tensor; their sum is written dense.
// CHECK-LABEL: func.func @two_parts
// CHECK-NOT:     torch.aten.slice
// CHECK:         torch.operator "vmfuse.row"(%arg0, %arg0, %arg1) {{{.*}}other_window = {offset = 256 : i64, pitch = 768 : i64}{{.*}}writes_sum = true{{.*}}x_window = {offset = 0 : i64, pitch = 768 : i64}
// CHECK-SAME:      -> (!torch.vtensor<[?,256],bf16>, !torch.vtensor<[?,256],f8E4M3FN>, !torch.vtensor<[?,2],f32>)
func.func @two_parts(%wide: !wide, %w: !w) -> (!q, !s, !x) {
  %int0 = torch.constant.int 0
  %int1 = torch.constant.int 1
  %int24 = torch.constant.int 24
  %int128 = torch.constant.int 128
  %int256 = torch.constant.int 256
  %int512 = torch.constant.int 512
  %eps = torch.constant.float 1.0e-06
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %x = torch.aten.slice.Tensor %wide, %int1, %int0, %int256, %int1 : !wide, !torch.int, !torch.int, !torch.int, !torch.int -> !x
  %r = torch.aten.slice.Tensor %wide, %int1, %int256, %int512, %int1 : !wide, !torch.int, !torch.int, !torch.int, !torch.int -> !x
  %y, %sum = torch.operator "torch.lowering.add_rms_norm"(%x, %r, %w, %eps) : (!x, !x, !w, !torch.float) -> (!x, !x)
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %sum : !q, !s, !x
}

// The view stands where it stood, of the wide tensor.
// CHECK-LABEL: func.func @below_a_view
// CHECK-NOT:     torch.aten.slice
// CHECK:         %[[ROWS:.*]] = torch.aten.unsqueeze %arg0, %{{.*}} -> !torch.vtensor<[?,1,768],bf16>
// CHECK:         torch.operator "vmfuse.row"(%[[ROWS]]) {{{.*}}x_window = {offset = 512 : i64, pitch = 768 : i64}
func.func @below_a_view(%wide: !wide) -> (!torch.vtensor<[?,1,256],f8E4M3FN>, !torch.vtensor<[?,1,2],f32>) {
  %int1 = torch.constant.int 1
  %int24 = torch.constant.int 24
  %int128 = torch.constant.int 128
  %int512 = torch.constant.int 512
  %int768 = torch.constant.int 768
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %x = torch.aten.slice.Tensor %wide, %int1, %int512, %int768, %int1 : !wide, !torch.int, !torch.int, !torch.int, !torch.int -> !x
  %v = torch.aten.unsqueeze %x, %int1 : !x, !torch.int -> !torch.vtensor<[?,1,256],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%v, %int128, %int24, %float32, %row) : (!torch.vtensor<[?,1,256],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,1,256],f8E4M3FN>, !torch.vtensor<[?,1,2],f32>)
  return %q, %s : !torch.vtensor<[?,1,256],f8E4M3FN>, !torch.vtensor<[?,1,2],f32>
}

// Every second element is no window.
// CHECK-LABEL: func.func @every_second
// CHECK:         %[[X:.*]] = torch.aten.slice.Tensor
// CHECK:         torch.operator "vmfuse.row"(%[[X]])
// CHECK-NOT:     window
func.func @every_second(%wide: !wide) -> (!torch.vtensor<[?,384],f8E4M3FN>, !torch.vtensor<[?,3],f32>) {
  %int0 = torch.constant.int 0
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %int24 = torch.constant.int 24
  %int128 = torch.constant.int 128
  %int768 = torch.constant.int 768
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %x = torch.aten.slice.Tensor %wide, %int1, %int0, %int768, %int2 : !wide, !torch.int, !torch.int, !torch.int, !torch.int -> !torch.vtensor<[?,384],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%x, %int128, %int24, %float32, %row) : (!torch.vtensor<[?,384],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,384],f8E4M3FN>, !torch.vtensor<[?,3],f32>)
  return %q, %s : !torch.vtensor<[?,384],f8E4M3FN>, !torch.vtensor<[?,3],f32>
}
