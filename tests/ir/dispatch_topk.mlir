// RUN: %opt %s --steps raise,fuse,dispatch --target cpu --report | %filecheck %s --check-prefixes BOTH,CPU
// RUN: %opt %s --steps raise,fuse,dispatch --target gfx950 --report | %filecheck %s --check-prefixes BOTH,GPU

// Routing is dispatched like a row: leading axes are rows, both results leave one kernel.  What has no kernel stays
// as it is, and says why.

!g = !torch.vtensor<[2,?,64],bf16>
!b = !torch.vtensor<[64],f32>
!w = !torch.vtensor<[2,?,6],f32>
!i = !torch.vtensor<[2,?,6],si64>

// CPU:        stream.executable private @[[EXECUTABLE:executable_topk6_bf16_e64_g8_[0-9a-f]+]]
// CPU:          func.func private @[[ENTRY:.*]](memref<bf16>, i64, memref<f32>, i64, memref<f32>, i64, memref<i64>, i64, i32, i32) attributes {hal.import.static, llvm.bareptr = true}
// BOTH:       func.func private @[[FUNCTION:dispatch.topk6_bf16_e64_g8_[0-9a-f]+]](%arg0: tensor<?x64xbf16>, %arg1: tensor<64xf32>) -> (tensor<?x6xf32>, tensor<?x6xi64>)
// CPU:          flow.dispatch @[[EXECUTABLE]]::
// GPU:          hal.dispatch.extern "[[ENTRY:topk6_bf16_e64_g8_[0-9a-f]+]]"
// GPU:          layout(<constants = 1, bindings = [#hal.pipeline.binding<storage_buffer, ReadOnly>, #hal.pipeline.binding<storage_buffer, ReadOnly>, #hal.pipeline.binding<storage_buffer>, #hal.pipeline.binding<storage_buffer>]>)
// GPU:          subgroup_size = 64
// BOTH:       func.func @main
// BOTH:         call @[[FUNCTION]]
// BOTH:         tensor.expand_shape
// BOTH:         tensor.expand_shape
// BOTH:         torch.operator "vmfuse.grouped_topk"
// BOTH:       // site 0: grouped_topk at line {{[0-9]+}} fused as grouped_topk in [[ENTRY]]
// BOTH-NEXT:  // site 1: grouped_topk at line {{[0-9]+}} unfused: The routing kernel knows at most {{2048 experts on cpu|512 experts on gfx950}}, not 2079.
func.func @main(%g: !g, %b: !b, %g2: !torch.vtensor<[?,2079],f32>, %b2: !torch.vtensor<[2079],f32>) -> (!w, !i, !torch.vtensor<[?,6],f32>, !torch.vtensor<[?,6],si32>) {
  %topk = torch.constant.int 6
  %groups = torch.constant.int 8
  %kept = torch.constant.int 3
  %many = torch.constant.int 33
  %w, %i = torch.operator "torch.lowering.grouped_topk"(%g, %b, %topk, %groups, %kept) : (!g, !b, !torch.int, !torch.int, !torch.int) -> (!w, !i)
  %w2, %i2 = torch.operator "torch.lowering.grouped_topk"(%g2, %b2, %topk, %many, %kept) : (!torch.vtensor<[?,2079],f32>, !torch.vtensor<[2079],f32>, !torch.int, !torch.int, !torch.int) -> (!torch.vtensor<[?,6],f32>, !torch.vtensor<[?,6],si32>)
  return %w, %i, %w2, %i2 : !w, !i, !torch.vtensor<[?,6],f32>, !torch.vtensor<[?,6],si32>
}
