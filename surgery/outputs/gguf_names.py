"""llama.cpp's names: of a checkpoint's tensors, and of the model that a file was made from."""

from __future__ import annotations

from surgery.errors import Unsupported
from surgery.files.checkpoint import Origin
from surgery.outputs.low_rank import base_name

MANIFEST_KEY = "surgery.manifest"


def gguf_name(architecture: str, depth: int, tensor: str) -> str:
    """llama.cpp's name of a checkpoint's tensor; Unsupported where its table has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if kinds:
        table = get_tensor_name_map(kinds[0], depth)
        # In a multimodal model the text decoder is one part of several, spelled in two ways.
        plain = tensor.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        found = table.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is not None:
            return str(found)
    raise Unsupported(f"llama.cpp's table of names for {architecture!r} has no {tensor}.")


def base_model(origin: Origin) -> dict[str, str]:
    """A base as GGUF's `general.base_model.N.*` describes it."""
    organisation, _, name = (
        base_name(origin) if origin.kind == "hub" or origin.note else origin.name
    ).rpartition("/")
    found = {"name": name}
    if organisation:
        found["organization"] = organisation
        found["repo_url"] = f"https://huggingface.co/{organisation}/{name}"
    if origin.commit:
        found["version"] = origin.commit
    return found
