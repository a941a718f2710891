// RUN: %opt %s --steps raise --report | %filecheck %s

// Forms that stay in float32 until the end: one rounding, or none because x is float32.

!f32 = !torch.vtensor<[?,256],f32>
!bf16 = !torch.vtensor<[?,256],bf16>
!row = !torch.vtensor<[?,1],f32>
!w = !torch.vtensor<[256],f32>

// CHECK-LABEL: func.func @float32
// CHECK-NEXT:    torch.operator "vmfuse.norm"(%arg0, %arg1) {contract = {eps = 1.000000e-05 : f64}
// CHECK:       // site 0: rms_norm
// CHECK-NOT:   // site 1
func.func @float32(%x: !f32, %w: !w) -> !f32 {
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
  %y = torch.aten.mul.Tensor %normed, %w : !f32, !w -> !f32
  return %y : !f32
}

// x * x instead of x.pow(2), the last axis counted from the front, factors the other way round, a
// bfloat16 weight cast up: the same thing.
// CHECK-LABEL: func.func @rounded_at_the_end
// CHECK-NEXT:    %[[Y:.*]] = torch.operator "vmfuse.norm"(%arg0, %arg1) {contract = {eps = 1.000000e-05 : f64}, site = 0 : i64} : (!torch.vtensor<[?,256],bf16>, !torch.vtensor<[256],bf16>) -> !torch.vtensor<[?,256],bf16>
// CHECK-NEXT:    return %[[Y]]
func.func @rounded_at_the_end(%x: !bf16, %w: !torch.vtensor<[256],bf16>) -> !bf16 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %int1 = torch.constant.int 1
  %float32 = torch.constant.int 6
  %bfloat16 = torch.constant.int 15
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %int1 : (!torch.int) -> !torch.list<int>
  %h = torch.prims.convert_element_type %x, %float32 : !bf16, !torch.int -> !f32
  %square = torch.aten.mul.Tensor %h, %h : !f32, !f32 -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %rstd, %h : !row, !f32 -> !f32
  %w32 = torch.prims.convert_element_type %w, %float32 : !torch.vtensor<[256],bf16>, !torch.int -> !w
  %weighted = torch.aten.mul.Tensor %w32, %normed : !w, !f32 -> !f32
  %y = torch.prims.convert_element_type %weighted, %bfloat16 : !f32, !torch.int -> !bf16
  return %y : !bf16
}

// CHECK-LABEL: func.func @without_weight
// CHECK-NEXT:    torch.operator "vmfuse.norm"(%arg0) {contract = {eps = 1.000000e-05 : f64}
func.func @without_weight(%x: !f32) -> !f32 {
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
  %y = torch.aten.mul.Tensor %x, %rstd : !f32, !row -> !f32
  return %y : !f32
}
