"""Each of PyTorch's operations through the compiler: which are lowered, with which values, on which targets.

    pip install expecttest                                      # PyTorch's own samples want it
    python -m tools.sweep --jobs 2 --found ops.jsonl            # every operation, for cpu, h200 and gfx950
    python -m tools.sweep --ops topk,sort --targets cpu         # these
    python -m tools.sweep --table --found ops.jsonl > docs/ops.md

The samples are those of `op_db` in torch.testing, the first four that are not empty, in float32 and bfloat16
or the one dtype an operation takes.  A program for a device that is here is run and compared with eager
PyTorch.  What the file holds already is not tried again.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.child import Child, Silence
from tools.sweep_worker import ORDER

_WORKER = Path(__file__).with_name("sweep_worker.py")
_SECONDS = 300.0  # for one operation on one target
# They give other numbers each time, or memory that nobody has written.
_RANDOM = re.compile(
    r"rand|normal|dropout|bernoulli|multinomial|uniform|cauchy|exponential$|geometric|rrelu|fractional_max"
    r"|empty|resize|jiterator|lowrank|multi_head_attention_forward"
)
Found = dict[str, Any]


def sweep(ops: Sequence[str], targets: Sequence[str], jobs: int, found: Found, path: Path | None) -> None:
    """Add to ``found`` and the file by operation, target and dtype a verdict for each sample, and why."""
    waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for target in targets:
        for op in ops:
            if target not in found.get(op, {}):
                waiting.put((op, target))
    writing = threading.Lock()

    def work() -> None:
        child = Child(_WORKER)
        while True:
            try:
                op, target = waiting.get_nowait()
            except queue.Empty:
                return child.close()
            answer = child.ask({"op": op, "target": target}, _SECONDS)
            silent = isinstance(answer, Silence)
            by_dtype = {"all": [[answer.verdict, answer.why]]} if silent else answer["found"]
            with writing:
                found.setdefault(op, {})[target] = by_dtype
                print(f"{op:45} {target:7} {_line(by_dtype)}", file=sys.stderr, flush=True)
                if path is not None:
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([op, target, by_dtype]) + "\n")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read(path: Path | None) -> Found:
    """What an earlier run has written to ``path``."""
    found: Found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
        op, target, by_dtype = json.loads(line)
        found.setdefault(op, {})[target] = by_dtype
    return found


def _line(by_dtype: dict[str, list[list[str]]]) -> str:
    return "; ".join(f"{dtype} {_worst(verdicts)}" for dtype, verdicts in by_dtype.items())


def _worst(verdicts: list[list[str]]) -> str:
    """The verdict of all samples, and how many have it where they differ."""
    if not verdicts:
        return "no sample"
    names = [name for name, _ in verdicts]
    worst = max(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return worst if len(set(names)) == 1 else f"{worst} {names.count(worst)}/{len(names)}"


def table(found: Found) -> str:
    """The Markdown of docs/ops.md."""
    targets = list(dict.fromkeys(target for by_target in found.values() for target in by_target))
    rows = [f"| operation | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}"]
    for op, by_target in sorted(found.items()):
        if any(verdicts for of in by_target.values() for verdicts in of.values()):
            rows.append(f"| {op} | {' | '.join(_cell(by_target.get(t, {})) for t in targets)} |")
    return "\n".join(rows) + "\n"


def _cell(by_dtype: dict[str, list[list[str]]]) -> str:
    said = {dtype: _worst(verdicts) for dtype, verdicts in by_dtype.items() if verdicts}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{dtype}: {verdict}" for dtype, verdict in said.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, or write the table; 1 where something is neither lowered right nor refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", metavar="A,B,...", help="these alone")
    parser.add_argument("--targets", default="cpu,h200,gfx950", help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at a time (%(default)s)")
    parser.add_argument("--found", type=Path, metavar="FILE", help="hold what was found, a line each")
    parser.add_argument("--table", action="store_true", help="print the table of that file, no more")
    options = parser.parse_args(argv)
    found = read(options.found)
    if options.table:
        print(table(found), end="")
        return 0
    ops = options.ops.split(",") if options.ops else _all()
    sweep(ops, options.targets.split(","), options.jobs, found, options.found)
    good = {*ORDER[: ORDER.index("refused") + 1]}
    every = (v for of in found.values() for by in of.values() for vs in by.values() for v, _ in vs)
    return 0 if all(verdict in good for verdict in every) else 1


def _all() -> list[str]:
    child = Child(_WORKER)
    answer = child.ask({}, _SECONDS)
    child.close()
    if isinstance(answer, Silence):
        raise SystemExit(f"PyTorch's samples cannot be read: {answer.why}; pip install expecttest")
    return [op for op in answer["ops"] if not _RANDOM.search(op)]


if __name__ == "__main__":
    sys.exit(main())
