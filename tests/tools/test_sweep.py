"""The table of operations: what is said of samples, and that a worker's answer is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from tools import sweep
from tools.sweep_worker import Sample, judged


def sample(op, *args: object) -> Sample:
    leaves, tree = pytree.tree_flatten((args[0], args[1:], {}))
    return Sample("op", op, leaves, tree)


def test_a_sample_is_judged_by_its_values() -> None:
    x = torch.randn(3, 4)
    calls: list[int] = []

    def other_each_time(t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return t + len(calls)

    good, refused = sample(torch.neg, x), sample(torch.linalg.svd, x)
    assert judged([good], "cpu") == [("exact", "")]
    assert judged([sample(other_each_time, x)], "cpu")[0][0] == "differs"
    verdicts = judged([good, refused], "cpu")  # the good one is not blamed for the other
    assert verdicts[0] == ("exact", "") and verdicts[1][0] == "refused" and "linalg_svd" in verdicts[1][1]
    assert judged([good], "gfx950") == [("compiled", "")]


def test_the_table_says_the_worst_of_all_samples(tmp_path: Path) -> None:
    path = tmp_path / "ops.jsonl"
    path.write_text(
        '["neg", "cpu", {"float32": [["exact", ""]], "bfloat16": [["exact", ""]]}]\n'
        '["neg", "h200", {"float32": [["close", ""], ["refused", "why"]], "bfloat16": [["exact", ""]]}]\n'
        '["none", "cpu", {"float32": []}]\n'
    )
    lines = sweep.table(sweep.read(path)).splitlines()
    assert lines[0] == "| operation | cpu | h200 |" and len(lines) == 3
    assert lines[2] == "| neg | exact | float32: refused 1/2, bfloat16: exact |"


def test_every_operation_has_a_name_and_samples() -> None:
    pytest.importorskip("expecttest", reason="PyTorch's own samples need it; the table is made with it")
    from tools.sweep_worker import dtypes_of, samples_of

    names = sweep._all()
    assert len(names) > 500 and "topk" in names and not any("randn" in name for name in names)
    assert dtypes_of("topk") == [torch.float32, torch.bfloat16] and samples_of("topk", torch.float32)
