// RUN: %opt %s --steps normalize | %filecheck %s

// A view that changes nothing goes under every name a view has.

!x = !torch.vtensor<[?,8],f32>

// CHECK-LABEL: func.func @reshape
// CHECK-NEXT:    return %arg0
func.func @reshape(%x: !x) -> !x {
  %minus1 = torch.constant.int -1
  %int8 = torch.constant.int 8
  %shape = torch.prim.ListConstruct %minus1, %int8 : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.reshape %x, %shape : !x, !torch.list<int> -> !x
  return %y : !x
}

// CHECK-LABEL: func.func @unsafe_view
// CHECK-NEXT:    return %arg0
func.func @unsafe_view(%x: !x) -> !x {
  %minus1 = torch.constant.int -1
  %int8 = torch.constant.int 8
  %shape = torch.prim.ListConstruct %minus1, %int8 : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten._unsafe_view %x, %shape : !x, !torch.list<int> -> !x
  return %y : !x
}
