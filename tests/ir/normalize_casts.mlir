// RUN: %opt %s --steps normalize | %filecheck %s

// Every cast is spelled prims.convert_element_type; a cast to the dtype it starts from is none.

!bf16 = !torch.vtensor<[?,8],bf16>
!f32 = !torch.vtensor<[?,8],f32>

// CHECK-LABEL: func.func @to_copy
// CHECK:         %[[FLOAT32:.*]] = torch.constant.int 6
// CHECK-NEXT:    torch.prims.convert_element_type %arg0, %[[FLOAT32]] : !torch.vtensor<[?,8],bf16>, !torch.int -> !torch.vtensor<[?,8],f32>
// CHECK-NOT:     _to_copy
func.func @to_copy(%x: !bf16) -> !f32 {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %int6 = torch.constant.int 6
  %y = torch.aten._to_copy %x, %int6, %none, %none, %none, %false, %none : !bf16, !torch.int, !torch.none, !torch.none, !torch.none, !torch.bool, !torch.none -> !f32
  return %y : !f32
}

// CHECK-LABEL: func.func @to_dtype
// CHECK:         %[[BFLOAT16:.*]] = torch.constant.int 15
// CHECK-NEXT:    torch.prims.convert_element_type %arg0, %[[BFLOAT16]]
// CHECK-NOT:     aten.to.dtype
func.func @to_dtype(%x: !f32) -> !bf16 {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %int15 = torch.constant.int 15
  %y = torch.aten.to.dtype %x, %int15, %false, %false, %none : !f32, !torch.int, !torch.bool, !torch.bool, !torch.none -> !bf16
  return %y : !bf16
}

// CHECK-LABEL: func.func @to_its_own_dtype
// CHECK-NEXT:    return %arg0
func.func @to_its_own_dtype(%x: !f32) -> !f32 {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %int6 = torch.constant.int 6
  %y = torch.aten._to_copy %x, %int6, %none, %none, %none, %false, %none : !f32, !torch.int, !torch.none, !torch.none, !torch.none, !torch.bool, !torch.none -> !f32
  %z = torch.prims.convert_element_type %y, %int6 : !f32, !torch.int -> !f32
  return %z : !f32
}
