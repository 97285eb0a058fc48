"""Tiny checkpoints as quantisation packages write them: `quantised_by_packages.py NAME FROM TO`.

A process of its own, because some of these packages patch transformers when they are imported.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

GROUP = 32
LENGTH = 32


def texts(source: Path) -> list[list[int]]:
    """Token ids to calibrate with."""
    from transformers import AutoTokenizer

    text = Path(__file__).with_name("tiny_models.py").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    return [ids[at : at + LENGTH] for at in range(0, 8 * LENGTH, LENGTH)]


def auto_round(source: Path, folder: Path, scheme: str, form: str) -> None:
    """Rounded to nearest, exported in the form of another method."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    quantiser = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        scheme=scheme,
        group_size=GROUP,
        iters=0,
        disable_opt_rtn=True,
        dataset=[torch.tensor([ids]) for ids in texts(source)],
        nsamples=8,
        seqlen=LENGTH,
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantiser.quantize_and_save(str(folder / "made"), format=form)
    (made,) = [path.parent for path in (folder / "made").rglob("config.json")]
    for path in list(made.iterdir()):
        shutil.move(path, folder / path.name)
    shutil.rmtree(folder / "made")


def gptqmodel(source: Path, folder: Path, **settings: Any) -> None:
    """GPTQ or AWQ."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(group_size=GROUP, **settings), device="cpu")
    model.quantize([{"input_ids": ids, "attention_mask": [1] * LENGTH} for ids in texts(source)])
    model.save(str(folder))


def llm_compressor(source: Path, folder: Path, scheme: str) -> None:
    """compressed-tensors, by the package that goes with it."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(folder, save_compressed=True)


def bitsandbytes(source: Path, folder: Path) -> None:
    """Eight bits, while transformers loads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, device_map="cpu"
    )
    model.save_pretrained(folder)


# By name: the package that must be installed, and how.
PACKAGES: Mapping[str, tuple[str, Callable[[Path, Path], None]]] = {
    "auto-round as gptq": ("auto_round", partial(auto_round, scheme="W4A16", form="auto_gptq")),
    "auto-round as gptq, 8 bits": (
        "auto_round",
        partial(auto_round, scheme="W8A16", form="auto_gptq"),
    ),
    "auto-round as awq": ("auto_round", partial(auto_round, scheme="W4A16", form="auto_awq")),
    "auto-round as compressed-tensors": (
        "auto_round",
        partial(auto_round, scheme="W4A16", form="llm_compressor"),
    ),
    "gptqmodel, in order of activations": (
        "gptqmodel",
        partial(gptqmodel, bits=4, desc_act=True, sym=True),
    ),
    "gptqmodel, with zero points": (
        "gptqmodel",
        partial(gptqmodel, bits=4, desc_act=False, sym=False),
    ),
    "gptqmodel, second format": ("gptqmodel", partial(gptqmodel, bits=4, format="gptq_v2")),
    "gptqmodel as awq": (
        "gptqmodel",
        partial(gptqmodel, bits=4, method="awq", format="gemm"),
    ),
    "llm-compressor, float8 blocks": (
        "llmcompressor",
        partial(llm_compressor, scheme="FP8_BLOCK"),
    ),
    "llm-compressor, float8 rows": (
        "llmcompressor",
        partial(llm_compressor, scheme="FP8_DYNAMIC"),
    ),
    "bitsandbytes, 8 bits": ("bitsandbytes", bitsandbytes),
}


if __name__ == "__main__":
    name, start, end = sys.argv[1:]
    Path(end).mkdir(parents=True)
    PACKAGES[name][1](Path(start), Path(end))
    for side in Path(start).iterdir():
        if side.suffix != ".safetensors" and not (Path(end) / side.name).exists():
            shutil.copy(side, Path(end) / side.name)
