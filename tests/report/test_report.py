"""The report: its schema is a contract, its table and page are for people."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from lowering.report.report import Report
from lowering.report.sites import Change, Folded, Kept, Site
from patterns.contracts import Norm, Quantization
from patterns.sites import Remark, Tally, Timing

NORM = Site(
    "rms_norm",
    "models/llama.py:64",
    "fused",
    "norm_quant",
    "row_h576_g64",
    contract=Norm(1e-5, "twice"),
    bytes=Change(4_000_000, 2_000_000),
    dispatches=Change(1, 1),
)
QUANT = Site(
    "group_quant",
    "lowering/nn.py:80",
    "fused",
    "norm_quant",
    "row_h576_g64",
    contract=Quantization(64, "float8_e4m3fnuz", limit=224.0),
    bytes=Change(3_000_000, 500_000),
    dispatches=Change(1, 0),
    note="retargeted <from> float8_e4m3fn",
)
LEFT = Site("group_quant", "/a/b/c/mlp.py:9", "unfused", reason="its input <x> & more is not a norm")
FOLDED = Folded(
    "gate.bias.folded",
    "models/moe.py:31",
    ("to(bfloat16)", "mul"),
    ("gate.bias",),
    Change(1024, 512),
    saved=2560,
)
PLAIN = Remark("block_scaled_matmul", "models/mlp.py:9", "left to IREE: <no> kernel")
REPORT = Report("cpu", (NORM, QUANT, NORM, QUANT, LEFT), dispatches=17, folded=(FOLDED,), remarks=(PLAIN,))


def rendered(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report.table())
    return console.export_text()


def test_json_has_exactly_the_schema_of_the_contract():
    assert json.loads(REPORT.to_json()) == {
        "target": "cpu",
        "sites": [
            {
                "op": site.op,
                "location": site.location,
                "status": site.status,
                "pattern": site.pattern,
                "kernel": site.kernel,
                "reason": site.reason,
                "contract": site.contract
                and {"kind": type(site.contract).__name__, **dataclasses.asdict(site.contract)},
                "bytes": site.bytes and {"before": site.bytes.before, "after": site.bytes.after},
                "dispatches": {"before": site.dispatches.before, "after": site.dispatches.after},
                "note": site.note,
            }
            for site in REPORT.sites
        ],
        "summary": {"fused": 4, "unfused": 1, "dispatches": 17},
        "folded": [
            {
                "name": "gate.bias.folded",
                "location": "models/moe.py:31",
                "operations": ["to(bfloat16)", "mul"],
                "sources": ["gate.bias"],
                "bytes": {"before": 1024, "after": 512},
                "saved": 2560,
            }
        ],
        "remarks": [
            {
                "op": "block_scaled_matmul",
                "location": "models/mlp.py:9",
                "text": "left to IREE: <no> kernel",
            }
        ],
        "state": [],
    }


def test_json_reads_back_as_the_same_report():
    assert Report.from_json(REPORT.to_json()) == REPORT


@pytest.mark.parametrize(
    ("status", "pattern", "kernel", "reason", "complaint"),
    [
        ("fused", "p", "k", "but why", "cannot have a reason"),
        ("fused", None, None, None, "pattern and its kernel must be named"),
        ("unfused", None, None, None, "needs a reason"),
        ("unfused", None, None, "", "needs a reason"),
        ("skipped", None, None, "x", '"fused" or "unfused"'),
    ],
)
def test_a_site_is_fused_or_has_a_reason(status, pattern, kernel, reason, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        Site("rms_norm", "m.py:3", status, pattern, kernel, reason)
    assert "rms_norm at m.py:3" in str(caught.value)


def test_summary_counts_sites():
    assert REPORT.summary() == {"fused": 4, "unfused": 1, "dispatches": 17}
    assert Report("gfx950").summary() == {"fused": 0, "unfused": 0, "dispatches": 0}


def test_table_puts_what_did_not_fuse_first_and_equal_sites_on_one_line():
    lines = [line for line in rendered(REPORT).splitlines() if "✗" in line or "✓" in line]
    assert [line.split()[:3] for line in lines] == [
        ["✗", "1", "group_quant"],
        ["✓", "2", "rms_norm"],
        ["✓", "2", "group_quant"],
    ]
    assert "mlp.py:9" in lines[0] and "is not a norm" in lines[0]
    assert "row_h576_g64" in lines[1]


def test_totals_say_what_fusion_saved():
    complete = Report("cpu", (NORM, QUANT, QUANT), 1)
    assert complete.traffic() == Change(10_000_000, 3_000_000)
    text = " ".join(rendered(complete, 200).split())
    assert "1 custom dispatch per call · launches of all sites 3 → 1 · bytes 10 MB → 3 MB" in text
    assert REPORT.traffic() is None  # one site of unknown size
    assert " MB" not in rendered(REPORT)


def test_what_was_folded_is_shown():
    text = " ".join(rendered(REPORT, 200).split())
    assert "1 value that depends on parameters alone computed once" in text
    assert "2.56 kB less to read and write per call, 1.02 kB → 512 B stored" in text
    page = Page(REPORT.to_html()).text
    assert "Folded" in page and "gate.bias.folded" in page and "to(bfloat16) → mul" in page
    assert "folded" not in (Page(Report("cpu").to_html()).text + rendered(Report("cpu"))).lower()


def test_notes_are_shown():
    assert "retargeted <from> float8_e4m3fn" in rendered(REPORT)
    assert "retargeted <from> float8_e4m3fn" in Page(REPORT.to_html()).text


def test_remarks_are_shown_once_each_with_their_number():
    twice = dataclasses.replace(REPORT, remarks=(PLAIN, PLAIN))
    text = " ".join(rendered(twice, 200).split())
    assert "block_scaled_matmul at mlp.py:9 (2 times): left to IREE: <no> kernel" in text
    page = Page(twice.to_html()).text
    assert "Remarks" in page and page.count("left to IREE: <no> kernel") == 1
    assert "Remarks" not in Page(Report("cpu").to_html()).text


def test_timing_shows_steps_and_patterns_the_slowest_first():
    timing = Timing({"normalize": 0.5}, {"Quick": Tally(3, 2, 0.001), "Slow": Tally(10, 1, 0.25)})
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(Report("cpu", timing=timing).timing_table())
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["normalize", "500.0"] in rows
    assert rows.index(["Slow", "1", "9", "250.0"]) < rows.index(["Quick", "2", "1", "1.0"])


@pytest.mark.parametrize("width", [60, 100, 200])
def test_table_fits_its_width_without_losing_a_word(width):
    reason = "a reason that goes on for quite a while so that no terminal shows it in a single line of text"
    text = rendered(Report("cpu", (Site("group_quant", "m.py:1", "unfused", reason=reason),)), width)
    assert all(len(line) <= width for line in text.splitlines())
    words = re.sub(r"[^a-z]", "", text)
    assert re.sub(r"[^a-z]", "", reason) in words or all(word in text for word in reason.split())


def test_table_of_nothing_says_so():
    assert "no operation of this program is one that fuses" in rendered(Report("cpu"))


class Page(HTMLParser):
    """The tags left open, the addresses a page asks for, and its text."""

    VOID = frozenset({"meta", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("report", [REPORT, Report("cpu")], ids=["sites", "empty"])
def test_page_is_well_formed_and_self_contained(report):
    page = Page(report.to_html())
    assert page.open == []
    assert page.addresses == []
    assert "http" not in report.to_html()


def test_page_escapes_and_shows_reasons():
    page = Page(REPORT.to_html())
    assert "its input <x> & more is not a norm" in page.text
    assert "4 of 5 sites fused" in page.text
    assert page.text.index("Left unfused") < page.text.index("row_h576_g64")


def test_write_goes_by_the_suffix(tmp_path):
    REPORT.write(tmp_path / "r.json")
    REPORT.write(tmp_path / "r.html")
    assert (tmp_path / "r.json").read_text() == REPORT.to_json()
    assert (tmp_path / "r.html").read_text() == REPORT.to_html()


KEPT = Kept(
    "keys", "float32", (2, 8), 64, {"prefill": "in place", "decode": "copied in each call, since it is"}
)


def test_the_state_is_shown_and_what_of_it_is_not_in_place():
    report = dataclasses.replace(REPORT, state=(KEPT, dataclasses.replace(KEPT, name="values")))
    assert Report.from_json(report.to_json()) == report
    assert report.to_dict()["state"][0]["functions"]["prefill"] == "in place"
    text = rendered(report)
    assert "state: 2 tensors, 128 B" in text
    assert "state in decode: copied in each call, since it is (2 tensors)" in " ".join(text.split())
    page = report.to_html()
    assert "<code>float32[2, 8]</code>" in page
    assert "prefill: in place<br>decode: copied" in page
