// RUN: %opt %s --steps raise,fuse,dispatch --target cpu --report | %filecheck %s
// RUN: %opt %s --steps raise,fuse,dispatch --target sm_90 | %filecheck %s --check-prefix CUDA

// Equal rows are one kernel, embedded once and called from each place; another epsilon is another kernel.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>

// CHECK-COUNT-2: stream.executable private
// CHECK-NOT:     stream.executable private
// CHECK:       func.func @main
// CHECK:         call @[[KERNEL:dispatch.*]](%
// CHECK:         call @[[KERNEL]](%
// CHECK-NOT:     call @[[KERNEL]]
// CHECK:         call @dispatch.
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm in [[NAME:.*]]
// CHECK-NEXT:  // site 1: rms_norm at line {{[0-9]+}} fused as norm in [[NAME]]
// CHECK-NEXT:  // site 2: rms_norm

// CUDA-COUNT-2: hal.dispatch.extern
// CUDA-NOT:     hal.dispatch.extern
// CUDA:         func.func @main
func.func @main(%x: !x, %w: !w, %v: !w) -> !x {
  %eps = torch.constant.float 1.0e-06
  %larger = torch.constant.float 1.0e-05
  %one = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %two = torch.operator "torch.lowering.rms_norm"(%one, %v, %eps) : (!x, !w, !torch.float) -> !x
  %three = torch.operator "torch.lowering.rms_norm"(%two, %w, %larger) : (!x, !w, !torch.float) -> !x
  return %three : !x
}
