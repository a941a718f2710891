// RUN: %opt %s --steps raise --report | %filecheck %s

// torch.ops.lowering.group_quant and the product that reads what it makes.

!x = !torch.vtensor<[?,256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK-LABEL: func.func @row
// CHECK-NEXT:    torch.operator "vmfuse.group_quant"(%arg0) {contract = {group = 128 : i64}, site = 0 : i64}
// CHECK:       // site 0: group_quant at line [[# @LINE + 6]] open
func.func @row(%x: !x) -> (!q, !s) {
  %group = torch.constant.int 128
  %fp8 = torch.constant.int 24
  %scale = torch.constant.str "float32"
  %layout = torch.constant.str "row"
  %q, %s = torch.operator "torch.lowering.group_quant"(%x, %group, %fp8, %scale, %layout) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// CHECK-LABEL: func.func @column_tma
// CHECK-NEXT:    torch.operator "vmfuse.group_quant"(%arg0) {{{.*}}layout = "column_tma"
func.func @column_tma(%x: !x) -> (!q, !s) {
  %group = torch.constant.int 128
  %fp8 = torch.constant.int 24
  %scale = torch.constant.str "float32"
  %layout = torch.constant.str "column_tma"
  %q, %s = torch.operator "torch.lowering.group_quant"(%x, %group, %fp8, %scale, %layout) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}

// The product is raised, so that a later step can lower it; it is no site of its own.
// CHECK-LABEL: func.func @product
// CHECK-NEXT:    torch.operator "vmfuse.block_scaled_matmul"(%arg0, %arg1, %arg2, %arg3) {contract = {}} :
// CHECK-NOT:   // site
func.func @product(%a: !q, %b: !torch.vtensor<[128,256],f8E4M3FN>, %as: !s, %bs: !torch.vtensor<[1,2],f32>) -> !torch.vtensor<[?,128],bf16> {
  %bfloat16 = torch.constant.int 15
  %y = torch.operator "torch.lowering.block_scaled_matmul"(%a, %b, %as, %bs, %bfloat16) : (!q, !torch.vtensor<[128,256],f8E4M3FN>, !s, !torch.vtensor<[1,2],f32>, !torch.int) -> !torch.vtensor<[?,128],bf16>
  return %y : !torch.vtensor<[?,128],bf16>
}
