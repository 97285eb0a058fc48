"""What one would write without `surgery`: load, zero the gain, save. `SOURCE LAYER OUTPUT`.

Contender (b) of `convert.py`; it makes the same edit as `surgery convert --layer LAYER`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

RATE = 0.1


def main(source: Path, layer: int, output: Path) -> None:
    """Mask the layer after `layer`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    gain = model.model.layers[layer + 1].input_layernorm.weight
    with torch.no_grad():
        gain[gain.abs().topk(int(RATE * len(gain))).indices] = 0
    model.save_pretrained(output)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
