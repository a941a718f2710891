// RUN: %opt %s --steps raise,sink --report | %filecheck %s

// Whole chains of views move below, one view at a time.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>
!x3 = !torch.vtensor<[2,?,256],bf16>

// CHECK-LABEL: func.func @three_views
// CHECK:         %[[Y:.*]] = torch.operator "vmfuse.norm"
// CHECK:         %[[QUANT:.*]]:2 = torch.operator "vmfuse.group_quant"(%[[Y]])
// CHECK-NOT:     vmfuse.group_quant
// CHECK:         return
func.func @three_views(%x: !x3, %w: !w) -> (!q, !s) {
  %eps = torch.constant.float 1.0e-06
  %minus1 = torch.constant.int -1
  %int256 = torch.constant.int 256
  %int0 = torch.constant.int 0
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x3, !w, !torch.float) -> !x3
  %a_shape = torch.prim.ListConstruct %minus1, %int256 : (!torch.int, !torch.int) -> !torch.list<int>
  %a = torch.aten.view %y, %a_shape : !x3, !torch.list<int> -> !x
  %b = torch.aten.unsqueeze %a, %int0 : !x, !torch.int -> !torch.vtensor<[1,?,256],bf16>
  %c_shape = torch.prim.ListConstruct %minus1, %int256 : (!torch.int, !torch.int) -> !torch.list<int>
  %c = torch.aten.view %b, %c_shape : !torch.vtensor<[1,?,256],bf16>, !torch.list<int> -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%c, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}
