"""Checkpoints and adapters that were trained: what is proven about them, and their cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.files.checkpoint import Checkpoint
from surgery.files.generated import CARD, FIGURE, LOSS_FIGURE, MANIFEST
from surgery.files.text import write_text
from surgery.folds.base import Fold
from surgery.measure.logits import divergence
from surgery.method.mask import Mask
from surgery.outputs.behaviour import Batch, near_reference, rounding_of
from surgery.outputs.card import front_matter, render_card
from surgery.outputs.checks import Check, Verification
from surgery.outputs.describe import hashed
from surgery.outputs.manifest import read_manifest, write_manifest
from surgery.outputs.training_record import TrainingRecord, training_words
from surgery.patient.patient import Patient
from surgery.training.lora import LowRank

RECORD = "training.json"


def verify_closed(updates: Mapping[str, LowRank], shut: Mapping[str, tuple[int, ...]]) -> Check:
    """A[:, S] is exactly zero after training."""
    wrong = [
        module
        for module, chosen in shut.items()
        if module in updates and updates[module].down[:, list(chosen)].any()
    ]
    return Check(
        "LoRA reads nothing from masked inputs (A[:, S] is zero)",
        not wrong,
        f"{wrong[0]} does" if wrong else f"{len(set(shut) & set(updates))} linears",
    )


def agreement(
    patient: Patient,
    adapter: Path,
    folder: Path,
    *,
    mask: Mask | None = None,
    fold: Fold | None = None,
    base: Path | None = None,
    quality: Mapping[str, Any] | None = None,
) -> list[Check]:
    """A written checkpoint against base, adapter and hooks, on the same held-out text.

    Args:
        patient: the base that was trained.
        adapter: folder of the trained LoRA.
        folder: of the written checkpoint.
        mask: what the hooks mask, on the tokens of `fold`; None for no hooks.
        fold: what was folded in.
        base: where the adapter's base lies, instead of the patient's.
        quality: what the gate measured of the fold, as a manifest has it.
    """
    from peft import PeftModel  # imports torch

    from surgery.models.loading import load_model, quiet
    from surgery.models.masking import wemask

    batch, loading = Batch.of(patient), patient.loading

    def load(source: Path) -> Any:
        return load_model(
            source,
            dtype=loading.dtype,
            device=batch.device,
            trust_remote_code=loading.trust_remote_code,
        )

    network = load(base or patient.checkpoint.folder)
    with quiet():
        wrapped = PeftModel.from_pretrained(network, str(adapter)).eval()
    unmasked = known = batch.logits(wrapped)
    if mask is not None and fold is not None:
        hooks = wemask(network, mask, fold.tokens, anatomy=patient.anatomy)
        known = batch.logits(wrapped, hooks)
    del wrapped, network
    found = batch.logits(load(folder))
    distance = divergence(known.double(), found.double())
    difference = float((known.double() - found.double()).abs().max())
    detail = f"KL {distance:.2e} nats per token, largest logit difference {difference:.2e}"
    rounding = rounding_of(patient.checkpoint)
    near = distance <= rounding
    if base is not None:
        return [Check("the adapter on its base equals the merged checkpoint", near, detail)]
    if fold is None:
        return [Check("merged checkpoint equals base and LoRA", near, detail)]
    name = "folded and merged checkpoint against base, LoRA and hooks"
    if fold.exact:
        return [Check(name, near, detail)]
    # The fold approximates the mask of the first token.
    return [near_reference(found, known, unmasked, quality, rounding, name)]


def stands_alone(adapter: Path, record: Mapping[str, Any], base: Checkpoint) -> list[Check]:
    """What can be said of a gated model: its adapter is complete."""
    from safetensors.numpy import load_file

    from surgery.models.gated_attention import GATE

    tensors = load_file(adapter / "adapter_model.safetensors")
    gates = [name for name in tensors if f".{GATE}." in name]
    finite = all(np.isfinite(value.astype(np.float64)).all() for value in tensors.values())
    return [
        Check("the adapter holds a gate for every layer", bool(gates), f"{len(gates) // 2} gates"),
        Check("its values are finite", finite, f"{len(tensors)} tensors"),
    ]


# ---------------------------------------------------------------------------------------------
# Cards and records
# ---------------------------------------------------------------------------------------------


def add_training(
    folder: Path,
    record: TrainingRecord,
    checks: Sequence[Check],
    figure: Path | None,
    base: Checkpoint,
) -> None:
    """Put the training into a folder's card and manifest, or give it a card and a record."""
    if figure is not None:
        shutil.copyfile(figure, folder / LOSS_FIGURE)
    metadata = front_matter(base.folder / CARD)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        manifest = replace(
            manifest,
            training=record,
            verification=Verification(tuple(checks)).as_dict(),
        )
        drawn = (folder / FIGURE).is_file()
        card = render_card(manifest, metadata, figure=drawn, loss_figure=figure is not None)
        write_text(folder / CARD, card)
        known = [file for file in manifest.files if file.name != CARD]
        names = [CARD, *([LOSS_FIGURE] if figure is not None else [])]
        files = [*known, *(hashed(folder, name) for name in names)]
        write_manifest(replace(manifest, files=files), folder)
        return
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    write_text(folder / CARD, plain_card(record, checks, metadata, folder))


def plain_card(
    record: Mapping[str, Any], checks: Sequence[Check], base: Mapping[str, Any], folder: Path
) -> str:
    """The card of what is no folded checkpoint: a baseline, an adapter, a gated model."""
    import yaml

    origin = record["base"]
    adapter = (folder / "adapter_config.json").is_file()
    known = ("license", "license_name", "license_link", "language")
    metadata = {key: base[key] for key in known if key in base}
    name = (origin.get("note") or origin["name"]).split(" ", 1)[0]
    if "/" in name:
        metadata["base_model"] = name
        metadata["base_model_relation"] = "adapter" if adapter else "finetune"
    metadata["library_name"] = "peft" if adapter else "transformers"
    metadata["tags"] = ["surgery", *([] if _intervention(record) != "wemask" else ["wemask"])]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {name.rsplit('/', 1)[-1]}, trained with {record['recipe']['name']}", ""]
    lines += [_KINDS[_intervention(record)], ""]
    if adapter:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        at = f" at revision {config['revision']}" if config.get("revision") else ""
        lines += [
            f"This PEFT adapter belongs to `{config['base_model_name_or_path']}`{at}; on another "
            "model its figures do not hold.",
            "",
        ]
    lines += [training_words(record), "", "## Verified", ""]
    lines += [
        f"- {check.name}: {'passed' if check.passed else 'FAILED'}"
        + (f" ({check.detail})" if check.detail else "")
        for check in checks
    ]
    if (folder / LOSS_FIGURE).is_file():
        lines += ["", f"![Loss by step]({LOSS_FIGURE})"]
    return "\n".join(lines) + "\n"


_KINDS = {
    "wemask": "A LoRA trained under the WeMask mask of "
    "[A Single Layer to Explain Them All](https://arxiv.org/abs/2605.08504).",
    "none": "A baseline: trained without any mask, to measure the gain of WeMask against.",
    "gated_attention": "A baseline: gated attention (Qiu et al., 2025), as in the paper's Appendix "
    "G. **The gates depend on the token, so they cannot be folded into plain weights: this is no "
    "plain checkpoint.** Load the base, call `surgery.gated_attention.add_gates(model)`, load this "
    "adapter with PEFT, and run it inside `with surgery.gated_attention.gated(model):`.",
}


def _intervention(record: Mapping[str, Any]) -> str:
    return str(record["recipe"]["keys"]["surgery"]["intervention"])
