"""Models in other containers, .gguf files and PyTorch's pickles, as safetensors."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, first_line
from surgery.files.checkpoint import Checkpoint, Origin, check_links, open_checkpoint, weights_in
from surgery.files.digests import file_sha256
from surgery.files.gguf_file import check_sizes, merge, read_gguf, shards_of
from surgery.files.side_files import other_files
from surgery.files.text import read_json, write_text
from surgery.files.weights import INDEX, Weights
from surgery.models.loading import quiet, require_stored
from surgery.patient.cache import kept

# Part of the name under which a converted source is kept: raised when the conversion changes.
READER = 3

_log = logging.getLogger(__name__)


def gguf_source(checkpoint: Checkpoint) -> Path:
    """The .gguf file (or first shard) behind a source; BadSettings where there is none."""
    if checkpoint.gguf is None:
        raise BadSettings(
            f"{checkpoint.origin.typed} is no .gguf file, so no .gguf can be written from it; give "
            "a folder as --output, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    return checkpoint.gguf


def materialised(
    path: Path,
    origin: Origin,
    say: Callable[[str], None],
    include: Sequence[str] = (),
    weights: Weights | None = None,
) -> Checkpoint:
    """A .gguf file or a folder of pickles as safetensors, converted once and kept.

    Args:
        path: The file (any shard of it), or the folder.
        origin: What it is called; its digest is added.
        say: Told what takes time.
        include: Patterns of side files that belong to it beyond the usual ones.
        weights: Which files of a folder hold its weights.

    Raises:
        BadCheckpoint: It holds no model that can be read.
    """
    beside: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if path.is_file():
        files = shards_of(path)
        digest = file_sha256(path) if len(files) == 1 else _digest(path.parent, files)
    else:
        weights = weights or weights_in(path)
        files = [path / name for name in weights.files]
        beside, left_out = _beside(path, weights, include)
        everything = [*files, *(path / name for name in beside)]
        check_links(path, [file.relative_to(path).as_posix() for file in everything])
        digest = _digest(path, everything)

    def make(temporary: Path) -> None:
        if path.is_file():
            _require_model(files[0])
            gguf_to_safetensors(files, temporary)
        else:
            _pickles_to_safetensors(path, files, beside, temporary)

    target = kept(
        f"{origin.kind}-{READER}-{digest[:32]}",
        make,
        lambda target: say(f"Reading {path.name} into safetensors (kept in {target})"),
    )
    made_from = tuple(file.absolute() for file in (files if path.is_file() else [path]))
    # Of a folder, only what was to be carried was copied.
    found = open_checkpoint(
        target, replace(origin, sha256=digest), include=include if path.is_file() else ("*",)
    )
    return replace(found, made_from=made_from, left_out=left_out or found.left_out)


def _require_model(path: Path) -> None:
    """Raise BadCheckpoint for a GGUF file of something else than a model.

    transformers would make a model of its default size, far too large, from one that says nothing
    of its own.
    """
    if find_spec("gguf") is None:  # without which nothing is read: said where it is
        return
    values = read_gguf(path).values
    if values.get("general.type") == "adapter":
        raise BadCheckpoint(f"{path} is an adapter; give the base model that it is for.")
    if f"{values.get('general.architecture')}.block_count" not in values:
        raise BadCheckpoint(f"{path} does not say how many layers it has, so it holds no model.")


def _digest(folder: Path, files: list[Path]) -> str:
    """One digest for several files, by name and content."""
    lines = [f"{file_sha256(file)} {file.relative_to(folder).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def gguf_to_safetensors(files: Sequence[Path], folder: Path) -> None:
    """A GGUF model (all its shards) as float32 safetensors in a folder."""
    if len(files) == 1:
        _read_gguf(files[0], folder)
        return
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as temporary:
        merged = Path(temporary) / files[0].name
        merge(files, merged)
        _read_gguf(merged, folder)


def _read_gguf(path: Path, folder: Path) -> None:
    for package in ("gguf", "sentencepiece", "accelerate"):
        if find_spec(package) is None:
            raise BadCheckpoint(
                f"Reading .gguf files needs the package {package}: "
                "pip install 'wemask-surgery[gguf]'"
            )
    import torch
    import transformers

    head = read_gguf(path)
    check_sizes(head)
    stored = sum(math.prod(tensor.shape) for tensor in head.tensors.values())
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # 5.x keeps the blocks packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The reader draws a progress bar of its own that nothing else switches off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            require_stored(copy.deepcopy(config), stored, path)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, config=config, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SurgeryError:
            raise
        except Exception as error:
            raise BadCheckpoint(f"transformers cannot read {path}: {first_line(error)}") from error
    _portable_tokenizer(folder)
    _portable_config(folder)


def _edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    change(table)
    write_text(path, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _portable_tokenizer(folder: Path) -> None:
    """Make the tokenizer load in transformers 4 too, which knows no TokenizersBackend."""

    def change(table: dict[str, Any]) -> None:
        if table.get("tokenizer_class") == "TokenizersBackend":
            table["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):
            table.pop(key, None)
        # transformers 4 would add token_type_ids, which no causal language model takes.
        table.setdefault("model_input_names", ["input_ids", "attention_mask"])

    _edit_json(folder / "tokenizer_config.json", change)


def _portable_config(folder: Path) -> None:
    """Spell the rotary settings for transformers 4 too, which ignores `rope_parameters`."""

    def change(table: dict[str, Any]) -> None:
        rope = table.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            table.setdefault("rope_theta", rope["rope_theta"])
            if rope.get("rope_type", "default") != "default":
                scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
                table.setdefault("rope_scaling", scaling)
        # What remains of the path the file was read from says nothing about the checkpoint.
        table.pop("_name_or_path", None)

    _edit_json(folder / "config.json", change)


def _pickles_to_safetensors(
    source: Path, files: list[Path], beside: Sequence[str], folder: Path
) -> None:
    """Old PyTorch files, tensor by tensor, without running any code they contain."""
    if not (source / "config.json").is_file():
        raise BadCheckpoint(f"{source} has no config.json, so it is not a Hugging Face checkpoint.")
    tied = read_json(source / "config.json").get("tie_word_embeddings", True)
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        state = _unpickled(file)
        target = _safetensors_name(file.name)
        names, size = _save(_without_aliases(state) if tied else state, file, folder / target)
        weight_map |= dict.fromkeys(names, target)
        total += size
        _log.debug("%s: %d tensors from %s", target, len(names), file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for name in beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _unpickled(file: Path) -> dict[str, Any]:
    """The tensors of one file; BadCheckpoint for anything else."""
    import torch

    try:
        with quiet():
            state = torch.load(
                file,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(file),  # files from before torch 1.6 are no archives
            )
    except Exception as error:
        raise BadCheckpoint(
            f"{file} cannot be read as plain tensors (weights_only=True): {first_line(error)}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and not value.is_sparse
        for name, value in state.items()
    ):
        raise BadCheckpoint(f"{file} holds something other than named tensors.")
    return state


def _save(state: dict[str, Any], file: Path, target: Path) -> tuple[list[str], int]:
    """Write the tensors of a pickle; returns their names and bytes."""
    from safetensors.torch import save_file

    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise BadCheckpoint(f"{file}: {name} is larger than what is stored of it.")
    try:
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
        save_file(tensors, target, metadata={"format": "pt"})
    except Exception as error:  # a number format that safetensors has not
        raise BadCheckpoint(
            f"{file} cannot be stored as safetensors: {first_line(error)}"
        ) from error
    return list(tensors), sum(tensor.nbytes for tensor in tensors.values())


def _beside(
    folder: Path, weights: Weights, include: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a checkpoint of pickles carries, and what it leaves behind; its index is neither.

    An index is written anew for what the pickles become.
    """
    kept, left = other_files(folder, weights, include)
    for name in kept:
        if not (folder / name).is_file():  # reading from a pipe, say, would wait for ever
            raise BadCheckpoint(f"{folder / name} is a broken link or no plain file; remove it.")
    return kept, left


def _without_aliases(state: dict[str, Any]) -> dict[str, Any]:
    """Tied tensors once, under the first name; transformers ties them again on loading."""
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    kept: dict[str, Any] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel(), tuple(tensor.shape))
        if tensor.numel() == 0 or key not in seen:
            kept[name] = tensor
        seen.add(key)
    return kept


def _safetensors_name(name: str) -> str:
    """pytorch_model-00001-of-00002.bin becomes model-00001-of-00002.safetensors."""
    return name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
