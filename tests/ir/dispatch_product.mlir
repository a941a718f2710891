// RUN: %opt %s --steps raise,fuse,layout,dispatch --target cpu --report | %filecheck %s
// RUN: %opt %s --steps raise,fuse,layout,dispatch --target sm_90 | %filecheck %s --check-prefix CUDA

// On the cpu a product is a dispatch of its own, with as many workgroups as there are tiles of rows and, where there
// are several workers, shares of the columns; weights and their scales go in as they are.  It is no site of the
// report.  The kernel of sm_90 reads no weight in rows, and one given at run time is in rows: there it stays what it is.

!a = !torch.vtensor<[2,?,256],f8E4M3FN>
!as = !torch.vtensor<[2,?,2],f32>
!b = !torch.vtensor<[200,256],f8E4M3FN>
!bs = !torch.vtensor<[2,2],f32>
!y = !torch.vtensor<[2,?,200],bf16>

// CHECK:       stream.executable private @[[EXECUTABLE:executable_matmul128_bf16_n200_k256_[0-9a-f]+]] attributes {hal.executable.objects
// CHECK:         stream.executable.export public @[[WORKGROUP:.*]] workgroups(%[[ROWS:.*]]: index)
// CHECK:           arith.maxui
// CHECK:           stream.return
// CHECK:       func.func private @[[FUNCTION:dispatch.matmul128_bf16_n200_k256_[0-9a-f]+]](%arg0: tensor<?x256xf8E4M3FN>, %arg1: tensor<200x256xf8E4M3FN>, %arg2: tensor<?x2xf32>, %arg3: tensor<2x2xf32>) -> tensor<?x200xbf16>
// CHECK:         flow.dispatch @[[EXECUTABLE]]::@[[WORKGROUP]]
// CHECK:       func.func @main
// CHECK-NOT:     tensor.collapse_shape {{.*}}tensor<200x256
// CHECK:         call @[[FUNCTION]]
// CHECK-NOT:   // site

// CUDA:        func.func @main
// CUDA:          vmfuse.block_scaled_matmul
func.func @main(%a: !a, %b: !b, %as: !as, %bs: !bs) -> !y {
  %bfloat16 = torch.constant.int 15
  %y = torch.operator "torch.lowering.block_scaled_matmul"(%a, %b, %as, %bs, %bfloat16) : (!a, !b, !as, !bs, !torch.int) -> !y
  return %y : !y
}
