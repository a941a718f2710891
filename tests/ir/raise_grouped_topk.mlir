// RUN: %opt %s --steps raise --report | %filecheck %s

// Routing by name, and written out as DeepSeek-V3 does; ids keep the dtype they have.

!g = !torch.vtensor<[?,8],bf16>
!f = !torch.vtensor<[?,8],f32>
!b = !torch.vtensor<[8],f32>
!w = !torch.vtensor<[?,2],f32>
!i = !torch.vtensor<[?,2],si32>
!l = !torch.vtensor<[?,2],si64>

// What the schema has a value for may be left out.
// CHECK-LABEL: func.func @by_name
// CHECK-NEXT:    torch.operator "vmfuse.grouped_topk"(%arg0, %arg1) {contract = {num_expert_group = 4 : i64, topk = 2 : i64}, site = 0 : i64} : (!torch.vtensor<[?,8],bf16>, !torch.vtensor<[8],f32>) -> (!torch.vtensor<[?,2],f32>, !torch.vtensor<[?,2],si32>)
// CHECK:       // site 0: grouped_topk at line [[# @LINE + 5]] open
func.func @by_name(%g: !g, %b: !b) -> (!w, !i) {
  %topk = torch.constant.int 2
  %groups = torch.constant.int 4
  %kept = torch.constant.int 1
  %w, %i = torch.operator "torch.lowering.grouped_topk"(%g, %b, %topk, %groups, %kept) : (!g, !b, !torch.int, !torch.int, !torch.int) -> (!w, !i)
  return %w, %i : !w, !i
}

// A number of groups that is computed is part of no contract.
// CHECK-LABEL: func.func @computed_groups
// CHECK:         torch.lowering.grouped_topk
// CHECK:       // site 0: grouped_topk at line {{[0-9]+}} unfused: lowering::grouped_topk: num_expert_group is computed; it must be a constant
func.func @computed_groups(%g: !g, %b: !b, %groups: !torch.int) -> (!w, !i) {
  %topk = torch.constant.int 2
  %kept = torch.constant.int 1
  %w, %i = torch.operator "torch.lowering.grouped_topk"(%g, %b, %topk, %groups, %kept) : (!g, !b, !torch.int, !torch.int, !torch.int) -> (!w, !i)
  return %w, %i : !w, !i
}

// scoring_func 2 is none that has a meaning.
// CHECK-LABEL: func.func @other_scores
// CHECK:         torch._moe_C.grouped_topk
// CHECK:       // site 0: grouped_topk at line {{[0-9]+}} unfused: _moe_C::grouped_topk: scoring_func is 2, which has no meaning here
func.func @other_scores(%g: !g, %b: !b) -> (!w, !i) {
  %topk = torch.constant.int 2
  %groups = torch.constant.int 4
  %kept = torch.constant.int 1
  %true = torch.constant.bool true
  %factor = torch.constant.float 1.0
  %unknown = torch.constant.int 2
  %w, %i = torch.operator "torch._moe_C.grouped_topk"(%g, %groups, %kept, %topk, %true, %factor, %b, %unknown) : (!g, !torch.int, !torch.int, !torch.int, !torch.bool, !torch.float, !b, !torch.int) -> (!w, !i)
  return %w, %i : !w, !i
}

// Results in a list.
// CHECK-LABEL: func.func @in_a_list
// CHECK-NEXT:    %[[OUT:.*]]:2 = torch.operator "vmfuse.grouped_topk"(%arg0, %arg1) {contract = {num_expert_group = 4 : i64, routed_scaling_factor = 2.500000e+00 : f64, topk = 2 : i64}
// CHECK-NEXT:    return %[[OUT]]#0, %[[OUT]]#1
func.func @in_a_list(%g: !g, %b: !b) -> (!w, !i) {
  %topk = torch.constant.int 2
  %groups = torch.constant.int 4
  %kept = torch.constant.int 1
  %shared = torch.constant.int 0
  %factor = torch.constant.float 2.5
  %true = torch.constant.bool true
  %list = torch.operator "torch.sgl_kernel.moe_fused_gate"(%g, %b, %groups, %kept, %topk, %shared, %factor, %true) : (!g, !b, !torch.int, !torch.int, !torch.int, !torch.int, !torch.float, !torch.bool) -> !torch.list<vtensor>
  %out:2 = torch.prim.ListUnpack %list : !torch.list<vtensor> -> !w, !i
  return %out#0, %out#1 : !w, !i
}

// Without groups it is one group; the gating is read as it was before it was widened; the ids are read before the
// weights are made.
// CHECK-LABEL: func.func @without_groups
// CHECK-NEXT:    %[[OUT:.*]]:2 = torch.operator "vmfuse.grouped_topk"(%arg0, %arg1) {contract = {order = "torch", renormalize = false, topk = 2 : i64}
// CHECK-NEXT:    %[[NEG:.*]] = torch.aten.neg %[[OUT]]#1
// CHECK-NEXT:    return %[[OUT]]#0, %[[NEG]]
func.func @without_groups(%g: !g, %b: !b) -> (!w, !l) {
  %int6 = torch.constant.int 6
  %one = torch.constant.int 1
  %k = torch.constant.int 2
  %last = torch.constant.int -1
  %true = torch.constant.bool true
  %false = torch.constant.bool false
  %wide = torch.prims.convert_element_type %g, %int6 : !g, !torch.int -> !f
  %scores = torch.aten.sigmoid %wide : !f -> !f
  %choices = torch.aten.add.Tensor %scores, %b, %one : !f, !b, !torch.int -> !f
  %values, %ids = torch.aten.topk %choices, %k, %last, %true, %true : !f, !torch.int, !torch.int, !torch.bool, !torch.bool -> !w, !l
  %neg = torch.aten.neg %ids : !l -> !l
  %weights = torch.aten.gather %scores, %one, %ids, %false : !f, !torch.int, !l, !torch.bool -> !w
  return %weights, %neg : !w, !l
}

// The smallest are not the largest, and weights of other scores are not these.
// CHECK-LABEL: func.func @smallest
// CHECK-NOT:     vmfuse.grouped_topk
// CHECK:         return
func.func @smallest(%f: !f, %b: !b) -> (!w, !l) {
  %one = torch.constant.int 1
  %k = torch.constant.int 2
  %last = torch.constant.int -1
  %true = torch.constant.bool true
  %false = torch.constant.bool false
  %scores = torch.aten.sigmoid %f : !f -> !f
  %choices = torch.aten.add.Tensor %scores, %b, %one : !f, !b, !torch.int -> !f
  %values, %ids = torch.aten.topk %choices, %k, %last, %false, %true : !f, !torch.int, !torch.int, !torch.bool, !torch.bool -> !w, !l
  %weights = torch.aten.gather %scores, %one, %ids, %false : !f, !torch.int, !l, !torch.bool -> !w
  return %weights, %ids : !w, !l
}

// CHECK-LABEL: func.func @other_weights
// CHECK-NOT:     vmfuse.grouped_topk
// CHECK:         return
func.func @other_weights(%f: !f, %b: !b) -> (!w, !l) {
  %one = torch.constant.int 1
  %k = torch.constant.int 2
  %last = torch.constant.int -1
  %true = torch.constant.bool true
  %false = torch.constant.bool false
  %scores = torch.aten.sigmoid %f : !f -> !f
  %choices = torch.aten.add.Tensor %scores, %b, %one : !f, !b, !torch.int -> !f
  %values, %ids = torch.aten.topk %choices, %k, %last, %true, %true : !f, !torch.int, !torch.int, !torch.bool, !torch.bool -> !w, !l
  %weights = torch.aten.gather %f, %one, %ids, %false : !f, !torch.int, !l, !torch.bool -> !w
  return %weights, %ids : !w, !l
}
