// RUN: %opt %s --steps raise --report | %filecheck %s

// A factor that is not a vector over the last axis stays outside; the norm before it is still a norm.

!f32 = !torch.vtensor<[?,256],f32>
!bf16 = !torch.vtensor<[?,256],bf16>
!row = !torch.vtensor<[?,1],f32>

// CHECK-LABEL: func.func @a_gate_is_no_weight
// CHECK:         %[[NORM:.*]] = torch.operator "vmfuse.norm"(%arg0) {
// CHECK:         torch.aten.mul.Tensor %[[NORM]], %arg1
func.func @a_gate_is_no_weight(%x: !f32, %gate: !f32) -> !f32 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %square = torch.aten.pow.Tensor_Scalar %x, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %x, %rstd : !f32, !row -> !f32
  %y = torch.aten.mul.Tensor %normed, %gate : !f32, !f32 -> !f32
  return %y : !f32
}

// The float32 value is read before it is rounded: no kernel writes both.
// CHECK-LABEL: func.func @read_before_rounding
// CHECK-NOT:     vmfuse.norm
// CHECK:         torch.aten.rsqrt
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: its value before rounding, float32[?, 256], is read by prims.convert_element_type, func.return;
func.func @read_before_rounding(%x: !bf16) -> (!bf16, !f32) {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %float32 = torch.constant.int 6
  %bfloat16 = torch.constant.int 15
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %h = torch.prims.convert_element_type %x, %float32 : !bf16, !torch.int -> !f32
  %square = torch.aten.pow.Tensor_Scalar %h, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %h, %rstd : !f32, !row -> !f32
  %y = torch.prims.convert_element_type %normed, %bfloat16 : !f32, !torch.int -> !bf16
  return %y, %normed : !bf16, !f32
}
