"""Runs what ``tools/gpu/pack.py`` compiled elsewhere, on this machine, against eager PyTorch.

    python -m tools.gpu.run gpu                     # a GPU, PyTorch and the iree-base-runtime wheel
    python -m tools.gpu.run build/cpu-cases --device cpu
    python -m tools.gpu.run gpu --smoke             # anywhere: is the directory complete and readable?

For every case: the program and eager PyTorch on fresh random inputs of several row counts, calls from
several threads, mistakes that must be refused, and each kernel object by itself over poisoned outputs.
On a GPU also compares calls that are graphs with those that are IREE's, and times: kernel objects beside the
copy bandwidth of the same run and torch.compile of the same rows, and calls of the program.  ``gpu_compare``
says what may differ and why.

Every case runs in a process of its own, so that a crash or a lost device in one leaves the others alone.
Prints a table; writes everything to --json (default: $OUT/run_on_gpu.json if OUT is set).

Exit codes: 0 all is well, 1 something failed, 2 usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tools.command_line import numbers
from tools.gpu.cases import Case, Manifest, Packed, build, case_named, load_weights
from tools.gpu.compare import Difference, compare_all, compare_logits
from tools.gpu.graphs import check_graphs
from tools.gpu.timing import ROWS, call_seconds, check_kernel, copy_bandwidth, time_kernel
from tools.gpu.launch import Launch, read_launches, row_spec
from torch import Tensor, nn

import lowering
from lowering.errors import LoweringError, RunError, UsageError
from patterns.contracts import RowSpec

CASE_SECONDS = 400
_THREADS, _CALLS_PER_THREAD = 4, 6
_CALL_ROWS = (1, 128, 1024)

Record = dict[str, Any]
Step = tuple[str, str, Callable[[], Record | str]]
"""The group it is reported in, what it is, and the call that does it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        manifest = Manifest.load(options.directory)
        names = options.case or [case.name for case in manifest.cases]
        for name in names:
            manifest.case(name)
            case_named(name)
        device = options.device or manifest.backend
        if options.child:
            return run_case(manifest, options, names[0], device)
        if options.smoke:
            return smoke(manifest, options.directory, names)
        return run_all(manifest, options, names, device)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="what pack_for_gpu.py wrote")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: what the cases were compiled for)")
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="only this case (repeatable)"
    )
    parser.add_argument(
        "--rows", type=numbers, metavar="N,N,...", help="row counts instead of each case's own"
    )
    parser.add_argument("--no-times", action="store_true", help="check only")
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found to FILE")
    parser.add_argument(
        "--smoke", action="store_true", help="only read the directory; needs no GPU and no IREE"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


# All cases, each in a process of its own --------------------------------------------------------


def run_all(manifest: Manifest, options: argparse.Namespace, names: Sequence[str], device: str) -> int:
    """Run every case, print the tables, write the JSON after each case."""
    found: Record = {"machine": machine(device), "packed": dict(manifest.versions), "cases": []}
    file = options.json or (Path(os.environ["OUT"]) / "run_on_gpu.json" if os.environ.get("OUT") else None)
    print("; ".join(f"{name} {value}" for name, value in found["machine"].items()), flush=True)
    for name in names:
        records = _in_child(options, name, device)
        found["cases"].append({"case": name, "records": records})
        print("\n".join(table(name, records)), flush=True)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    everything = [record for case in found["cases"] for record in case["records"]]
    failed = [record for record in everything if record["status"] == "failed"]
    print(f"{len(everything)} checks and timings, {len(failed)} failed")
    return 1 if failed else 0


def machine(device: str) -> dict[str, str]:
    """Give what this is, for the record."""
    import iree.runtime.version as iree

    found = {"torch": torch.__version__, "iree-base-runtime": iree.VERSION, "device": device}
    if device != "cpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _in_child(options: argparse.Namespace, name: str, device: str) -> list[Record]:
    """The records of one case; what a child that died had recorded, and that it died."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "records"
        command = [sys.executable, __file__, str(options.directory), "--child", "--case", name]
        command += ["--device", device, "--json", str(log)]
        command += ["--rows", ",".join(map(str, options.rows))] if options.rows else []
        command += ["--no-times"] * options.no_times + ["--no-compile"] * options.no_compile
        try:
            code = subprocess.run(command, check=False, timeout=CASE_SECONDS).returncode
            end = None if code == 0 else f"ended with {f'signal {-code}' if code < 0 else f'code {code}'}"
        except subprocess.TimeoutExpired:
            end = f"took more than {CASE_SECONDS} s"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines]
    return records + (
        [{"group": "process", "what": "process", "status": "failed", "detail": end}] if end else []
    )


def table(name: str, records: Sequence[Record]) -> Iterator[str]:
    """The lines of one case: what failed and what was timed in full, the rest a line a group."""
    for group, members in itertools.groupby(records, lambda record: record["group"]):
        members = list(members)
        good = [record for record in members if record["status"] == "ok"]
        if good and group != "time":
            last = good[-1]
            yield _line(
                "ok", name, f"{group}: {len(good)} of {len(members)}", f"{last['what']}: {last['detail']}"
            )
        for record in members:
            if group == "time" or record["status"] != "ok":
                yield _line(record["status"], name, record["what"], record["detail"])


def _line(status: str, name: str, what: str, detail: str) -> str:
    return f"{'ok    ' if status == 'ok' else 'FAILED'} {name:17s} {what:22s} {detail}"


def smoke(manifest: Manifest, directory: Path, names: Sequence[str]) -> int:
    """Read everything that can be read without a device."""
    for name in names:
        packed = manifest.case(name)
        load_weights(build(case_named(name)), directory / packed.weights)
        launches = read_launches(directory / packed.kernels)
        list(row_kernels(packed, directory))
        for launch in launches:
            for rows in (0, 1, 3, launch.rows):
                launch.resized(rows)
            if launch.resized(launch.rows) != launch:
                raise UsageError(f"{launch.entry}: its grid does not follow from its rows")
        print(f"ok     {name}: {len(launches)} launches, {packed.report}")
    return 0


def row_kernels(packed: Packed, directory: Path) -> Iterator[tuple[Launch, RowSpec]]:
    """Each row kernel of a case and what it computes; products and routing have checks of their own."""
    for launch in read_launches(directory / packed.kernels):
        data = packed.specs[launch.entry]
        if "quantizations" in data:
            yield launch, row_spec(data)


# One case ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Trial:
    """One loaded case on its device."""

    case: Case
    packed: Packed
    directory: Path
    device: torch.device
    name: str
    model: nn.Module
    program: Any
    rows: Sequence[int]

    def load(self, **changes: Any) -> Any:
        """The program, loaded again."""
        parameters = self.directory / self.packed.parameters if self.packed.parameters else None
        known = {"source": self.directory / self.packed.vmfb, "device": self.name, "parameters": parameters}
        return lowering.load(**{**known, **changes})

    def inputs(self, rows: int, seed: int) -> tuple[Tensor, ...]:
        return self.case.inputs(rows, seed, self.device)

    def outputs(self, rows: int, seed: int) -> tuple[Tensor, ...]:
        return _tuple(self.program(*self.inputs(rows, seed)))


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def run_case(manifest: Manifest, options: argparse.Namespace, name: str, device: str) -> int:
    """In the child: try everything with one case; a record a line to --json.  Always 0 unless it crashes."""
    with torch.inference_mode(), options.json.open("w", encoding="utf-8") as log:

        def attempt(group: str, what: str, call: Callable[[], Record | str]) -> bool:
            record = {"group": group, **_attempt(what, call)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            return record["status"] == "ok"

        trial = _Lazy(manifest, options, name, device)
        if attempt("load", "program", trial.load):
            for step in _steps(trial.trial, options, cuda=device.startswith("cuda")):
                attempt(*step)
    return 0


def _attempt(what: str, call: Callable[[], Record | str]) -> Record:
    try:
        found = call()
        record = found if isinstance(found, dict) else {"detail": found}
        return {"what": what, "status": "ok", **record}
    except Exception as error:  # whatever it is, the next step is to run
        where = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__}: {error}".strip().splitlines()
        known = isinstance(error, LoweringError)
        text = " ".join(detail)[:600] + ("" if known else f" ({Path(where.filename).name}:{where.lineno})")
        return {"what": what, "status": "failed", "detail": text}


class _Lazy:
    """Loads a case inside an attempt."""

    def __init__(self, manifest: Manifest, options: argparse.Namespace, name: str, device: str) -> None:
        self._arguments = (manifest, options, name, device)

    def load(self) -> str:
        manifest, options, name, device = self._arguments
        case, packed = case_named(name), manifest.case(name)
        # inference_mode tensors may not be changed outside; these never are.
        model = load_weights(build(case), options.directory / packed.weights).to(device)
        place = torch.empty(0, device=device).device
        rows = options.rows or case.rows
        self.trial = Trial(case, packed, options.directory, place, device, model, None, rows)
        self.trial.program = self.trial.load()
        return f"{packed.report}"


def _steps(trial: Trial, options: argparse.Namespace, *, cuda: bool) -> Iterator[Step]:
    """Everything that is tried, in order: what is right, what is refused, how fast it is."""
    check = check_logits if trial.case.ids else check_rows
    for seed, rows in enumerate(trial.rows):
        yield "results", f"T={rows}", lambda rows=rows, seed=seed: check(trial, rows, seed)
    if cuda:
        plain = trial.load(graphs="off")
        for rows in trial.rows:
            of_call = functools.partial(trial.inputs, rows)
            yield "graphs", f"T={rows}", lambda of_call=of_call: check_graphs(trial.program, plain, of_call)
    yield "threads", "one program", lambda: check_threads(trial, shared=True)
    yield "threads", "own programs", lambda: check_threads(trial, shared=False)
    for what, mistake in mistakes(trial):
        yield "mistakes", what, lambda mistake=mistake: refused(mistake)
    kernels = {launch.entry: (launch, spec) for launch, spec in row_kernels(trial.packed, trial.directory)}
    for entry, (launch, spec) in kernels.items():
        for rows in (0, 1, 3, 17, 128):
            resized = launch.resized(rows)
            call = functools.partial(check_object, resized, spec, trial.device)
            yield "objects", f"{entry} T={rows}", call
    if not cuda or options.no_times:
        return
    yield from _timings(trial, kernels.values(), options)


# Right results ----------------------------------------------------------------------------------


def check_rows(trial: Trial, rows: int, seed: int) -> Record:
    """The program beside eager, output by output; its arguments stay what they were."""
    arguments, same = trial.inputs(rows, seed), trial.inputs(rows, seed)
    actual = _tuple(trial.program(*arguments))
    for number, (argument, before) in enumerate(zip(arguments, same, strict=True)):
        if not torch.equal(argument, before):
            return {"status": "failed", "detail": f"argument {number} was written"}
    return _judge(compare_all(trial.case.outputs, actual, trial.model(*same)))


def check_logits(trial: Trial, rows: int, seed: int) -> Record:
    """The program beside eager bfloat16, both beside the same model in float32."""
    ids = trial.inputs(rows, seed)
    (actual,), eager = trial.outputs(rows, seed), trial.model(*ids)
    exact = load_weights(build(trial.case), trial.directory / trial.packed.weights).float()
    return _judge(compare_logits(actual, eager, exact.to(trial.device)(*ids)))


def _judge(found: Sequence[Difference]) -> Record:
    problems = [f"{difference.name}: {difference.problem}" for difference in found if difference.problem]
    named = {difference.name: str(difference) for difference in found}
    detail = "; ".join(problems or named.values())
    numbers = [dataclasses.asdict(difference) for difference in found]
    return {"status": "failed" if problems else "ok", "detail": detail, "differences": numbers}


def check_object(launch: Any, spec: Any, device: torch.device) -> str:
    """One kernel object by itself."""
    problems = check_kernel(launch, spec, device)
    if problems:
        raise RunError(f"{launch.entry}: {'; '.join(problems)}")
    return "as the reference"


def check_threads(trial: Trial, *, shared: bool) -> str:
    """Calls from several threads give, bit for bit, what calls one after another give."""
    sizes = (1, 17, 33, 64)
    alone = {rows: trial.outputs(rows, rows) for rows in sizes}
    inputs = {rows: trial.inputs(rows, rows) for rows in sizes}

    def work(index: int) -> int:
        program = trial.program if shared else trial.load()
        wrong = 0
        for call in range(_CALLS_PER_THREAD):
            rows = sizes[(index + call) % len(sizes)]
            wrong += not _same(_tuple(program(*inputs[rows])), alone[rows])
        return wrong

    with ThreadPoolExecutor(_THREADS) as pool:
        wrong = sum(pool.map(work, range(_THREADS)))
    if wrong:
        raise RunError(
            f"{wrong} of {_THREADS * _CALLS_PER_THREAD} calls differ from the same call made alone"
        )
    return f"{_THREADS} x {_CALLS_PER_THREAD} calls equal those made alone"


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


# Mistakes ---------------------------------------------------------------------------------------


def mistakes(trial: Trial) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls and loads that have to be refused."""
    inputs = trial.inputs(4, 0)
    first, rest = inputs[0], inputs[1:]
    away = torch.device("meta" if trial.device.type == "cpu" else "cpu")
    other = "cuda" if trial.device.type == "cpu" else "cpu"
    vmfb = (trial.directory / trial.packed.vmfb).read_bytes()
    yield "another device", lambda: trial.program(first.to(away), *rest)
    yield "another dtype", lambda: trial.program(first.to(torch.float64), *rest)
    yield "another rank", lambda: trial.program(first[0], *rest)
    yield "another size", lambda: trial.program(_another_size(trial, first), *rest)
    yield "no arguments", trial.program
    yield "no tensor", lambda: trial.program(None, *rest)
    yield "loaded on another device", lambda: trial.load(device=other)
    yield "a truncated vmfb", lambda: trial.load(source=vmfb[: len(vmfb) // 2])
    if trial.packed.parameters:
        yield "no parameters", lambda: trial.load(parameters=None)
        yield "foreign parameters", lambda: trial.load(parameters=trial.directory / trial.packed.weights)
    else:
        yield "unwanted parameters", lambda: trial.load(parameters=trial.directory / trial.packed.weights)


def _another_size(trial: Trial, tensor: Tensor) -> Tensor:
    return tensor.repeat(2, 1) if trial.case.ids else tensor[:, :-1]


def refused(mistake: Callable[[], object]) -> str:
    """The sentence with which ``mistake`` is refused; RunError when it is not, or not in one line."""
    try:
        mistake()
    except LoweringError as error:
        if "\n" in str(error):
            raise RunError(f"refused in more than a sentence: {error}") from error
        return str(error)
    raise RunError("it was not refused")


# Times ------------------------------------------------------------------------------------------


def _timings(
    trial: Trial, kernels: Iterable[tuple[Launch, RowSpec]], options: argparse.Namespace
) -> Iterator[Step]:
    for rows in _CALL_ROWS:
        yield "time", f"call T={rows}", lambda rows=rows: time_call(trial, rows)
    if not trial.case.timed:
        return
    bandwidth: list[float] = []
    yield "time", "copy", lambda: time_copy(bandwidth)
    for launch, spec in kernels:
        for rows in ROWS:
            call = functools.partial(time_object, launch.resized(rows), spec, bandwidth, options)
            yield "time", f"object T={rows}", call


def time_call(trial: Trial, rows: int) -> Record:
    """A call of the program from Python, results waited for."""
    inputs = trial.inputs(rows, 1)
    seconds = call_seconds(lambda: trial.program(*inputs))
    return {"detail": f"{1e6 * seconds:.0f} us", "seconds": seconds}


def time_copy(bandwidth: list[float]) -> Record:
    """The bandwidth everything after this is held against."""
    bandwidth.append(copy_bandwidth())
    return {"detail": f"{bandwidth[0] / 1e9:.0f} GB/s read + written", "bytes_per_second": bandwidth[0]}


def time_object(launch: Any, spec: Any, bandwidth: list[float], options: argparse.Namespace) -> Record:
    """One kernel at one size: checked over poisoned outputs, then timed."""
    if not bandwidth:
        raise RunError("the copy bandwidth is not known")
    check_object(launch, spec, torch.device("cuda"))
    timing = time_kernel(launch, spec, bandwidth[0], inductor=not options.no_compile)
    detail = f"{timing.kernel:8.2f} us, {100 * timing.fraction:5.1f}% of copy"
    if timing.inductor is not None:
        detail += f", torch.compile {timing.inductor:8.2f} us ({timing.inductor / timing.kernel:.2f}x)"
    detail += "" if timing.cold else ", in L2"
    return {"detail": detail, **dataclasses.asdict(timing), "fraction": timing.fraction}


if __name__ == "__main__":
    sys.exit(main())
