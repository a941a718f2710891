// RUN: %opt %s --steps raise --report | %filecheck %s

// The Hugging Face RMSNorm in bfloat16: x * rstd is rounded before it meets the weight ("twice").

!x = !torch.vtensor<[1,?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!f32 = !torch.vtensor<[1,?,256],f32>
!row = !torch.vtensor<[1,?,1],f32>

// CHECK-LABEL: func.func @hugging_face
// CHECK-NEXT:    %[[Y:.*]] = torch.operator "vmfuse.norm"(%arg0, %arg1) {contract = {eps = 1.000000e-05 : f64, rounding = "twice"}, site = 0 : i64}
// CHECK-NEXT:    return %[[Y]]
// CHECK-NEXT:  }
// CHECK-NEXT:  // site 0: rms_norm at line [[# @LINE + 18]] open
func.func @hugging_face(%x: !x, %w: !w) -> !x {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %float32 = torch.constant.int 6
  %bfloat16 = torch.constant.int 15
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %h = torch.prims.convert_element_type %x, %float32 : !x, !torch.int -> !f32
  %square = torch.aten.pow.Tensor_Scalar %h, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %h, %rstd : !f32, !row -> !f32
  %rounded = torch.prims.convert_element_type %normed, %bfloat16 : !f32, !torch.int -> !x
  %y = torch.aten.mul.Tensor %w, %rounded : !w, !x -> !x
  return %y : !x
}

// A float32 weight makes the product float32: y is not of x's dtype, and no kernel computes that.
// What is recognised instead is the norm without its weight.
// CHECK-LABEL: func.func @float32_weight
// CHECK:         %[[Y:.*]] = torch.operator "vmfuse.norm"(%arg0) {contract = {eps = 1.000000e-05 : f64}
// CHECK:         torch.aten.mul.Tensor %arg1, %[[Y]]
func.func @float32_weight(%x: !x, %w: !torch.vtensor<[256],f32>) -> !f32 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %float32 = torch.constant.int 6
  %bfloat16 = torch.constant.int 15
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %h = torch.prims.convert_element_type %x, %float32 : !x, !torch.int -> !f32
  %square = torch.aten.pow.Tensor_Scalar %h, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %h, %rstd : !f32, !row -> !f32
  %rounded = torch.prims.convert_element_type %normed, %bfloat16 : !f32, !torch.int -> !x
  %y = torch.aten.mul.Tensor %w, %rounded : !torch.vtensor<[256],f32>, !x -> !f32
  return %y : !f32
}
