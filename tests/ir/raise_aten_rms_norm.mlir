// RUN: %opt %s --steps raise --report | %filecheck %s

// aten.rms_norm, what torch.nn.RMSNorm exports as: over the last axis it is the contract "once".

!x = !torch.vtensor<[?,2,256],bf16>
!w = !torch.vtensor<[256],bf16>

// CHECK-LABEL: func.func @last_axis
// CHECK:         torch.operator "vmfuse.norm"(%arg0, %arg1) {contract = {eps = 1.000000e-05 : f64}
// CHECK:       // site 0: rms_norm
func.func @last_axis(%x: !x, %w: !w) -> !x {
  %eps = torch.constant.float 1.0e-05
  %int256 = torch.constant.int 256
  %shape = torch.prim.ListConstruct %int256 : (!torch.int) -> !torch.list<int>
  %y = torch.aten.rms_norm %x, %shape, %w, %eps : !x, !torch.list<int>, !w, !torch.float -> !x
  return %y : !x
}

// No epsilon means that of the statistic's dtype: float32's 2^-23, although x is bfloat16.
// CHECK-LABEL: func.func @default_epsilon
// CHECK:         torch.operator "vmfuse.norm"(%arg0) {contract = {eps = 1.1920928955078125E-7 : f64}
func.func @default_epsilon(%x: !x) -> !x {
  %none = torch.constant.none
  %int256 = torch.constant.int 256
  %shape = torch.prim.ListConstruct %int256 : (!torch.int) -> !torch.list<int>
  %y = torch.aten.rms_norm %x, %shape, %none, %none : !x, !torch.list<int>, !torch.none, !torch.none -> !x
  return %y : !x
}

// Over two axes a row is not a row of the last axis.
// CHECK-LABEL: func.func @two_axes
// CHECK:         torch.aten.rms_norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: aten::rms_norm: normalized_shape is [2, 256]; a kernel norms
func.func @two_axes(%x: !x) -> !x {
  %none = torch.constant.none
  %int2 = torch.constant.int 2
  %int256 = torch.constant.int 256
  %shape = torch.prim.ListConstruct %int2, %int256 : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.rms_norm %x, %shape, %none, %none : !x, !torch.list<int>, !torch.none, !torch.none -> !x
  return %y : !x
}
