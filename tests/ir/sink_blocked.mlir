// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// Views a quantization cannot pass, each with its reason.  Norm and quantization still get kernels, but two:
// the quantization's site keeps the reason it is not in its norm's.

!x96 = !torch.vtensor<[?,96],bf16>
!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// Rows of 96 do not hold whole groups of 64: after the view a group spans two of them.
// CHECK-LABEL: func.func @groups_would_straddle_heads
// CHECK:         torch.operator "vmfuse.row"{{.*}}writes_y = true
// CHECK:         torch.aten.view
// CHECK:         torch.operator "vmfuse.row"
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} unfused: group 64 does not divide the last axis before the view between producer and quantization, 96
func.func @groups_would_straddle_heads(%x: !x96) -> (!torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,3],f32>) {
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %minus1 = torch.constant.int -1
  %int192 = torch.constant.int 192
  %int64 = torch.constant.int 64
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %none, %eps) : (!x96, !torch.none, !torch.float) -> !x96
  %v_shape = torch.prim.ListConstruct %minus1, %int192 : (!torch.int, !torch.int) -> !torch.list<int>
  %v = torch.aten.view %y, %v_shape : !x96, !torch.list<int> -> !torch.vtensor<[?,192],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%v, %int64, %int24, %float32, %row) : (!torch.vtensor<[?,192],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,3],f32>)
  return %q, %s : !torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,3],f32>
}

// column_tma scales have one column per row of the kernel: a split row would need several.
// CHECK-LABEL: func.func @column_scales_cannot_follow_a_split
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} unfused: the view between producer and quantization makes rows of 128 out of rows of 256, which a column_tma scale layout cannot follow
func.func @column_scales_cannot_follow_a_split(%x: !x, %w: !w) -> (!torch.vtensor<[?,128],f8E4M3FN>, !torch.vtensor<[?,1],f32>) {
  %eps = torch.constant.float 1.0e-06
  %minus1 = torch.constant.int -1
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %column_tma = torch.constant.str "column_tma"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %v_shape = torch.prim.ListConstruct %minus1, %int128 : (!torch.int, !torch.int) -> !torch.list<int>
  %v = torch.aten.view %y, %v_shape : !x, !torch.list<int> -> !torch.vtensor<[?,128],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%v, %int128, %int24, %float32, %column_tma) : (!torch.vtensor<[?,128],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,128],f8E4M3FN>, !torch.vtensor<[?,1],f32>)
  return %q, %s : !torch.vtensor<[?,128],f8E4M3FN>, !torch.vtensor<[?,1],f32>
}

// The second view is passed, the first is not: the reason is the first one's.
// CHECK-LABEL: func.func @blocked_below_another_view
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} unfused: group 64 does not divide the last axis before the view between producer and quantization, 96
func.func @blocked_below_another_view(%x: !x96) -> (!torch.vtensor<[1,?,192],f8E4M3FN>, !torch.vtensor<[1,?,3],f32>) {
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %minus1 = torch.constant.int -1
  %int192 = torch.constant.int 192
  %int0 = torch.constant.int 0
  %int64 = torch.constant.int 64
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %none, %eps) : (!x96, !torch.none, !torch.float) -> !x96
  %v_shape = torch.prim.ListConstruct %minus1, %int192 : (!torch.int, !torch.int) -> !torch.list<int>
  %v = torch.aten.view %y, %v_shape : !x96, !torch.list<int> -> !torch.vtensor<[?,192],bf16>
  %u = torch.aten.unsqueeze %v, %int0 : !torch.vtensor<[?,192],bf16>, !torch.int -> !torch.vtensor<[1,?,192],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%u, %int64, %int24, %float32, %row) : (!torch.vtensor<[1,?,192],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[1,?,192],f8E4M3FN>, !torch.vtensor<[1,?,3],f32>)
  return %q, %s : !torch.vtensor<[1,?,192],f8E4M3FN>, !torch.vtensor<[1,?,3],f32>
}

// Without a norm above it a view keeps nothing apart: the quantization is fused where it is.
// CHECK-LABEL: func.func @no_norm_above
// CHECK:       // site 0: group_quant at line {{[0-9]+}} fused as quant
func.func @no_norm_above(%x: !torch.vtensor<[?,96],bf16>) -> (!torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,3],f32>) {
  %minus1 = torch.constant.int -1
  %int192 = torch.constant.int 192
  %int64 = torch.constant.int 64
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %v_shape = torch.prim.ListConstruct %minus1, %int192 : (!torch.int, !torch.int) -> !torch.list<int>
  %v = torch.aten.view %x, %v_shape : !torch.vtensor<[?,96],bf16>, !torch.list<int> -> !torch.vtensor<[?,192],bf16>
  %q, %s = torch.operator "torch.lowering.group_quant"(%v, %int64, %int24, %float32, %row) : (!torch.vtensor<[?,192],bf16>, !torch.int, !torch.int, !torch.str, !torch.str) -> (!torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,3],f32>)
  return %q, %s : !torch.vtensor<[?,192],f8E4M3FN>, !torch.vtensor<[?,3],f32>
}
