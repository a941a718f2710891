"""How much memory loading a folder takes, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from . import folders

ROOT = Path(__file__).resolve().parents[2]
# Of everything but tensors: modules, names, and what is read of a file's pages.
CONSTANT = 32 << 20
SIZES = {
    **folders.SMALL,
    **{"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 16384, "num_hidden_layers": 16},
}

# The most that is resident while folders are loaded, above what was before: a small one first, so that what
# is imported, and allocated once, does not count.
MEASURE = """
import sys
import lowering
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))
small, large = sys.argv[1:]
lowering.from_pretrained(small)
open("/proc/self/clear_refs", "w").write("5")  # the peak is what there is now
before = status("VmRSS")
model = lowering.from_pretrained(large)
print(status("VmHWM") - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


def save(folder: Path, sizes: dict[str, int]) -> Path:
    """Save a Llama of zeros in blocks of FP8: of its shapes, without a model in memory."""
    config = transformers.AutoConfig.for_model("llama", **sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    held = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and not any(part in name for part in folders.LEFT):
            rows, columns = tensor.shape
            held[name] = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = torch.ones(-(-rows // 32), -(-columns // 32))
        else:
            held[name] = torch.zeros(tensor.shape, dtype=torch.bfloat16)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    folders.edit(folder, quantization_config=fp8)
    return folder


def test_loading_stays_below_twice_the_largest_tensor(tmp_path: Path) -> None:
    """Of a model of several times that."""
    small, large = save(tmp_path / "small", folders.SMALL), save(tmp_path / "large", SIZES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    taken, whole = json.loads(f"[{done.stdout.strip().replace(' ', ',')}]")
    largest = SIZES["vocab_size"] * SIZES["hidden_size"] * 2
    assert whole > 2 * (2 * largest + CONSTANT), "the model does not show what loading takes"
    assert taken <= 2 * largest + CONSTANT
