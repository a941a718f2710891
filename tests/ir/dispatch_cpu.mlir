// RUN: %opt %s --steps raise,fuse,dispatch --target cpu --report | %filecheck %s

// On the cpu a kernel is an object file linked into an executable whose only function passes on a
// pointer and an offset per tensor, the number of rows and the workgroup.

!x = !torch.vtensor<[2,?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[2,?,256],f8E4M3FN>
!s = !torch.vtensor<[2,?,2],f32>

// CHECK:       stream.executable private @[[EXECUTABLE:executable_rms_norm_quant128_bf16_h256_[0-9a-f]+]] attributes {hal.executable.objects
// CHECK-SAME:    #hal.executable.target<"llvm-cpu"
// CHECK-SAME:    path = "{{.*}}.o"
// CHECK:         stream.executable.export public @[[WORKGROUP:.*]] workgroups(
// CHECK:         func.func private @[[ENTRY:.*]](memref<bf16>, i64, memref<bf16>, i64, memref<f8E4M3FN>, i64, memref<f32>, i64, i32, i32) attributes {hal.import.static, llvm.bareptr = true}
// CHECK:         call @[[ENTRY]]

// CHECK:       func.func private @[[FUNCTION:dispatch.rms_norm_quant128_bf16_h256_[0-9a-f]+]](%arg0: tensor<?x256xbf16>, %arg1: tensor<256xbf16>) -> (tensor<?x256xf8E4M3FN>, tensor<?x2xf32>)
// CHECK:         flow.dispatch @[[EXECUTABLE]]::@[[WORKGROUP]][%{{.*}}](%arg0, %arg1, %{{.*}})

// CHECK:       func.func @main
// CHECK:         %[[X:.*]] = torch_c.to_builtin_tensor %arg0
// CHECK:         %[[ROWS:.*]] = tensor.collapse_shape %[[X]] {{\[\[}}0, 1], [2]] : tensor<2x?x256xbf16> into tensor<?x256xbf16>
// CHECK:         %[[Q:.*]]:2 = call @[[FUNCTION]](%[[ROWS]], %{{.*}})
// CHECK:         tensor.expand_shape %[[Q]]#0
// CHECK:         tensor.expand_shape %[[Q]]#1
// CHECK:       // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant in [[ENTRY]]
// CHECK-NEXT:  // site 1: group_quant at line {{[0-9]+}} fused as norm_quant in [[ENTRY]]
func.func @main(%x: !x, %w: !w) -> (!q, !s) {
  %eps = torch.constant.float 1.0e-06
  %int128 = torch.constant.int 128
  %int24 = torch.constant.int 24
  %float32 = torch.constant.str "float32"
  %row = torch.constant.str "row"
  %y = torch.operator "torch.lowering.rms_norm"(%x, %w, %eps) : (!x, !w, !torch.float) -> !x
  %q, %s = torch.operator "torch.lowering.group_quant"(%y, %int128, %int24, %float32, %row) : (!x, !torch.int, !torch.int, !torch.str, !torch.str) -> (!q, !s)
  return %q, %s : !q, !s
}
