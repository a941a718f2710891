// RUN: %opt %s --steps raise,fuse,dispatch --target sm_100 | %filecheck %s

// column_tma scales leave the kernel as [groups, rows rounded up to 4]; the function's caller sees the
// logical [rows, groups].

!x = !torch.vtensor<[?,256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// CHECK:       func.func private @{{.*}}(%arg0: tensor<?x256xbf16>) -> (tensor<?x256xf8E4M3FN>, tensor<2x?xf32>)
// CHECK:         arith.divui
// CHECK:         arith.muli
// CHECK:         hal.dispatch.extern
// CHECK:       func.func @main
// CHECK:         %[[CUT:.*]] = tensor.extract_slice %{{.*}}#1[0, 0] [2, %{{.*}}] [1, 1]
// CHECK:         linalg.transpose ins(%[[CUT]]
// CHECK-SAME:      permutation = [1, 0]
func.func @main(%x: !x) -> (!q, !s) {
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %layout = torch.constant.str "column_tma"
  %q, %s = torch.operator "torch.lowering.group_quant"(%x, %int128, %int24, %float32, %layout) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}
