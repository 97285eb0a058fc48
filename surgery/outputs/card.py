"""The model card, rendered from the manifest: no figure in it that the manifest does not hold."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from surgery.files import plain_yaml
from surgery.files.generated import UNDO
from surgery.files.resources import resource_folder
from surgery.outputs.manifest import Manifest
from surgery.outputs.records import QualityRecord
from surgery.outputs.results import card_words, model_index
from surgery.outputs.training_record import training_words
from surgery.settings import Settings, spelled

# Metadata that describes the base and stays true of an edited copy.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "inference")
_TAGS = ("wemask", "surgery", "massive-activations")

# The order of the options in a command; a device and a repository of one's own say nothing
# elsewhere.
_SPOKEN = (
    *("rate", "scope", "fold", "select", "strength", "seed", "dtype", "max_degradation"),
    *("revision", "layer", "calibration", "check_tokens", "calibration_tokens", "layers"),
    *("check", "fixed", "form", "undo_file", "include", "force", "trust_remote_code"),
)
_SELECT_WORDS = {
    "weight": "the largest norm gains, as in the paper",
    "activation": "the sink token's largest activations; the paper reports this choice as harmful",
    "random": "chosen at random, as a control",
}
_LABELS = {
    "base": "base",
    "reference": "the paper's reference (hook)",
    "folded": "**this checkpoint**",
}


class CardKind(NamedTuple):
    """What the card of a kind of output is rendered from, and what the Hub makes of it.

    Attributes:
        template: in the folder `hub_cards`.
        library: that loads the checkpoint.
        relation: to the base model.
    """

    template: str
    library: str
    relation: str


CHECKPOINT_CARD = CardKind("model_card.md.jinja", "transformers", "finetune")
ADAPTER_CARD = CardKind("adapter_card.md.jinja", "peft", "adapter")


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML metadata of a card; empty when there is none or it is not valid.

    Not by huggingface_hub's `ModelCard`, which follows aliases without end, reads the language
    `no` as False and a date as no text, and raises for the cards of many a base.
    """
    if not path.is_file():
        return {}
    # The Hub, too, allows a byte order mark and blank lines above the metadata.
    text = path.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    if not text.startswith("---"):
        return {}
    block = text[3:].split("\n---", 1)[0]
    try:
        loaded = plain_yaml.load(block, as_the_hub=True, lenient=True)
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def card_metadata(
    manifest: Manifest, base: Mapping[str, Any], kind: CardKind = CHECKPOINT_CARD
) -> dict[str, Any]:
    """The card's metadata: the base's licence, language and so on, and where this came from.

    The base's `model-index` is left out: its scores were not measured on this checkpoint.
    """
    found: dict[str, Any] = {key: base[key] for key in _INHERITED if key in base}
    if manifest.base.kind == "hub" or "/" in manifest.base.name:
        found["base_model"] = manifest.base.name
    elif manifest.base.note:
        found["base_model"] = manifest.base.note.split(" ", 1)[0]
        found.setdefault("license", "apache-2.0")
    elif isinstance(base.get("base_model"), str):
        found["base_model"] = base["base_model"]
    if "base_model" in found:
        found["base_model_relation"] = kind.relation
    found["library_name"] = kind.library
    found["pipeline_tag"] = "text-generation"
    inherited = base.get("tags")
    tags = [str(tag) for tag in inherited] if isinstance(inherited, list) else []
    found["tags"] = list(dict.fromkeys([*tags, *_TAGS]))
    return found


def command_line(settings: Settings) -> str:
    """The command that makes this checkpoint again: rate, scope, and what is no default."""
    words = ["surgery", "convert", shlex.quote(settings.model)]
    known = {field.name: field for field in fields(settings)}
    for name in _SPOKEN:
        value, default = getattr(settings, name), known[name].default
        if value == default and name not in ("rate", "scope"):
            continue
        if known[name].metadata.get("repeated"):
            words += [word for part in value for word in (spelled(known[name]), shlex.quote(part))]
            continue
        words.append(spelled(known[name]))
        if not isinstance(default, bool):
            parts = value if isinstance(value, tuple) else (value,)
            words.append(shlex.quote(",".join(str(part) for part in parts)))
    return " ".join(words)


def render_card(
    manifest: Manifest,
    base: Mapping[str, Any],
    kind: CardKind = CHECKPOINT_CARD,
    *,
    figure: bool,
    loss_figure: bool = False,
) -> str:
    """The card as Markdown.

    Args:
        manifest: of the checkpoint; there is no figure in the card that it does not hold.
        base: the base card's metadata.
        kind: of the output.
        figure: whether the figure of the layers lies beside the card.
        loss_figure: whether that of the training's loss does.
    """
    import yaml
    from jinja2.sandbox import SandboxedEnvironment

    template = (resource_folder("hub_cards") / kind.template).read_text(encoding="utf-8")
    environment = SandboxedEnvironment(
        autoescape=False, keep_trailing_newline=True, trim_blocks=True
    )
    words = {**_words(manifest, figure), "loss_figure": loss_figure}
    metadata = card_metadata(manifest, base, kind)
    if manifest.results is not None and manifest.results["tasks"]:
        metadata["model-index"] = model_index(manifest.results, words["title"])
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return environment.from_string(template).render(metadata=text, **words)


def _words(manifest: Manifest, figure: bool) -> dict[str, Any]:
    settings, quality, base_name = manifest.settings, manifest.quality, manifest.base.name
    emergence: Mapping[str, Any] = manifest.emergence or {}
    on_hub = manifest.base.kind == "hub"
    if manifest.base.note:
        base_name, on_hub = manifest.base.note.split(" ", 1)[0], True
    name = f"{base_name.rsplit('/', 1)[-1]}-WeMask"
    return {
        "title": name,
        "base_name": base_name,
        "base_link": f"https://huggingface.co/{base_name}" if on_hub else base_name,
        "layer": emergence.get("layer"),
        "magnification": _short(emergence.get("magnification")) if emergence.get("rows") else "",
        "given": emergence.get("found_by") == "given",
        "target_words": _target_words(sorted(manifest.dimensions)),
        "k": len(manifest.dimensions[min(manifest.dimensions)]),
        "hidden_size": manifest.hidden_size,
        "strength": f"{manifest.strength:g}",
        "rate_words": f"rate {settings.rate:g}",
        "select_words": _SELECT_WORDS[settings.select],
        "strength_words": _strength_words(manifest.strength),
        "fold_words": settings.fold_used.words
        + (" The table below says by how much on this model." if quality else ""),
        "edited_words": _edited_words(len(manifest.edits)),
        "training": training_words(manifest.training) if manifest.training else "",
        "quality": _quality_words(quality) if quality else None,
        "dtype": settings.dtype,
        "forced": bool(quality and quality.get("forced")),
        "limit": f"{settings.max_degradation:+.0%}",
        "leak": _leak_words(manifest),
        "verification": manifest.verification,
        "results": card_words(manifest.results),
        "figure": figure,
        "auto_class": manifest.auto_class,
        "load_name": settings.push_to_hub or f"path/to/{name}",
        "command": command_line(settings),
        "undo_words": _undo_words(manifest),
        "recipe": manifest.training["recipe"]["name"] if manifest.training else None,
        "base_citation": on_hub,
    }


def _target_words(targets: list[int]) -> str:
    if len(targets) == 1:
        return f"layer {targets[0]}"
    if targets == list(range(targets[0], targets[-1] + 1)):
        return f"layers {targets[0]} to {targets[-1]}"
    return f"layers {', '.join(str(layer) for layer in targets)}"


def _edited_words(count: int) -> str:
    if count == 0:
        return "No tensor of the base model was changed"
    return f"{count} of the base model's tensors {'was' if count == 1 else 'were'} changed"


def _strength_words(strength: float) -> str:
    if strength == 1.0:
        return "masked"
    return f"weakened by a strength of {strength:g}"


def _short(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _quality_words(quality: QualityRecord) -> dict[str, Any]:
    rows = [
        {
            "label": _LABELS.get(row["name"], row["name"]),
            "perplexity": _short(row["perplexity"]),
            "against_base": f"{row['against_base']:+.1%}" if row["name"] != "base" else "–",
            "kl_from_reference": _short(row["kl_from_reference"]),
            "kl_from_base": _short(row["kl_from_base"]),
        }
        for row in quality["variants"]
    ]
    return {
        "tokens": quality["tokens"],
        "sequences": quality["sequences"],
        "rows": rows,
        "more": [*_interval_words(quality), *_position_words(quality)],
    }


def _interval_words(quality: QualityRecord) -> Iterator[str]:
    found = quality.get("interval")  # which earlier versions have not measured
    if found and None not in (found["difference"], found["low"], found["high"]):
        yield (
            f"Loss of the folded weights against base: {found['difference']:+.4f} nats per token, "
            f"95 % interval {found['low']:+.4f} to {found['high']:+.4f} (over sequences; "
            "it holds at every look, so that the measurement could end when it was clear)."
        )


def _position_words(quality: QualityRecord) -> Iterator[str]:
    found = quality.get("positions")  # likewise
    if found:
        late = "" if found["late"] is None else f", {_short(found['late'])} beyond"
        yield (
            f"KL(reference ‖ folded) by position, in sequences of up to {found['longest']} "
            f"tokens: {_short(found['early'])} on the first 256{late}; the largest of a single "
            f"token is {_short(found['largest'])}, at position {found['largest_at']}."
        )


def _leak_words(manifest: Manifest) -> str:
    leaks = [record.leak for record in manifest.sinks.values()]
    if not leaks:
        return ""
    measured: Mapping[str, Any] = manifest.quality or {}
    text = measured.get("leak_text", "calibration text")
    return (
        f"Leak of the sink detector v on {text}, worst over the target layers: "
        f"|v·x| on ordinary tokens {max(leak['ordinary_rms'] for leak in leaks):.3g} (rms), "
        f"{max(leak['ordinary_largest'] for leak in leaks):.3g} (largest); on sink tokens v·x is "
        f"at least {min(leak['sink_smallest'] for leak in leaks):.3g} (1 is exact)."
        f"{_secondary_words(leaks)}"
    )


def _secondary_words(leaks: Sequence[Mapping[str, Any]]) -> str:
    """What the detectors answer to other tokens that are nearly as massive as the first."""
    found = [leak for leak in leaks if leak.get("secondary_tokens")]
    if not found:
        return ""
    nulled = sum(leak.get("null") is not None and leak["null"] < leak["plain"] for leak in leaks)
    return (
        f" On secondary sinks, tokens at least half as massive as the first, |v·x| is "
        f"{max(leak['secondary_rms'] for leak in found):.3g} (rms), "
        f"{max(leak['secondary_largest'] for leak in found):.3g} (largest); {nulled} of "
        f"{len(leaks)} detectors have a null on them."
    )


def _undo_words(manifest: Manifest) -> str:
    if all(record.original is not None for record in manifest.edits):
        return (
            "`surgery.json` holds the original values of every changed tensor: "
            "`surgery revert DIR --output BASE` restores the base model byte for byte."
        )
    if manifest.settings.undo_file:
        return (
            f"`{UNDO}` holds what the edit overwrote: `surgery revert DIR --output BASE` restores "
            "the base model byte for byte."
        )
    return (
        "The edit overwrites weights, so undoing it means going back to the base model: "
        f"{manifest.base.name}{'@' + manifest.base.commit if manifest.base.commit else ''}."
    )
