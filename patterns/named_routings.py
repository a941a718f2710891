"""List the routings that other libraries have a name for, which are raised to ``vmfuse.grouped_topk``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from iree.compiler import ir

from . import canonical, torch_ir
from .contracts import GroupedTopk
from .named_call import Arg, Call, Fields, NamedOp, RefusedCall, require
from .recogniser import Raised
from .torch_ir import TensorType
from .well_typed import is_routing


@dataclass(frozen=True)
class NamedTopk(NamedOp):
    """One row: ``name`` with its ``schema`` stands for a grouped top-k; ``x`` holds the gating.

    routing
        Fields of the contract but ``topk``, which the results' size gives.
    bias
        Name of the argument that holds it; None where there is none.
    same_dtype
        The library reads the bias as if it had the gating's dtype; where it has not there is no telling what
        was meant.
    """

    x: str = "gating_output"
    bias: str | None = None
    routing: Fields = field(default_factory=dict)
    same_dtype: bool = False

    def shapes(self, given: Mapping[str, Any], fp8: str) -> dict[str, tuple[tuple[Any, ...], Any]]:
        shape = (*given[self.x].shape[:-1], given["topk"])
        return {"weights": (shape, "float32"), "ids": (shape, "int32")}

    @property
    def site(self) -> str:
        return "grouped_topk"

    def _read(self, op: ir.Operation) -> Raised:
        operands, results = self._operands(op), _results(op)
        require(len(results) == len(self.results), f"its results are not those of {self.name}{self.schema}")
        self._check_required(operands)
        tensors = [operands[self.x]]
        if self.bias in operands and torch_ir.constant(operands[self.bias]) is not None:
            tensors.append(operands[self.bias])
        weights, ids, *source = results
        unread = not any(torch_ir.users(value) for value in source)
        require(unread, "the places it writes besides weights and ids are read, and no kernel writes them")
        topk = self._check_types([torch_ir.tensor_type(value) for value in (*tensors, weights)])
        contract = GroupedTopk(topk=topk, **Call(operands, {}, {}).fields(self.routing))
        return Raised(canonical.GROUPED_TOPK, contract, tensors, [weights, ids])

    def _check_types(self, types: list[TensorType | None]) -> int:
        """Check gating, bias and weights, and count what is chosen."""
        shown = ", ".join(map(str, types))
        require(
            is_routing(types), f"its gating, bias and weights are {shown}; sizes of experts must be known"
        )
        dtypes = {type_.dtype for type_ in types[:-1] if type_ is not None}
        one = (
            f"it reads the bias as if it had the gating's dtype, and they have {' and '.join(sorted(dtypes))}"
        )
        require(not self.same_dtype or len(dtypes) == 1, one)
        topk = types[-1].shape[-1] if types[-1] is not None else None
        assert topk is not None  # is_routing
        return topk


def _results(op: ir.Operation) -> list[ir.Value]:
    """The results of ``op``; where it returns a list, what that is unpacked to."""
    if len(op.results) == 1:
        users = torch_ir.users(op.result)
        if len(users) == 1 and users[0].name == "torch.prim.ListUnpack":
            return list(users[0].results)
    return list(op.results)


_WRITTEN = ("weights", "ids")
_GROUPS = {"num_expert_group": Arg("num_expert_group"), "topk_group": Arg("topk_group")}
_SCALE = {"routed_scaling_factor": Arg("routed_scaling_factor")}
_SCALED = {**_GROUPS, **_SCALE}
_SCORES = {"softmax": "softmax", "sigmoid": "sigmoid"}


def _aiter_biased(name: str, kept: str, *, same_dtype: bool = True) -> NamedTopk:
    """AITER's operation with a bias, under its own names and under vLLM's."""
    return NamedTopk(
        name,
        "(Tensor gating_output, Tensor correction_bias, Tensor! topk_weights, Tensor! topk_ids, "
        f"int num_expert_group, int {kept}, bool need_renorm, float routed_scaling_factor=1.0) -> ()",
        _WRITTEN,
        bias="correction_bias",
        routing={**_SCALED, "topk_group": Arg(kept), "renormalize": Arg("need_renorm")},
        same_dtype=same_dtype,
    )


def _aiter_grouped(name: str, scores: str, meant: Arg) -> NamedTopk:
    """AITER's operation without a bias: groups of largest score."""
    return NamedTopk(
        name,
        "(Tensor gating_output, Tensor! topk_weights, Tensor! topk_ids, int num_expert_group, "
        f"int topk_group, bool need_renorm, {scores}, float routed_scaling_factor=1.0) -> ()",
        _WRITTEN,
        routing={
            **_SCALED,
            "renormalize": Arg("need_renorm"),
            "scores": meant,
            "group_value": "largest",
        },
    )


def _sglang(scaled: bool) -> NamedTopk:
    """SGLang's, which scales its weights only if told to."""
    return NamedTopk(
        "sgl_kernel::moe_fused_gate",
        "(Tensor input, Tensor bias, int num_expert_group, int topk_group, int topk, "
        "int num_fused_shared_experts, float routed_scaling_factor, "
        "bool apply_routed_scaling_factor_on_output) -> Tensor[]",
        ("weights", "ids"),
        x="input",
        bias="bias",
        routing=_SCALED if scaled else _GROUPS,
        requires={"num_fused_shared_experts": 0, "apply_routed_scaling_factor_on_output": scaled},
    )


def _ungrouped(
    name: str,
    scores: str,
    arguments: str,
    *,
    bias: str | None = None,
    requires: Fields | None = None,
    scaled: bool = False,
) -> NamedTopk:
    """Routing without groups, which writes weights, ids and often the places it read them from."""
    source = "token_expert_indices" in arguments
    return NamedTopk(
        name,
        f"(Tensor! topk_weights, Tensor! topk_indices, {arguments}) -> ()",
        (*_WRITTEN, "source") if source else _WRITTEN,
        bias=bias,
        routing={"renormalize": Arg("renormalize"), "scores": scores, **(_SCALE if scaled else {})},
        requires=requires or {},
    )


def _vllm_ungrouped() -> Iterable[NamedTopk]:
    """vLLM's: choices of the biased scores, weights of the others; of equals the lower expert."""
    gating = "Tensor! token_expert_indices, Tensor gating_output, bool renormalize"
    padding = {"is_padding": None}
    yield _ungrouped(
        "_moe_C::topk_softmax",
        "softmax",
        f"{gating}, Tensor? bias=None, Tensor? is_padding=None",
        bias="bias",
        requires=padding,
    )
    yield _ungrouped(
        "_moe_C::topk_sigmoid",
        "sigmoid",
        f"{gating}, Tensor? bias=None, float routed_scaling_factor=1.0, Tensor? is_padding=None",
        bias="bias",
        requires=padding,
        scaled=True,
    )
    # With a bias it gives (score + bias) - bias for a score; with ids of tokens it chooses by a table.
    yield _ungrouped(
        "_moe_C::topk_softplus_sqrt",
        "sqrt_softplus",
        f"{gating}, float routed_scaling_factor, Tensor? correction_bias=None, Tensor? input_ids=None, "
        "Tensor? tid2eid=None, Tensor? is_padding=None",
        requires={"correction_bias": None, "input_ids": None, "tid2eid": None, **padding},
        scaled=True,
    )
    shared = "int num_shared_experts=0, str shared_expert_scoring_func=''"
    yield _ungrouped(
        "vllm::rocm_aiter_topk_softmax", "softmax", f"{gating}, {shared}", requires={"num_shared_experts": 0}
    )


# How sure a row is: see patterns/named_ops.py.
NAMED_OPS = (
    NamedTopk(  # read: it is this project's own
        "lowering::grouped_topk",
        "(Tensor gating_output, Tensor? correction_bias=None, *, int topk, int num_expert_group=1, "
        "int topk_group=1, bool renormalize=True, float routed_scaling_factor=1.0, float eps=0.0, "
        "str scores='sigmoid', str group_value='two_largest', str dropped='never', str weights='scores', "
        "str order='first', float? least_total=None, str score_dtype='float32', str choice_dtype='float32', "
        "str step_dtype='float32') -> (Tensor, Tensor)",
        ("weights", "ids"),
        bias="correction_bias",
        routing={
            **_SCALED,
            **{name: Arg(name) for name in ("renormalize", "eps", "least_total")},
            **{name: Arg(name) for name in ("scores", "group_value", "dropped", "weights", "order")},
            **{name: Arg(name) for name in ("score_dtype", "choice_dtype", "step_dtype")},
        },
    ),
    # Schemas read, arithmetic numerics.
    _aiter_biased("aiter::biased_grouped_topk", "topk_group"),
    _aiter_biased("aiter::biased_grouped_topk_hip", "topk_grp"),
    _aiter_biased("vllm::rocm_aiter_biased_grouped_topk", "topk_group"),
    # Schemas read, arithmetic that of AITER's account of it in PyTorch.
    _aiter_grouped(
        "aiter::grouped_topk", "bool is_softmax=True", Arg("is_softmax", {True: "softmax", False: "sigmoid"})
    ),
    _aiter_grouped(
        "vllm::rocm_aiter_grouped_topk", "str scoring_func='softmax'", Arg("scoring_func", _SCORES)
    ),
    # Schema read, arithmetic memory; 0 are scores that are given.
    NamedTopk(
        "_moe_C::grouped_topk",
        "(Tensor scores, int n_group, int topk_group, int topk, bool renormalize, "
        "float routed_scaling_factor, Tensor bias, int scoring_func) -> (Tensor, Tensor)",
        ("weights", "ids"),
        x="scores",
        bias="bias",
        routing={
            **_SCALED,
            "num_expert_group": Arg("n_group"),
            "renormalize": Arg("renormalize"),
            "eps": 1e-20,
            "scores": Arg("scoring_func", {0: "gating", 1: "sigmoid"}),
        },
    ),
    # Schemas and arithmetic read.
    _sglang(scaled=True),
    _sglang(scaled=False),
    *_vllm_ungrouped(),
    # With a bias SGLang gives (score + bias) - bias for a score.
    _ungrouped(
        "sgl_kernel::topk_softmax",
        "softmax",
        "Tensor gating_output, bool renormalize, float moe_softcapping=0.0, Tensor? correction_bias=None",
        requires={"moe_softcapping": 0.0, "correction_bias": None},
    ),
    _ungrouped(
        "sgl_kernel::topk_sigmoid",
        "sigmoid",
        "Tensor gating_output, bool renormalize, Tensor? correction_bias=None",
        requires={"correction_bias": None},
    ),
)

REFUSED = RefusedCall(NAMED_OPS)
