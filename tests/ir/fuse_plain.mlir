// RUN: %opt %s --steps raise,sink,fuse --report | %filecheck %s

// Quantizations of a tensor that no norm makes: one row kernel that only quantizes.

!x = !torch.vtensor<[?,256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @equal_quantizations_once
// CHECK:         %[[ROW:.*]]:2 = torch.operator "vmfuse.row"(%arg0) {{{.*}}spec = {dtype = "bfloat16", hidden = 256 : i64, quantizations = [{{{[^}]*}}}]}}
// CHECK-NEXT:    return %[[ROW]]#0, %[[ROW]]#0
// CHECK:       // site 0: group_quant at line {{[0-9]+}} fused as quant
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} fused as quant
func.func @equal_quantizations_once(%x: !x) -> (!q, !q) {
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %q0, %s0 = torch.operator "torch.lowering.group_quant"(%x, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  %q1, %s1 = torch.operator "torch.lowering.group_quant"(%x, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q0, %q1 : !q, !q
}
