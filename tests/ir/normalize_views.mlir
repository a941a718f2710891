// RUN: %opt %s --steps normalize | %filecheck %s

// One spelling for views, none for those that change nothing.

!x = !torch.vtensor<[?,8],f32>
!cube = !torch.vtensor<[?,2,4],f32>

// CHECK-LABEL: func.func @reshape_is_a_view
// CHECK:         torch.aten.view %arg0
// CHECK-NOT:     reshape
func.func @reshape_is_a_view(%x: !x) -> !cube {
  %minus1 = torch.constant.int -1
  %int2 = torch.constant.int 2
  %int4 = torch.constant.int 4
  %shape = torch.prim.ListConstruct %minus1, %int2, %int4 : (!torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.reshape %x, %shape : !x, !torch.list<int> -> !cube
  return %y : !cube
}

// CHECK-LABEL: func.func @a_view_to_its_own_shape
// CHECK-NEXT:    return %arg0
func.func @a_view_to_its_own_shape(%x: !x) -> !x {
  %minus1 = torch.constant.int -1
  %int8 = torch.constant.int 8
  %shape = torch.prim.ListConstruct %minus1, %int8 : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.view %x, %shape : !x, !torch.list<int> -> !x
  return %y : !x
}

// Two unknown sizes leave it open how the rows are divided among them: this may transpose blocks.
// CHECK-LABEL: func.func @a_view_with_two_unknown_sizes_stays
// CHECK:         torch.aten.view
func.func @a_view_with_two_unknown_sizes_stays(%x: !torch.vtensor<[?,?,8],f32>, %n: !torch.int, %m: !torch.int) -> !torch.vtensor<[?,?,8],f32> {
  %int8 = torch.constant.int 8
  %shape = torch.prim.ListConstruct %n, %m, %int8 : (!torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.view %x, %shape : !torch.vtensor<[?,?,8],f32>, !torch.list<int> -> !torch.vtensor<[?,?,8],f32>
  return %y : !torch.vtensor<[?,?,8],f32>
}

// CHECK-LABEL: func.func @expand_to_its_own_shape
// CHECK-NEXT:    return %arg0
func.func @expand_to_its_own_shape(%x: !torch.vtensor<[4,8],f32>) -> !torch.vtensor<[4,8],f32> {
  %minus1 = torch.constant.int -1
  %false = torch.constant.bool false
  %shape = torch.prim.ListConstruct %minus1, %minus1 : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.expand %x, %shape, %false : !torch.vtensor<[4,8],f32>, !torch.list<int>, !torch.bool -> !torch.vtensor<[4,8],f32>
  return %y : !torch.vtensor<[4,8],f32>
}

// [?,8] to [?,8] may be one row repeated n times: an expand with an unknown size stays.
// CHECK-LABEL: func.func @expand_of_unknown_rows_stays
// CHECK:         torch.aten.expand
func.func @expand_of_unknown_rows_stays(%x: !x, %n: !torch.int) -> !x {
  %int8 = torch.constant.int 8
  %false = torch.constant.bool false
  %shape = torch.prim.ListConstruct %n, %int8 : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.expand %x, %shape, %false : !x, !torch.list<int>, !torch.bool -> !x
  return %y : !x
}

// CHECK-LABEL: func.func @a_slice_of_everything
// CHECK-NEXT:    return %arg0
func.func @a_slice_of_everything(%x: !x) -> !x {
  %int0 = torch.constant.int 0
  %int1 = torch.constant.int 1
  %end = torch.constant.int 9223372036854775807
  %y = torch.aten.slice.Tensor %x, %int0, %int0, %end, %int1 : !x, !torch.int, !torch.int, !torch.int, !torch.int -> !x
  return %y : !x
}

// CHECK-LABEL: func.func @a_slice_of_less_stays
// CHECK:         torch.aten.slice.Tensor
func.func @a_slice_of_less_stays(%x: !x) -> !x {
  %int0 = torch.constant.int 0
  %int1 = torch.constant.int 1
  %end = torch.constant.int 9223372036854775807
  %y = torch.aten.slice.Tensor %x, %int0, %int1, %end, %int1 : !x, !torch.int, !torch.int, !torch.int, !torch.int -> !x
  return %y : !x
}

// CHECK-LABEL: func.func @copies
// CHECK-NEXT:    return %arg0
func.func @copies(%x: !x) -> !x {
  %none = torch.constant.none
  %int0 = torch.constant.int 0
  %a = torch.aten.alias %x : !x -> !x
  %b = torch.aten.clone %a, %none : !x, !torch.none -> !x
  %c = torch.aten.detach %b : !x -> !x
  %d = torch.aten.contiguous %c, %int0 : !x, !torch.int -> !x
  return %d : !x
}
