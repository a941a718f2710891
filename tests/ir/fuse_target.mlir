// RUN: %opt %s --steps raise,fuse --report --target gfx950 | %filecheck %s --check-prefix GFX950
// RUN: %opt %s --steps raise,fuse --report --target gfx942 | %filecheck %s --check-prefix GFX942

// The target decides what has a kernel: gfx942 has no float8_e4m3fn in hardware, so there the norm fuses alone.

!x = !torch.vtensor<[?,256],bf16>
!w = !torch.vtensor<[256],bf16>
!q = !torch.vtensor<[?,256],f8E4M3FN>
!s = !torch.vtensor<[?,2],f32>

// GFX950:      // site 0: rms_norm at line {{[0-9]+}} fused as norm_quant
// GFX950-NEXT: // site 1: group_quant at line {{[0-9]+}} fused as norm_quant

// GFX942:      // site 0: rms_norm at line {{[0-9]+}} fused as norm
// GFX942-NEXT: // site 1: group_quant at line {{[0-9]+}} unfused: gfx942 {{.*}}float8_e4m3fnuz{{.*}}float8_e4m3fn{{.*}}.

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
