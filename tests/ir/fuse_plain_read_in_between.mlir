// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// Equal quantizations of one tensor, the first one read before the second is made: the kernel stands where the
// first of them stood.

!x = !torch.vtensor<[?,256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @read_in_between
// CHECK:         %[[ROW:.*]]:2 = torch.operator "vmfuse.row"(%arg0)
// CHECK:         torch.prims.convert_element_type %[[ROW]]#0
// CHECK:         return %{{.*}}, %[[ROW]]#0
func.func @read_in_between(%x: !x) -> (!torch.vtensor<[?,256],f32>, !q) {
  %int6 = torch.constant.int 6
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %q0, %s0 = torch.operator "torch.lowering.group_quant"(%x, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  %y = torch.prims.convert_element_type %q0, %int6 : !q, !torch.int -> !torch.vtensor<[?,256],f32>
  %q1, %s1 = torch.operator "torch.lowering.group_quant"(%x, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %y, %q1 : !torch.vtensor<[?,256],f32>, !q
}
