// RUN: %opt %s --steps raise,fuse,layout --target sm_90 --report | %filecheck %s --check-prefix CUDA
// RUN: %opt %s --steps raise,fuse,layout --target gfx950 --report | %filecheck %s --check-prefix HIP
// RUN: %opt %s --steps raise,fuse,layout --target cpu --report | %filecheck %s --check-prefix CPU

// A weight that is a parameter is shuffled by an operation, which folding evaluates; padding is part of its type.  The
// quantization writes its scales as the product reads them.

!x = !torch.vtensor<[?,256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>
!b = !torch.vtensor<[200,256],f8E4M3FN>
!bs = !torch.vtensor<[2,2],f32>
!y = !torch.vtensor<[?,200],bf16>

util.global private @w : tensor<200x256xf8E4M3FN>

// CUDA-LABEL: func.func @parameter
// CUDA:         %[[ROW:.*]]:2 = torch.operator "vmfuse.row"{{.*}}layout = "column_tma"
// CUDA:         %[[W:.*]] = torch.operator "torch.lowering.shuffle_weight"(%{{.*}}, %{{.*}}) : (!torch.vtensor<[200,256],f8E4M3FN>, !torch.str) -> !torch.vtensor<[256,256],f8E4M3FN>
// CUDA:         torch.operator "vmfuse.matmul"(%[[ROW]]#0, %[[W]], %[[ROW]]#1, %arg1){{.*}}a_scale_layout = "column_tma"{{.*}}b_layout = "swizzled_128"{{.*}}columns = 200
// CUDA-NOT:     // block_scaled_matmul

// HIP-LABEL:  func.func @parameter
// HIP:          %[[ROW:.*]]:2 = torch.operator "vmfuse.row"{{.*}}layout = "column"
// HIP:          %[[W:.*]] = torch.operator "torch.lowering.shuffle_weight"(%{{.*}}, %{{.*}}) : (!torch.vtensor<[200,256],f8E4M3FN>, !torch.str) -> !torch.vtensor<[208,256],f8E4M3FN>
// HIP:          torch.operator "vmfuse.matmul"(%[[ROW]]#0, %[[W]], %[[ROW]]#1, %arg1){{.*}}a_scale_layout = "column"{{.*}}b_layout = "shuffled_16x16"{{.*}}columns = 200

// CPU-LABEL:  func.func @parameter
// CPU-NOT:      layout
// CPU-NOT:      shuffle_weight
// CPU:          torch.operator "vmfuse.matmul"
// CPU-NOT:      layout
// CPU-LABEL:  func.func @argument
func.func @parameter(%x: !x, %bs: !bs) -> !y {
  %w = util.global.load @w : tensor<200x256xf8E4M3FN>
  %b = torch_c.from_builtin_tensor %w : tensor<200x256xf8E4M3FN> -> !b
  %group = torch.constant.int 128
  %fp8 = torch.constant.int 24
  %bfloat16 = torch.constant.int 15
  %float32 = torch.constant.str "float32"
  %q, %s = torch.operator "torch.lowering.group_quant"(%x, %group, %fp8, %float32) : (!x, !torch.int, !torch.int, !torch.str) -> (!q, !s)
  %y = torch.operator "torch.lowering.block_scaled_matmul"(%q, %b, %s, %bs, %bfloat16) : (!q, !b, !s, !bs, !torch.int) -> !y
  return %y : !y
}

// What is given at run time is not shuffled: without a kernel for rows the product stays what it is, and is remarked.
// CUDA-LABEL: func.func @argument
// CUDA-NOT:     shuffle_weight
// CUDA:         torch.operator "vmfuse.block_scaled_matmul"
// CUDA:       // block_scaled_matmul: left to IREE: The product kernel of sm_90 reads b in swizzled_128, not row. It is no parameter
func.func @argument(%x: !x, %b: !b, %bs: !bs) -> !y {
  %group = torch.constant.int 128
  %fp8 = torch.constant.int 24
  %bfloat16 = torch.constant.int 15
  %float32 = torch.constant.str "float32"
  %q, %s = torch.operator "torch.lowering.group_quant"(%x, %group, %fp8, %float32) : (!x, !torch.int, !torch.int, !torch.str) -> (!q, !s)
  %y = torch.operator "torch.lowering.block_scaled_matmul"(%q, %b, %s, %bs, %bfloat16) : (!q, !b, !s, !bs, !torch.int) -> !y
  return %y : !y
}
