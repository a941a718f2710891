// RUN: %opt %s --steps raise,fuse,dispatch --target sm_90 --report | %filecheck %s

// On a GPU a kernel is embedded where it is called: the extern names its bindings, in the order the
// kernel takes them, and one constant, the number of rows.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK:       func.func private @[[FUNCTION:dispatch.*]](%arg0: tensor<?x256xbf16>, %arg1: tensor<?x256xbf16>, %arg2: tensor<256xbf16>) -> (tensor<?x256xbf16>, tensor<?x256xf8E4M3FN>, tensor<?x2xf32>)
// CHECK:         %[[ROWS:.*]] = tensor.dim %arg0
// CHECK:         %[[COUNT:.*]] = arith.index_castui %[[ROWS]] : index to i32
// CHECK:         hal.dispatch.extern "[[ENTRY:add_rms_norm_quant128_bf16_h256_[0-9a-f]+]]"[%[[ROWS]]](%[[COUNT]], %arg0, %arg1, %arg2)
// CHECK-SAME:      count(%{{.*}}: !hal.device, %[[WORKLOAD:.*]]: index)

// An empty grid is an error to CUDA: at least one workgroup, which finds no rows.
// CHECK:           arith.addi %[[WORKLOAD]]
// CHECK:           arith.divui
// CHECK:           arith.maxui
// CHECK:         layout(<constants = 1, bindings = [#hal.pipeline.binding<storage_buffer, ReadOnly>, #hal.pipeline.binding<storage_buffer, ReadOnly>, #hal.pipeline.binding<storage_buffer, ReadOnly>, #hal.pipeline.binding<storage_buffer>, #hal.pipeline.binding<storage_buffer>, #hal.pipeline.binding<storage_buffer>]>)
// CHECK:         #hal.executable.target<"cuda", "cuda-nvptx-fb"> ordinal(0) = [#hal.executable.object<{path = "[[ENTRY]]", data =
// CHECK:         workgroup_size = [{{[0-9]+}} : index, 1 : index, 1 : index], subgroup_size = 32

// CHECK:       func.func @main
// CHECK:         call @[[FUNCTION]]
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as add_norm_quant in [[ENTRY]]
func.func @main(%x: !x, %r: !x, %w: !w) -> (!q, !s, !x) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y, %sum = torch.operator "torch.lowering.add_rms_norm"(%x, %r, %w, %eps) : (!x, !x, !w, !torch.float) -> (!x, !x)
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s, %sum : !q, !s, !x
}
