// RUN: %opt %s --steps raise --report | %filecheck %s

// One change each to a form that is recognised, and it is none any more; what still looks like one says why.

!f32 = !torch.vtensor<[?,256],f32>
!f64 = !torch.vtensor<[?,256],f64>
!row = !torch.vtensor<[?,1],f32>
!row64 = !torch.vtensor<[?,1],f64>

// The mean is over the first axis.
// CHECK-LABEL: func.func @over_the_first_axis(
// CHECK-NOT:     vmfuse.norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: the mean of squares is over axes [0] of 2; a kernel norms the last axis
func.func @over_the_first_axis(%x: !f32) -> !f32 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %int0 = torch.constant.int 0
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %int0 : (!torch.int) -> !torch.list<int>
  %square = torch.aten.pow.Tensor_Scalar %x, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !torch.vtensor<[1,256],f32>
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !torch.vtensor<[1,256],f32>, !torch.float, !torch.int -> !torch.vtensor<[1,256],f32>
  %rstd = torch.aten.rsqrt %shifted : !torch.vtensor<[1,256],f32> -> !torch.vtensor<[1,256],f32>
  %normed = torch.aten.mul.Tensor %x, %rstd : !f32, !torch.vtensor<[1,256],f32> -> !f32
  return %normed : !f32
}

// The third power, not the second.
// CHECK-LABEL: func.func @cubes(
// CHECK-NOT:     vmfuse.norm
// CHECK-NOT:   // site
func.func @cubes(%x: !f32) -> !f32 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int3 = torch.constant.int 3
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %square = torch.aten.pow.Tensor_Scalar %x, %int3 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %x, %rstd : !f32, !row -> !f32
  return %normed : !f32
}

// The statistic is another tensor's.
// CHECK-LABEL: func.func @of_another_tensor(
// CHECK-NOT:     vmfuse.norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: its reciprocal root is not multiplied with the tensor that the mean of squares was taken of
func.func @of_another_tensor(%x: !f32, %other: !f32) -> !f32 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %square = torch.aten.pow.Tensor_Scalar %other, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %x, %rstd : !f32, !row -> !f32
  return %normed : !f32
}

// The statistic is applied to another tensor.
// CHECK-LABEL: func.func @normalises_another_tensor(
// CHECK-NOT:     vmfuse.norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: its reciprocal root is not multiplied with the tensor that the mean of squares was taken of
func.func @normalises_another_tensor(%x: !f32, %other: !f32) -> !f32 {
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
  %normed = torch.aten.mul.Tensor %other, %rstd : !f32, !row -> !f32
  return %normed : !f32
}

// add.Scalar with alpha 2 adds the epsilon twice.
// CHECK-LABEL: func.func @epsilon_twice(
// CHECK-NOT:     vmfuse.norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: between the mean of squares and torch.rsqrt is more than the addition of a constant epsilon
func.func @epsilon_twice(%x: !f32) -> !f32 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int2 = torch.constant.int 2
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %square = torch.aten.pow.Tensor_Scalar %x, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %eps, %int2 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %x, %rstd : !f32, !row -> !f32
  return %normed : !f32
}

// The epsilon is computed.
// CHECK-LABEL: func.func @computed_epsilon(
// CHECK-NOT:     vmfuse.norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: between the mean of squares and torch.rsqrt is more than the addition of a constant epsilon
func.func @computed_epsilon(%x: !f32, %computed: !torch.float) -> !f32 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %square = torch.aten.pow.Tensor_Scalar %x, %int2 : !f32, !torch.int -> !f32
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f32, !torch.list<int>, !torch.bool, !torch.none -> !row
  %shifted = torch.aten.add.Scalar %variance, %computed, %int1 : !row, !torch.float, !torch.int -> !row
  %rstd = torch.aten.rsqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %x, %rstd : !f32, !row -> !f32
  return %normed : !f32
}

// sqrt, not 1/sqrt.
// CHECK-LABEL: func.func @square_root(
// CHECK-NOT:     vmfuse.norm
// CHECK-NOT:   // site
func.func @square_root(%x: !f32) -> !f32 {
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
  %rstd = torch.aten.sqrt %shifted : !row -> !row
  %normed = torch.aten.mul.Tensor %x, %rstd : !f32, !row -> !f32
  return %normed : !f32
}

// A float64 statistic is not one a kernel computes.
// CHECK-LABEL: func.func @in_float64(
// CHECK-NOT:     vmfuse.norm
// CHECK:       // site 0: rms_norm at line {{.*}} unfused: the mean of squares is taken in float64; convert the tensor with .float() before
func.func @in_float64(%x: !f64) -> !f64 {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %minus1 = torch.constant.int -1
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %eps = torch.constant.float 1.0e-05
  %last = torch.prim.ListConstruct %minus1 : (!torch.int) -> !torch.list<int>
  %square = torch.aten.pow.Tensor_Scalar %x, %int2 : !f64, !torch.int -> !f64
  %variance = torch.aten.mean.dim %square, %last, %true, %none : !f64, !torch.list<int>, !torch.bool, !torch.none -> !row64
  %shifted = torch.aten.add.Scalar %variance, %eps, %int1 : !row64, !torch.float, !torch.int -> !row64
  %rstd = torch.aten.rsqrt %shifted : !row64 -> !row64
  %normed = torch.aten.mul.Tensor %x, %rstd : !f64, !row64 -> !f64
  return %normed : !f64
}
