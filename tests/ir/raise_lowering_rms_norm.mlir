// RUN: %opt %s --steps raise --report | %filecheck %s

// torch.ops.lowering.rms_norm and add_rms_norm carry their contract in their name.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],f32>

// CHECK-LABEL: func.func @with_weight
// CHECK-NEXT:    torch.operator "vmfuse.norm"(%arg0, %arg1) {contract = {eps = 9.9999999999999995E-7 : f64}, site = 0 : i64} : (!torch.vtensor<[?,256],bf16>, !torch.vtensor<[256],f32>) -> !torch.vtensor<[?,256],bf16>
// CHECK-NOT:     lowering.rms_norm
// CHECK:       // site 0: rms_norm at line [[# @LINE + 3]] open
func.func @with_weight(%x: !x, %w: !w) -> !x {
  %eps = torch.constant.float 1.0e-06
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  return %y : !x
}

// CHECK-LABEL: func.func @without_weight
// CHECK-NEXT:    torch.operator "vmfuse.norm"(%arg0) {contract = {{.*}}} : (!torch.vtensor<[?,256],bf16>) -> !torch.vtensor<[?,256],bf16>
func.func @without_weight(%x: !x) -> !x {
  %eps = torch.constant.float 1.0e-06
  %none = torch.constant.none
  %y = torch.operator "torch.lowering.rms_norm"(%x, %none, %eps) : (!x, !torch.none, !torch.float) -> !x
  return %y : !x
}

// The residual sum goes into the statistic unrounded, and is the second result.
// CHECK-LABEL: func.func @with_residual
// CHECK-NEXT:    %[[NORM:.*]]:2 = torch.operator "vmfuse.norm"(%arg0, %arg1, %arg2) {contract = {{{.*}}residual = "exact"}
// CHECK-NEXT:    return %[[NORM]]#0, %[[NORM]]#1
func.func @with_residual(%x: !x, %r: !x, %w: !w) -> (!x, !x) {
  %eps = torch.constant.float 1.0e-06
  %y, %sum = torch.operator "torch.lowering.add_rms_norm"(%x, %r, %w, %eps) : (!x, !x, !w, !torch.float) -> (!x, !x)
  return %y, %sum : !x, !x
}

// An epsilon that is computed is not part of any contract.
// CHECK-LABEL: func.func @computed_epsilon
// CHECK:         torch.lowering.rms_norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: lowering::rms_norm: eps is computed; it must be a constant
func.func @computed_epsilon(%x: !x, %w: !w, %eps: !torch.float) -> !x {
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  return %y : !x
}
