"""Checkpoints and adapters that were trained: what is proven about them, and their cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.generated import CARD, FIGURE, LOSS_FIGURE, MANIFEST
from surgery.folds.fold import Edit
from surgery.jobs.convert import hashed
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.outputs.card import front_matter, render_card
from surgery.outputs.manifest import Manifest, read_manifest, write_manifest
from surgery.outputs.training_record import training_words
from surgery.outputs.verification import (
    Check,
    Verification,
    verify_files,
    verify_structure,
    verify_untouched,
)
from surgery.reporter import SILENT
from surgery.settings import Settings
from surgery.training.lora import LowRank

RECORD = "training.json"
# Distance, in nats per token, that rounding alone may leave between hooks and folded weights.
_ROUNDING = {"F32": 1e-5, "F64": 1e-5, "F16": 1e-3, "BF16": 2e-2}


def verify_masked(folder: Path, anatomy: Anatomy, mask: Mask, fold: str) -> Check:
    """The masked inputs are exactly zero in the saved file: the gain, or the input columns."""
    saved = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    wrong, seen = "", 0
    for layer in mask.layers:
        chosen, found = list(mask.dimensions[layer]), anatomy.at(layer)
        if fold == "norm":
            gain = saved.read(found.gain).astype(np.float64)
            values = {found.gain: gain[chosen] - anatomy.null_gain}
        else:
            values = {
                name: np.take(saved.read(name).astype(np.float64), chosen, axis=anatomy.input_axis)
                for name in found.weights
            }
        for name, value in values.items():
            seen += value.size
            if mask.strength == 1.0 and value.any():
                wrong = wrong or name
    return Check(
        "masked inputs are exactly zero in the saved file",
        not wrong,
        f"{wrong} is not zero" if wrong else f"{seen} values",
    )


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
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    settings: Settings,
    adapter: Path,
    mask: Mask | None,
    folder: Path,
    *,
    base: Path | None = None,
) -> list[Check]:
    """A written checkpoint against base, adapter and hooks, on the same held-out text.

    mask: what the hooks mask: every token for `norm` and `qkv`, the first for `sink`; None for no
    hooks. base: where the adapter's base lies, instead of `checkpoint`.
    """
    import torch
    from peft import PeftModel

    from surgery.jobs.convert import verification_batch
    from surgery.models.loading import load_model, quiet
    from surgery.models.reference import masked
    from surgery.patient.subject import Subject

    subject = Subject(checkpoint, settings, SILENT)
    ids, real = verification_batch(subject)
    device = subject.device

    def load(source: Path) -> Any:
        return load_model(
            source,
            dtype=settings.dtype,
            device=device,
            trust_remote_code=settings.trust_remote_code,
        )

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(
                input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False
            ).logits[real.to(device)]

    network = load(base or checkpoint.folder)
    with quiet():
        wrapped = PeftModel.from_pretrained(network, str(adapter)).eval()
    unmasked = known = logits(wrapped)
    if mask is not None:
        tokens = "first" if settings.fold == "sink" else "all"
        with masked(network, anatomy, mask, tokens):
            known = logits(wrapped)
    del wrapped, network
    found = logits(load(folder))
    distance = _kl(known, found)
    difference = float((known.double() - found.double()).abs().max())
    detail = f"KL {distance:.2e} nats per token, largest logit difference {difference:.2e}"
    rounding = max(
        _ROUNDING.get(entry.dtype, 2e-2)
        for entry in checkpoint.tensors.values()
        if entry.dtype in _ROUNDING
    )
    if base is not None:
        name = "the adapter on its base equals the merged checkpoint"
        return [Check(name, distance <= rounding, detail)]
    if mask is None:
        return [Check("merged checkpoint equals base and LoRA", distance <= rounding, detail)]
    name = "folded and merged checkpoint against base, LoRA and hooks"
    if settings.fold == "sink":  # which approximates the mask of the first token
        apart = _kl(known, unmasked)
        detail += f"; without the fold KL {apart:.2e}"
        return [Check(name, bool(np.isfinite(distance)), detail)]
    return [Check(name, distance <= rounding, detail)]


def _kl(known: Any, other: Any) -> float:
    logs, others = known.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((logs.exp() * (logs - others)).sum(-1).mean())


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
    record: Mapping[str, Any],
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
            training=dict(record),
            verification=Verification(tuple(checks)).as_dict(),
        )
        card = render_card(manifest, metadata, figure=(folder / FIGURE).is_file())
        (folder / CARD).write_text(card, encoding="utf-8")
        known = [file for file in manifest.files if file.name != CARD]
        names = [CARD, *([LOSS_FIGURE] if figure is not None else [])]
        files = [*known, *(hashed(folder, name) for name in names)]
        write_manifest(replace(manifest, files=files), folder)
        return
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(plain_card(record, checks, metadata, folder), encoding="utf-8")


def plain_card(
    record: Mapping[str, Any], checks: Sequence[Check], base: Mapping[str, Any], folder: Path
) -> str:
    """The card of what is no folded checkpoint: a baseline, an adapter, a gated model."""
    import yaml

    origin = record["base"]
    adapter = (folder / "adapter_config.json").is_file()
    metadata = {key: base[key] for key in ("license", "language") if key in base}
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


# ---------------------------------------------------------------------------------------------
# Looking at a trained checkpoint again
# ---------------------------------------------------------------------------------------------


def verify_trained(
    folder: Path, manifest: Manifest, base: Checkpoint, anatomy: Anatomy
) -> Verification:
    """What a trained checkpoint's files prove: hashes, structure, zeros, and all that stayed."""
    assert manifest.training is not None
    checks = [verify_files(folder, manifest.files), verify_structure(base, folder)]
    if not all(check.passed for check in checks):
        return Verification(tuple(checks))
    fold = str(manifest.settings["fold"])
    dimensions = {layer: tuple(chosen) for layer, chosen in manifest.dimensions.items()}
    mask = Mask(manifest.hidden_size, "weight", manifest.strength, dimensions)
    if fold != "sink":
        checks.append(verify_masked(folder, anatomy, mask, fold))
    changed = {*manifest.training["changed"], *(edit.tensor for edit in manifest.edits)}
    places = [Edit(name, 0, "columns", (), 0.0) for name in sorted(changed) if name in base.tensors]
    checks.append(verify_untouched(base, folder, places))
    return Verification(tuple(checks))
