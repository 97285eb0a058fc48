"""The anatomy of a model found by running it: who reads the output of each pre-attention norm.

The configuration is built on the meta device (no memory, no arithmetic) and run once on a few
tokens; every norm output is followed through operations that keep its columns in place, and every
consumer is recorded. This checks the table of families, and replaces it for unknown ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from surgery.anatomy import Anatomy, AttentionInput, check_depth, check_shapes, depth_of, width_of
from surgery.checkpoint import Checkpoint
from surgery.errors import Unsupported
from surgery.loading import quiet

# Operations whose result holds the same columns in the same places, zeros still zero.
_TRANSPARENT = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "clone",
    "detach",
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "dropout",
    "dropout_",
    "expand",
    "__get__",
}
# Attributes and bookkeeping that read no values.
_HARMLESS = {"size", "dim", "is_floating_point", "numel", "stride", "is_contiguous", "__len__"}


@dataclass
class Consumer:
    """One use of a norm's output.

    module: the innermost module in which it happens; weight: the parameter, for a linear; axis:
    the weight's axis that runs over the norm's columns; operation: what read it.
    """

    module: str
    operation: str
    weight: str | None = None
    axis: int = 1


@dataclass
class _Trace(TorchFunctionMode):
    names: Mapping[int, str]
    width: int
    stack: list[str] = field(default_factory=list)
    origin: dict[int, str] = field(default_factory=dict)
    consumers: dict[str, list[Consumer]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def tag(self, tensor: torch.Tensor, norm: str) -> None:
        self.kept.append(tensor)  # keeps its id from being reused
        self.origin[id(tensor)] = norm

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tagged = [t for t in _tensors((*args, *kwargs.values())) if id(t) in self.origin]
        if tagged:
            self._use(func, args, result, tagged)
        return result

    def _use(self, func: Any, args: tuple, result: Any, tagged: list[torch.Tensor]) -> None:
        name = getattr(func, "__name__", str(func))
        norm = self.origin[id(tagged[0])]
        if not any(isinstance(part, torch.Tensor) for part in _flat(result)) or name in _HARMLESS:
            return
        if isinstance(result, torch.Tensor) and result is tagged[0]:
            return
        if name in _TRANSPARENT and result.shape[-1:] == (self.width,):
            self.tag(result, norm)
            return
        module = self.stack[-1] if self.stack else ""
        weight, axis = self._linear(name, args, tagged[0])
        self.consumers.setdefault(norm, []).append(Consumer(module, name, weight, axis))

    def _linear(self, name: str, args: tuple, x: torch.Tensor) -> tuple[str | None, int]:
        if name == "linear" and args[0] is x:
            return self.names.get(id(args[1])), 1
        if name == "addmm" and args[1] is x:
            return self.names.get(id(args[2])), 0
        return None, 1


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [item for part in value for item in _flat(part)]
    return [value]


def _tensors(values: tuple) -> list[torch.Tensor]:
    return [item for item in _flat(list(values)) if isinstance(item, torch.Tensor)]


def trace(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Anatomy:
    """The anatomy of a checkpoint's architecture, from one forward pass on the meta device.

    Raises Unsupported, naming the consumer at fault, where attention has no normed input that
    could be masked.
    """
    check_depth(checkpoint)
    model = _skeleton(checkpoint, trust_remote_code)
    config = checkpoint.config
    layers_path, layers = _decoder_layers(model, depth_of(config))
    traced = _run(model, layers_path, width_of(config))
    inputs, null_gain, axis, refusal = [], 0.0, 1, ""
    for index, layer in enumerate(layers):
        path = f"{layers_path}.{index}"
        found, found_axis, found_refusal = _attention_input(checkpoint, traced, path, index)
        inputs.append(found)
        if found is not None:
            axis = found_axis
            refusal = refusal or found_refusal
            null_gain = _null_gain(layer.get_submodule(found.norm[len(path) + 1 :]))
    if not any(inputs):
        raise Unsupported(
            f"{checkpoint.model_type} cannot be converted: no linear in any attention module reads "
            "the output of a norm, so there is no normed attention input to mask."
        )
    anatomy = Anatomy(
        model_type=checkpoint.model_type,
        hidden_size=width_of(config),
        layers_path=layers_path,
        inputs=tuple(inputs),
        null_gain=null_gain,
        input_axis=axis,
        norm_refusal=refusal,
        known_from="trace",
    )
    check_shapes(anatomy, checkpoint)
    return anatomy


def _skeleton(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation="eager", trust_remote_code=trust_remote_code
                )
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise Unsupported(
                f"transformers cannot build {checkpoint.model_type} from config.json: {first}"
            ) from error
    return model.eval()


def _decoder_layers(model: Any, depth: int) -> tuple[str, list[torch.nn.Module]]:
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    with_attention = [
        (name, layers) for name, layers in lists if any(_attention_names(layer) for layer in layers)
    ]
    if len(with_attention) != 1:
        raise Unsupported(
            f"{type(model).__name__} has {len(with_attention)} lists of {depth} decoder layers "
            "with attention, expected one."
        )
    return with_attention[0]


def _attention_names(layer: torch.nn.Module) -> list[str]:
    return [
        name
        for name, child in layer.named_children()
        if ("attn" in name or "attention" in name) and not _is_norm(name, child)
    ]


def _is_norm(name: str, module: torch.nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "norm" in kind or (name.startswith("ln_") and "norm" in kind)


def _run(model: Any, layers_path: str, width: int) -> _Trace:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    traced = _Trace(names, width)
    handles = []
    for index, layer in enumerate(model.get_submodule(layers_path)):
        _survive_routing(traced, layer, f"{layers_path}.{index}")
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_push(traced, name)))
        parent = name.rpartition(".")[0]
        if parent.startswith(f"{layers_path}.") and _is_norm(name.rpartition(".")[2], module):
            handles.append(module.register_forward_hook(_mark(traced, name)))
        handles.append(module.register_forward_hook(_pop(traced)))
    try:
        with torch.inference_mode(), quiet(), _autocast_on_meta(), traced:
            # With a mask given, transformers looks for no packed sequences, which needs values.
            ones = torch.ones(1, 4, dtype=torch.long, device="meta")
            model(input_ids=ones, attention_mask=ones, use_cache=False)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise Unsupported(f"Tracing {type(model).__name__} failed: {first}") from error
    finally:
        for handle in handles:
            handle.remove()
    return traced


def _survive_routing(traced: _Trace, layer: torch.nn.Module, path: str) -> None:
    """Let the trace go on where routing to experts fails, because it depends on values.

    By then attention has run; what enters a module beside attention counts as read by it.
    """
    forward, depth = layer.forward, path.count(".") + 1

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(hidden_states, *args, **kwargs)
        except Exception:
            failed = next((name for name in traced.stack if name.count(".") >= depth), path)
            if _in_attention(failed, path) or failed == path:
                raise
            del traced.stack[traced.stack.index(path) + 1 :]
            return hidden_states

    layer.forward = run
    for name, child in layer.named_children():
        if not _in_attention(f"{path}.{name}", path):
            child.register_forward_pre_hook(_enter(traced, f"{path}.{name}"), with_kwargs=True)


def _enter(traced: _Trace, name: str) -> Any:
    def enter(_module: Any, args: tuple, kwargs: dict) -> None:
        for tensor in _tensors((*args, *kwargs.values())):
            norm = traced.origin.get(id(tensor))
            if norm is not None:
                traced.consumers.setdefault(norm, []).append(Consumer(name, "call"))

    return enter


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """torch.autocast does nothing on the meta device; transformers 4 calls it there, and fails."""
    autocast = torch.autocast

    def either(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    torch.autocast = either  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def _push(traced: _Trace, name: str) -> Any:
    return lambda _module, _args: traced.stack.append(name)


def _pop(traced: _Trace) -> Any:
    def pop(_module: Any, _args: Any, _result: Any) -> None:
        traced.stack.pop()

    return pop


def _mark(traced: _Trace, name: str) -> Any:
    def mark(_module: Any, _args: Any, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            traced.tag(result, name)

    return mark


def _attention_input(
    checkpoint: Checkpoint, traced: _Trace, path: str, index: int
) -> tuple[AttentionInput | None, int, str]:
    """The attention input of one layer, the axis of its readers, and why `norm` is not legal."""
    for norm, consumers in traced.consumers.items():
        if norm.rpartition(".")[0] != path:
            continue
        inside = [c for c in consumers if _in_attention(c.module, path)]
        if not inside:
            continue
        strange = next((c for c in inside if c.weight is None), None)
        if strange is not None:
            raise Unsupported(
                f"{checkpoint.model_type} cannot be converted: {strange.module} reads the "
                f"attention input through {strange.operation}, which no weight edit can mask."
            )
        outside = [c for c in consumers if not _in_attention(c.module, path)]
        refusal = f"{outside[0].module or path} reads the same norm" if outside else ""
        readers = tuple(dict.fromkeys(str(c.weight).rpartition(".")[0] for c in inside))
        attention = ".".join(readers[0].split(".")[: path.count(".") + 2])
        stored = _stored_name(checkpoint)
        gain, bias = stored(f"{norm}.weight"), stored(f"{norm}.bias")
        return (
            AttentionInput(
                layer=index,
                norm=norm,
                attention=attention,
                readers=readers,
                gain=gain,
                bias=bias if bias in checkpoint.tensors else None,
                weights=tuple(stored(f"{reader}.weight") for reader in readers),
            ),
            inside[0].axis,
            refusal,
        )
    return None, 1, ""


def _in_attention(module: str, path: str) -> bool:
    if not module.startswith(f"{path}."):
        return False
    child = module[len(path) + 1 :].split(".", 1)[0]
    return "attn" in child or "attention" in child


def _stored_name(checkpoint: Checkpoint) -> Any:
    """Module names to checkpoint names: the same, or without the first component."""

    def stored(name: str) -> str:
        short = name.split(".", 1)[-1]
        return short if name not in checkpoint.tensors and short in checkpoint.tensors else name

    return stored


def _null_gain(norm: torch.nn.Module) -> float:
    """The stored gain with which a norm gives exactly 0, found by trying 0 and -1."""
    probe = copy.deepcopy(norm).to_empty(device="cpu")
    weight = getattr(probe, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise Unsupported(f"The norm {type(norm).__name__} has no gain to mask by.")
    x = torch.randn(1, 3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    for null in (0.0, -1.0):
        with torch.inference_mode():
            for parameter in probe.parameters():
                parameter.zero_()
            weight.fill_(null)
            if not probe(x).any():
                return null
    raise Unsupported(f"The norm {type(norm).__name__} gives zero for neither a gain of 0 nor -1.")


def confirm(described: Anatomy | None, traced: Anatomy) -> Anatomy:
    """The anatomy that the table and the trace agree on.

    Raises Unsupported where they disagree: the table is out of date for this transformers.
    """
    if described is None:
        return traced
    for field_name in ("layers_path", "null_gain", "input_axis", "hidden_size"):
        _same(described, field_name, getattr(described, field_name), getattr(traced, field_name))
    _same(described, "legality of norm", bool(described.norm_refusal), bool(traced.norm_refusal))
    for ours, theirs in zip(described.inputs, traced.inputs, strict=True):
        _same(described, "attention input", _comparable(ours), _comparable(theirs))
    return Anatomy(**{**described.__dict__, "known_from": "table, confirmed by trace"})


def _comparable(found: AttentionInput | None) -> Any:
    if found is None:
        return None
    return (found.norm, found.gain, found.bias, found.attention, tuple(sorted(found.weights)))


def _same(described: Anatomy, what: str, table: Any, traced: Any) -> None:
    if table != traced:
        raise Unsupported(
            f"The table of families and a trace of {described.model_type} disagree about its "
            f"{what} (table: {table}; trace: {traced}); this transformers release lays the model "
            "out differently, so nothing is edited."
        )
