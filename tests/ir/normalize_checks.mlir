// RUN: %opt %s --steps normalize | %filecheck %s

// What torch.export asserts for itself is no use of a value: the sum below has one reader, not two.

!x = !torch.vtensor<[?,8],bf16>

// CHECK-LABEL: func.func @assertions
// CHECK-NOT:     assert
// CHECK-NOT:     sym_constrain
// CHECK:         %[[SUM:.*]] = torch.aten.add.Tensor
// CHECK-NEXT:    torch.aten.relu %[[SUM]]
// CHECK-NEXT:    return
func.func @assertions(%x: !x) -> !x {
  %none = torch.constant.none
  %int0 = torch.constant.int 0
  %int1 = torch.constant.int 1
  %int15 = torch.constant.int 15
  %cpu = torch.constant.device "cpu"
  %rows = torch.aten.size.int %x, %int0 : !x, !torch.int -> !torch.int
  %message = torch.constant.str "rows must not be negative"
  torch.aten.sym_constrain_range_for_size %rows, %int0, %none : !torch.int, !torch.int, !torch.none
  torch.aten._assert_scalar %rows, %message : !torch.int, !torch.str
  %sum = torch.aten.add.Tensor %x, %x, %int1 : !x, !x, !torch.int -> !x
  torch.aten._assert_tensor_metadata %sum, %none, %none, %int15, %cpu, %int0 : !x, !torch.none, !torch.none, !torch.int, !torch.Device, !torch.int
  %out = torch.aten.relu %sum : !x -> !x
  return %out : !x
}

// CHECK-LABEL: func.func @nothing_dead_is_left
// CHECK-NEXT:    return
func.func @nothing_dead_is_left(%x: !x) -> !x {
  %int1 = torch.constant.int 1
  %unread = torch.aten.add.Tensor %x, %x, %int1 : !x, !x, !torch.int -> !x
  %unread_too = torch.aten.relu %unread : !x -> !x
  return %x : !x
}
