"""What a checkpoint carries beside its weights: an allow-list, for folders and for listings.

What loaders and readers of a model need: configurations, tokenizer and processor files, chat
templates, the code that the configurations name, the licence, the card and the pictures it shows.
Everything else stays behind and is named, because nobody knows what lies in a stranger's folder or
in the folder of a training: a token in `.env`, host names in `wandb/`, an optimizer of gigabytes.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.generated import CARD, FIGURE, LOSS_FIGURE, MANIFEST
from surgery.files.needed_files import called_for
from surgery.files.weights import ADAPTER_CONFIG, INDEX, PACKING, Weights

# A second copy of the weights in another container would silently stay unedited.
_WEIGHTS = re.compile(
    r"(\.(bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|tflite|mlmodel|nemo|safetensors)$)"
    r"|(\.index\.json$)|(^(pytorch_model|consolidated|tf_model|flax_model)\b)"
)
# Folders with the model in another format, whose configuration belongs to that format.
_OTHER_FORMATS = ("original", "onnx", "openvino", "coreml", "gguf")
# Folders that a training leaves, which are named as a whole.
_LEFTOVERS = re.compile(
    r"(?i)wandb|runs|logs?|mlruns|lightning_logs|tensorboard|tb_logs|__pycache__|tmp|temp|backups?"
    r"|(.*[-_.])?((checkpoints?|ckpts?)([-_.]?\d+|[-_.]\w+)?|(global_?step|epoch|step)([-_.]?\d+)?)"
)
# Configurations of everything that reads a model, whatever it is called; but those of a training,
# and an adapter's, which would make a loader look for its weights.
_CONFIGURATION = re.compile(r"([\w.-]+[_.-])?config(uration)?([_-][\w-]+)?\.json")
_OF_A_TRAINING = re.compile(
    r"(?i)(^|[_.-])(adapter|peft|q?lora|train\w*|finetun\w*|deepspeed|ds|zero\d?|accelerate|fsdp|"
    r"wandb|run|sagemaker|axolotl|data|datasets?|eval\w*|optimizer|sweep|experiment)[_.-]"
)
_TOKENIZER = re.compile(
    r"tokenizer\.json|tekken\.json|special_tokens(_map)?\.json|added_tokens\.json|normalizer\.json"
    r"|emoji\.json|encoder\.json|modules\.json|bpe\.codes|dict\.txt|merges\.txt"
    r"|([\w-]+[_-])?vocab(ulary)?([_-][\w-]+)?\.(json|txt|bpe|model|spm)"
    r"|[\w.-]+\.(tiktoken|model|spm|spiece|bpe)|[\w.-]+\.model\.v\d+(m\d+)?"
)
_TEMPLATE = re.compile(r"[\w.-]*\.jinja2?|[\w.-]*chat_template[\w.-]*\.json")
_LICENCE = re.compile(
    r"(?i)([\w .-]*[-_. ])?(licen[cs]es?|notices?|copying|copyright|use[-_ ]policy|"
    r"terms([-_ ]of[-_ ]\w+)?)([-_ ][\w .-]+?)?(\.(md|txt|rst|pdf|html|\d+))?"
)
_UNFINISHED = re.compile(r"(?i)\.(bak|old|orig|tmp|swp|lock|part|incomplete|py|json|ya?ml|csv)$|~$")
_TEMPLATES = "additional_chat_templates"
# transformers looks for code of this name in every checkpoint whose code it is told to trust.
_GENERATION = ("custom_generate/generate.py", "custom_generate/requirements.txt")


def other_files(
    folder: Path, weights: Weights, include: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files of a folder to carry beside its weight files, and those to leave behind.

    Args:
        folder: Of the checkpoint.
        weights: Which files these are.
        include: Patterns of further files to carry, as a shell has them; "*" spans folders.

    Returns:
        Names to carry and names left behind; a name that ends in "/" stands for all below it.

    Raises:
        BadCheckpoint: A link stands for a folder.
        BadSettings: A pattern is that of no file.
    """
    names = tuple(_walk(folder))
    require_matches(names, include)
    return divided(names, weights, include, folder)


def divided(
    names: Iterable[str],
    weights: Weights,
    include: Sequence[str] = (),
    folder: Path | None = None,
    card: str | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same of names alone, those of the weight files left aside.

    Args:
        names: Of the files, with "/" between folders.
        weights: Which of the files these are.
        include: As `other_files` takes it.
        folder: Where those of the files lie that say what else is needed: configurations, code
            and the card; none are read without one.
        card: The text of the base's card, where another has taken its place in the folder.
    """
    own = {*weights.files, weights.entry} - {weights.index}
    listed = [name for name in names if name not in own]
    stale = _of_other_weights(weights)
    needed = called_for(listed, folder, card)
    # A folder with weights of its own is another model, or the state of a training.
    apart = {posixpath.dirname(name) for name in listed if is_weights(name)} - {""}
    kept: list[str] = []
    left: dict[str, None] = {}
    for name in listed:
        if name == weights.index:
            kept.append(name)
        elif is_hidden(name) or name in stale:
            left[_as_a_whole(name)] = None
        elif (
            name in needed
            or matches(name, include)
            or (carried(name) and posixpath.dirname(name) not in apart)
        ):
            kept.append(name)
        else:
            left[_as_a_whole(name)] = None
    return tuple(kept), tuple(left)


def _of_other_weights(weights: Weights) -> set[str]:
    """Names of files that would make some library load other weights than these, or more.

    An index of shards that are not taken; the settings of an adapter, which transformers with peft
    would put on the model; those of packed weights, beside plain ones.
    """
    stale = {INDEX, ADAPTER_CONFIG}
    return stale if weights.quantised else stale | {PACKING}


def carried(name: str) -> bool:
    """Whether a file that is no weight file of a checkpoint belongs to it, by its path alone."""
    folder, base = posixpath.split(name)
    if name in (CARD, MANIFEST, FIGURE, LOSS_FIGURE) or name in _GENERATION:
        return True
    if is_hidden(name) or any(_is_closed(part) for part in folder.split("/") if part):
        return False
    if is_weights(base):
        return False
    if _TEMPLATE.fullmatch(base):
        return folder in ("", _TEMPLATES) or "chat_template" in base
    if _LICENCE.fullmatch(base):
        return not _UNFINISHED.search(base)
    if _CONFIGURATION.fullmatch(base):
        return not _OF_A_TRAINING.search(base)
    return bool(_TOKENIZER.fullmatch(base))


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def is_below(name: str, left: str) -> bool:
    """Whether a name that was left behind stands for a file: its own, or its folder's with "/"."""
    return name == left or (left.endswith("/") and name.startswith(left))


def require_matches(names: Collection[str], include: Sequence[str]) -> None:
    """Raise BadSettings for a pattern that is that of no file which could be carried."""
    for pattern in include:
        if not any(matches(name, [pattern]) and not is_hidden(name) for name in names):
            raise BadSettings(
                f"--include {pattern} is the pattern of no file in the base (hidden files are "
                "never carried); give another, or leave it out."
            )


def matches(name: str, include: Sequence[str]) -> bool:
    """Whether a file has one of the patterns of --include."""
    return not name.endswith("/") and any(fnmatchcase(name, pattern) for pattern in include)


def is_weights(name: str) -> bool:
    """Whether a file is one of weights, in whatever format, by its path alone."""
    return bool(_WEIGHTS.search(name.rsplit("/", 1)[-1]))


def is_other_format(name: str) -> bool:
    """Whether a file lies in a folder of the model in another format, by its path alone."""
    return "/" in name and name.split("/", 1)[0] in _OTHER_FORMATS


def _is_closed(folder: str) -> bool:
    return folder in _OTHER_FORMATS or bool(_LEFTOVERS.fullmatch(folder))


def _as_a_whole(name: str) -> str:
    """The folder that is left behind as a whole, with "/" at its end, or the file itself."""
    parts = name.split("/")
    for number, part in enumerate(parts[:-1], 1):
        if part.startswith(".") or _LEFTOVERS.fullmatch(part):
            return "/".join(parts[:number]) + "/"
    return name


def _walk(folder: Path) -> Iterator[str]:
    """The files below a folder; a hidden folder is one name, and nothing in it is looked at."""
    for root, directories, files in os.walk(folder):
        above = Path(root).relative_to(folder)
        for name in sorted(directories):
            path = (above / name).as_posix()
            if name.startswith("."):
                yield f"{path}/"
            elif (Path(root) / name).is_symlink():
                if _as_a_whole(f"{path}/x") != f"{path}/x":  # wandb links to its latest run
                    yield f"{path}/"
                    continue
                raise BadCheckpoint(
                    f"{Path(root) / name} is a link to a folder; put the folder itself there."
                )
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for file in sorted(files):
            yield (above / file).as_posix()
