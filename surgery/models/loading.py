"""Loading models and tokenizers through transformers, quietly and on the right device.

torch and transformers are imported where they are used, for the sake of the start-up time alone.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, Unsupported, first_line
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.memory import available
from surgery.files.text import read_json
from surgery.files.weights import ADAPTER_CONFIG, method_of
from surgery.models.anatomy import is_multimodal

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

AutoClass = Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"]
DTYPES = ("float32", "bfloat16", "float16", "float64")


def pick_device(name: str | None) -> torch.device:
    """The device to analyse on: the given one, else CUDA where it is, else the CPU.

    Raises:
        BadSettings: where the given one cannot compute.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the meta device, for one, cannot
    except (RuntimeError, AssertionError) as error:
        raise BadSettings(f"The device {name!r} cannot be used: {first_line(error)}") from error
    return device


def available_on(device: torch.device) -> int:
    """Bytes of memory that can be had on a device."""
    import torch

    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return available()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own progress bars and warnings off, for the time of the block."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made in this block have real buffers (small) and parameters without memory."""
    import torch

    register = torch.nn.Module.register_parameter

    def without_memory(module: torch.nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            kept = module._parameters[name]
            assert kept is not None
            module._parameters[name] = torch.nn.Parameter(kept.to("meta"), requires_grad=False)

    try:  # transformers 4 would give some parameters their values
        from transformers.modeling_utils import no_init_weights
    except ImportError:
        no_init_weights = nullcontext
    torch.nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        with no_init_weights():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def on_meta(auto: Any, config: Any, **options: Any) -> Any:
    """A model on the meta device, also where its constructor computes with values."""
    import torch

    try:
        with torch.device("meta"):
            return auto.from_config(config, **options)
    except (RuntimeError, NotImplementedError):
        with parameters_on_meta():
            return auto.from_config(config, **options).to("meta")


def skeleton(
    checkpoint: Checkpoint, trust_remote_code: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The model of a checkpoint without its parameters, in evaluation mode.

    Args:
        checkpoint: whose config.json says what to build.
        trust_remote_code: whether code that the checkpoint brings may run.
        dtype: of a model that will be given its parameters and run: its buffers hold values.
            Without one all lies on the meta device, and attention and experts are eager, because
            a trace sees what other implementations read as one operation.

    Raises:
        Unsupported: where transformers cannot build it.
    """
    refuse_remote_code(checkpoint.folder, trust_remote_code)
    from transformers import AutoConfig

    logger.debug("building %s without parameters", checkpoint.model_type)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    sentence = f"transformers cannot build {checkpoint.model_type} from config.json"
    with _explained(Unsupported, sentence):
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, **options)
        if dtype is not None:
            with parameters_on_meta():
                return auto_class(config).from_config(config, dtype=dtype, **options).eval()
        model = on_meta(auto_class(config), config, attn_implementation="eager", **options)
        if hasattr(model, "set_experts_implementation"):  # from transformers 5 on
            model.set_experts_implementation("eager")  # the others want certain dtypes
    return model.eval()


def require_stored(config: Any, stored: int, where: Path, **options: Any) -> None:
    """Raise BadCheckpoint where a configuration describes far more parameters than are stored.

    transformers takes memory for all of them before it compares shapes.
    """
    model = on_meta(auto_class(config), config, **options)
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * stored:  # tied ones are stored once
        raise BadCheckpoint(
            f"The configuration of {where} describes {described:,} parameters, but it holds only "
            f"{stored:,}."
        )


@contextmanager
def _explained(kind: type[SurgeryError], sentence: str) -> Iterator[None]:
    """transformers at work, quietly; what it raises becomes a sentence and its first line."""
    with quiet():
        try:
            yield
        except SurgeryError:
            raise
        except Exception as error:
            raise kind(f"{sentence}: {first_line(error)}") from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration in a folder; BadCheckpoint when transformers cannot load it."""
    from transformers import AutoConfig

    with _explained(BadCheckpoint, f"transformers cannot load {folder}"):
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )


def text_settings(config: Any) -> Any:
    """The part of a loaded configuration that describes the text decoder.

    Raises BadCheckpoint where there is not one of them alone.
    """
    with _explained(BadCheckpoint, "config.json does not describe one text decoder"):
        return config.get_text_config()


def load_model(
    folder: Path,
    *,
    dtype: str = "float32",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The causal LM in a folder, in evaluation mode.

    Args:
        folder: of a checkpoint.
        dtype: of its parameters, one of `DTYPES`.
        device: where it goes; without one it stays where transformers puts it.
        trust_remote_code: whether code that the checkpoint brings may run.

    Raises:
        BadCheckpoint: where transformers cannot load it or finds weights missing.
        BadSettings: where it brings code that is not trusted.
    """
    import torch

    logger.info("loading %s in %s on %s", folder, dtype, device or "the CPU")
    with _explained(BadCheckpoint, f"transformers cannot load {folder}"):
        model, info = stock_model(
            folder,
            trust_remote_code,
            stored=_stored(folder),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it would log which they are, and raise without a name
        )
    for name, stored, described in sorted(info.get("mismatched_keys", ()), key=str):
        raise BadCheckpoint(
            f"{folder}: {name} is stored with the shape {list(stored)}, but config.json describes "
            f"{list(described)}."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadCheckpoint(f"{folder} lacks weights the model needs, such as {missing[0]}.")
    return model.to(device).eval() if device is not None else model.eval()


def stock_model(
    folder: Path, trust_remote_code: bool, *, stored: int | None = None, **options: Any
) -> Any:
    """What `from_pretrained` of transformers gives for the weights in a folder.

    Args:
        folder: of a checkpoint.
        trust_remote_code: whether code that the checkpoint brings may run.
        stored: how many parameters its files can hold, to be compared with its configuration.
        options: of `from_pretrained`.
    """
    refuse_remote_code(folder, trust_remote_code)
    with without_adapter(folder) as place:
        config = load_config(place, trust_remote_code=trust_remote_code)
        if stored is not None:
            require_stored(config, stored, folder, trust_remote_code=trust_remote_code)
        return auto_class(config).from_pretrained(
            place, trust_remote_code=trust_remote_code, local_files_only=True, **options
        )


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """A folder whose weights load alike with and without peft.

    With it, transformers puts an adapter that lies in the folder on the model. Where one does, the
    block gets links to the checkpoint's own files instead.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    checkpoint = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    with TemporaryDirectory(prefix="surgery-") as temporary:
        for name in (*checkpoint.weight_files, *checkpoint.side_files):
            place = Path(temporary, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.symlink_to((folder / name).resolve())
            except OSError:  # Windows asks for a privilege
                os.link(folder / name, place)
        yield Path(temporary)


def _stored(folder: Path) -> int:
    """How many parameters a checkpoint in a folder can hold."""
    checkpoint = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    if method_of(checkpoint.config):  # several to a number, a bit each at the least
        return 8 * checkpoint.size
    return sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())


def auto_class(config: Any) -> Any:
    """The transformers class that loads a configuration.

    For multimodal models that are not registered as causal LMs, the class for images and text:
    given text alone, it is a causal LM all the same.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal = _made_from(AutoModelForCausalLM, config)
    if not causal and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def auto_class_name(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> AutoClass:
    """The name of the transformers class that loads a checkpoint.

    Raises BadCheckpoint when transformers does not know its configuration.
    """
    config = checkpoint.config
    conditional = "ForConditionalGeneration" in str(config.get("architectures"))
    # Importing transformers takes longer than converting a small model of text.
    if "auto_map" in config or not (is_multimodal(config) or conditional):
        return "AutoModelForCausalLM"
    found = auto_class(load_config(checkpoint.folder, trust_remote_code=trust_remote_code))
    if found.__name__ == "AutoModelForCausalLM":
        return "AutoModelForCausalLM"
    return "AutoModelForImageTextToText"


def _made_from(auto: Any, config: Any) -> bool:
    """Whether a class makes models from this configuration, rather than from a part of it."""
    mapping = auto._model_mapping
    if type(config) not in mapping:
        return False
    return getattr(mapping[type(config)], "config_class", None) in (None, type(config))


def refuse_remote_code(folder: Path, trusted: bool) -> None:
    """Raise BadSettings for a checkpoint that brings its own code, unless it was asked for."""
    if "auto_map" in read_json(folder / "config.json") and not trusted:
        raise BadSettings(
            f"{folder} brings its own Python code (auto_map), which would run on this machine; "
            "read it, and give --trust-remote-code if you trust it."
        )


# What holds a tokenizer's words, by whatever library it was made.
_TOKENIZERS = ("tokenizer*", "*vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder; BadCheckpoint when there is none that loads."""
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise BadCheckpoint(
            f"The tokenizer in {folder} cannot be loaded: there is none, such as tokenizer.json; "
            "put the model's own beside its weights."
        )
    with _explained(BadCheckpoint, f"The tokenizer in {folder} cannot be loaded"):
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )


def require_finite(model: Any) -> None:
    """Raise BadCheckpoint where a loaded weight is not a finite number."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise BadCheckpoint(
                f"{name} holds values that are not finite; the checkpoint is damaged."
            )


def longest_context(config: Any, wanted: int) -> int:
    """`wanted`, or less where the model takes fewer positions."""
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return min(wanted, value)
    return wanted
