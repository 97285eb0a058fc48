"""The anatomy of a model found by running it: who reads the output of each pre-attention norm.

The configuration is built on the meta device (no memory, no arithmetic) and run once on a few
tokens; every norm output is followed through operations that keep its columns in place, and every
consumer is recorded. This checks the table of families, and replaces it for unknown ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from surgery.errors import Unsupported, first_line
from surgery.files.checkpoint import Checkpoint
from surgery.models.anatomy import (
    Anatomy,
    AttentionInput,
    check_depth,
    check_shapes,
    depth_of,
    text_config,
    width_of,
)
from surgery.models.families import NO_GAIN
from surgery.models.loading import auto_class, on_meta, quiet
from surgery.models.names import StoredNames

# Length of the traced prompt.
TOKENS = 4
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
_TENSOR: Any = torch.Tensor  # the type of its properties is not what mypy thinks
_TRANSPOSE = (_TENSOR.T.__get__, _TENSOR.mT.__get__, _TENSOR.t, torch.t)
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
    attentions: frozenset[str]
    transposed: dict[int, str] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
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
        args = _known_lengths(func, args)
        result = _without_values(func, args)
        if result is None:
            result = func(*args, **kwargs)
        self._note_transposed(func, args, result)
        tagged = [t for t in _tensors((*args, *kwargs.values())) if id(t) in self.origin]
        if tagged:
            self._use(func, args, result, tagged)
        return result

    def _note_transposed(self, func: Any, args: tuple, result: Any) -> None:
        name = self.names.get(id(args[0])) if args else None
        if name is not None and func in _TRANSPOSE:
            self.kept.append(result)
            self.transposed[id(result)] = name

    def in_attention(self, module: str) -> bool:
        """Whether a module is an attention module of a decoder layer, or part of one."""
        return any(module == one or module.startswith(f"{one}.") for one in self.attentions)

    def _use(self, func: Any, args: tuple, result: Any, tagged: list[torch.Tensor]) -> None:
        name = getattr(func, "__name__", str(func))
        norm = self.origin[id(tagged[0])]
        if not any(isinstance(part, torch.Tensor) for part in _flat(result)) or name in _HARMLESS:
            return
        if isinstance(result, torch.Tensor) and result is tagged[0]:
            return
        if (name in _TRANSPARENT or _is_scaling(name, args)) and result.shape[-1:] == (self.width,):
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
        if name in ("matmul", "__matmul__") and args[0] is x:
            transposed = self.transposed.get(id(args[1]))
            return (transposed, 1) if transposed else (self.names.get(id(args[1])), 0)
        return None, 1


def _is_scaling(name: str, args: tuple) -> bool:
    """Whether an operation multiplies a tensor by a plain number."""
    return name in ("mul", "__mul__", "__rmul__") and any(
        isinstance(factor, int | float) for factor in args
    )


def _without_values(func: Any, args: tuple) -> Any:
    """What operations give that ask for values, which a trace has none of; None for all others.

    Conditions hold: they ask whether the mask is all ones, as it is. Nothing is nonzero: no expert
    is routed to, and what comes after the experts goes on.
    """
    x = args[0] if args else None
    if not isinstance(x, torch.Tensor) or x.device.type != "meta":
        return None
    if func is torch.Tensor.__bool__:
        return True
    if func in (torch.Tensor.nonzero, torch.nonzero):
        return torch.empty(0, x.dim(), dtype=torch.long, device="meta")
    return None


def _known_lengths(func: Any, args: tuple) -> tuple:
    """Sizes of a new tensor that are computed from positions, which have no values here."""
    if func not in (torch.full, torch.arange) or not args:
        return args

    def known(length: Any) -> Any:
        return TOKENS if isinstance(length, torch.Tensor) else length

    size = [known(one) for one in args[0]] if func is torch.full else known(args[0])
    return (size, *args[1:])


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
    model_type = str(text_config(config).get("model_type", checkpoint.model_type))
    layers_path, layers = _decoder_layers(model, depth_of(config))
    traced = _run(model, layers_path, width_of(config))
    finder = _Finder(model_type, traced, StoredNames(checkpoint, model))
    found = [
        finder.input_at(f"{layers_path}.{index}", index, layer)
        for index, layer in enumerate(layers)
    ]
    known = [one for one in found if one is not None]
    if not known:
        raise Unsupported(
            f"{model_type} cannot be converted: no linear in any attention module reads "
            "the output of a norm, so there is no normed attention input to mask."
        )
    for what in ("axis", "null_gain"):
        if len({getattr(one, what) for one in known}) > 1:
            raise Unsupported(f"{model_type} cannot be converted: its layers differ in {what}.")
    anatomy = Anatomy(
        model_type=model_type,
        hidden_size=width_of(config),
        layers_path=layers_path,
        inputs=tuple(one.input if one is not None else None for one in found),
        null_gain=known[0].null_gain,
        input_axis=known[0].axis,
        norm_refusal=next((one.norm_refusal for one in known if one.norm_refusal), ""),
        known_from="trace",
    )
    check_shapes(anatomy, checkpoint)
    return anatomy


def _skeleton(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            model = on_meta(
                auto_class(config),
                config,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
            if hasattr(model, "set_experts_implementation"):  # from transformers 5 on
                model.set_experts_implementation("eager")  # the others want certain dtypes
        except Exception as error:
            first = first_line(error)
            raise Unsupported(
                f"transformers cannot build {checkpoint.model_type} from config.json: {first}"
            ) from error
    return model.eval()


def _decoder_layers(model: Any, depth: int) -> tuple[str, list[torch.nn.Module]]:
    """The text decoder's layers: the list that lies beside the token embedding.

    Where the embedding lies elsewhere, the one list of the right length with attention in it.
    """
    embedding = model.get_input_embeddings()
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) != depth:
            continue
        if any(_attention_names(layer) for layer in module):
            owner = model.get_submodule(name.rpartition(".")[0])
            beside = any(child is embedding for child in owner.children())
            found.append((beside, name, list(module)))
    chosen = [one for one in found if one[0]] or found
    if len(chosen) != 1:
        raise Unsupported(
            f"{type(model).__name__} has {len(chosen)} lists of {depth} decoder layers "
            "with attention, expected one."
        )
    return chosen[0][1:]


def _attention_names(layer: torch.nn.Module) -> list[str]:
    """Which children of a layer are attention, by their own name or their class's."""
    return [
        name
        for name, child in layer.named_children()
        if ("attn" in name or "attention" in f"{name} {type(child).__name__}".lower())
        and not _is_norm(name, child)
    ]


def _is_norm(name: str, module: torch.nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "norm" in kind or (name.startswith("ln_") and "norm" in kind)


def _run(model: Any, layers_path: str, width: int) -> _Trace:
    """One forward pass under the trace.

    What a layer gives whose routing to experts fails must have the form that the model expects:
    the states alone or, in transformers 4, in a tuple.
    """
    error: Exception | None = None
    for in_tuple in (False, True):
        try:
            return _run_once(model, layers_path, width, in_tuple)
        except Exception as failure:
            error = error or failure
    assert error is not None
    first = first_line(error)
    raise Unsupported(f"Tracing {type(model).__name__} failed: {first}") from error


def _run_once(model: Any, layers_path: str, width: int, in_tuple: bool) -> _Trace:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = list(model.get_submodule(layers_path))
    attentions = frozenset(
        f"{layers_path}.{index}.{name}"
        for index, layer in enumerate(layers)
        for name in _attention_names(layer)
    )
    traced = _Trace(names, width, attentions)
    handles = []
    for index, layer in enumerate(layers):
        handles += _survive_routing(traced, layer, f"{layers_path}.{index}", in_tuple)
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_push(traced, name)))
        parent = name.rpartition(".")[0]
        if parent.startswith(f"{layers_path}.") and _is_norm(name.rpartition(".")[2], module):
            handles.append(module.register_forward_hook(_mark(traced, name)))
        handles.append(module.register_forward_hook(_pop(traced)))
    try:
        with torch.inference_mode(), quiet(), _autocast_on_meta(), traced:
            # With a mask given, transformers looks for no packed sequences, which needs values.
            ones = torch.ones(1, TOKENS, dtype=torch.long, device="meta")
            model(input_ids=ones, attention_mask=ones, use_cache=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()
    return traced


def _survive_routing(
    traced: _Trace, layer: torch.nn.Module, path: str, in_tuple: bool
) -> list[Any]:
    """Let the trace go on where routing to experts fails, because it depends on values.

    By then attention has run; what enters a module beside attention counts as read by it.
    """
    forward, depth = layer.forward, path.count(".") + 1

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(hidden_states, *args, **kwargs)
        except Exception:
            failed = next((name for name in traced.stack if name.count(".") >= depth), path)
            if traced.in_attention(failed) or failed == path:
                raise
            del traced.stack[traced.stack.index(path) + 1 :]
            return (hidden_states,) if in_tuple else hidden_states

    layer.forward = run
    return [
        child.register_forward_pre_hook(_enter(traced, f"{path}.{name}"), with_kwargs=True)
        for name, child in layer.named_children()
        if not traced.in_attention(f"{path}.{name}")
    ]


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
        traced.runs[name] = traced.runs.get(name, 0) + 1
        if isinstance(result, torch.Tensor):
            traced.tag(result, name)

    return mark


@dataclass(frozen=True)
class _Found:
    """The attention input of one layer, the axis of its readers, and what its norm allows."""

    input: AttentionInput
    axis: int
    null_gain: float
    norm_refusal: str


@dataclass(frozen=True)
class _Finder:
    """Reads a finished trace, layer by layer."""

    model_type: str
    traced: _Trace
    stored: StoredNames

    def input_at(self, path: str, index: int, layer: torch.nn.Module) -> _Found | None:
        """The attention input of a layer; None where no norm of the layer feeds attention."""
        for norm, consumers in self.traced.consumers.items():
            inside = [c for c in consumers if self.traced.in_attention(c.module)]
            if inside and norm.rpartition(".")[0] == path:
                outside = [c for c in consumers if c not in inside]
                return self._found(path, index, layer, norm, inside, outside)
        return None

    def _found(
        self,
        path: str,
        index: int,
        layer: torch.nn.Module,
        norm: str,
        inside: list[Consumer],
        outside: list[Consumer],
    ) -> _Found:
        self._require_plain(path, norm, inside)
        readers = tuple(dict.fromkeys(str(c.weight).rpartition(".")[0] for c in inside))
        module = layer.get_submodule(norm[len(path) + 1 :])
        has_gain = isinstance(getattr(module, "weight", None), torch.Tensor)
        has_bias = isinstance(getattr(module, "bias", None), torch.Tensor)
        refusal = "" if has_gain else NO_GAIN
        if outside:
            refusal = f"{_who(outside[0], path)} the same norm"
        return _Found(
            AttentionInput(
                layer=index,
                norm=norm,
                attention=".".join(readers[0].split(".")[: path.count(".") + 2]),
                readers=readers,
                gain=self.stored.of(f"{norm}.weight") if has_gain else "",
                bias=self.stored.of(f"{norm}.bias") if has_bias else None,
                weights=tuple(self.stored.of(f"{reader}.weight") for reader in readers),
            ),
            inside[0].axis,
            _null_gain(module) if has_gain else 0.0,
            refusal,
        )

    def _require_plain(self, path: str, norm: str, inside: list[Consumer]) -> None:
        """Raise Unsupported unless the readers are linears of this layer, run once."""
        strange = next((c for c in inside if c.weight is None), None)
        if strange is not None:
            raise Unsupported(
                f"{self.model_type} cannot be converted: {strange.module} reads the "
                f"attention input through {strange.operation}, which no weight edit can mask."
            )
        foreign = next((c for c in inside if not str(c.weight).startswith(f"{path}.")), None)
        if foreign is not None:
            raise Unsupported(
                f"{self.model_type} cannot be converted: {path} reads the attention input through "
                f"{foreign.weight}, which belongs to another layer too."
            )
        if len({c.axis for c in inside}) > 1:
            raise Unsupported(
                f"{self.model_type} cannot be converted: the weights that read the attention input "
                f"of {path} run over it along different axes."
            )
        if self.traced.runs[norm] > 1:
            raise Unsupported(
                f"{self.model_type} cannot be converted: {path} runs several times for each token, "
                "so no edit reaches one run alone."
            )


def _who(consumer: Consumer, path: str) -> str:
    """A consumer beside attention, as the beginning of a sentence."""
    if consumer.module in ("", path):
        return f"{path} itself, through {consumer.operation}, reads"
    return f"{consumer.module} reads"


def _null_gain(norm: torch.nn.Module) -> float:
    """The stored gain with which a norm gives exactly 0, found by trying 0 and -1."""
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu")
    weight = probe.weight
    x = torch.randn(1, 3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    for null in (0.0, -1.0):
        with torch.inference_mode():
            for parameter in probe.parameters():
                parameter.zero_()
            weight.fill_(null)
            if not probe(x).any():
                return null
    raise Unsupported(f"The norm {type(norm).__name__} gives zero for neither a gain of 0 nor -1.")


def confirm(described: Anatomy | None, traced: Anatomy, *, multimodal: bool = False) -> Anatomy:
    """The anatomy that the table and the trace agree on.

    multimodal: where in the model the decoder layers lie is the trace's to say.
    Raises Unsupported where they disagree: the table is out of date for this transformers.
    """
    if described is None:
        return traced
    for field_name in ("model_type", "null_gain", "input_axis", "hidden_size"):
        _same(described, field_name, getattr(described, field_name), getattr(traced, field_name))
    _same(described, "legality of norm", bool(described.norm_refusal), bool(traced.norm_refusal))
    for ours, theirs in zip(described.inputs, traced.inputs, strict=True):
        _same(described, "attention input", _relative(described, ours), _relative(traced, theirs))
    known_from = "table, confirmed by trace"
    if multimodal:
        return replace(traced, norm_refusal=described.norm_refusal, known_from=known_from)
    _same(described, "layers_path", described.layers_path, traced.layers_path)
    return replace(described, known_from=known_from)


def _relative(anatomy: Anatomy, found: AttentionInput | None) -> Any:
    """An attention input to compare, its modules relative to the layers."""
    if found is None:
        return None
    start = len(anatomy.layers_path)
    modules = (found.norm[start:], found.attention[start:])
    return (*modules, found.gain, found.bias, tuple(sorted(found.weights)))


def _same(described: Anatomy, what: str, table: Any, traced: Any) -> None:
    if table != traced:
        raise Unsupported(
            f"The table of families and a trace of {described.model_type} disagree about its "
            f"{what} (table: {table}; trace: {traced}); this transformers release lays the model "
            "out differently, so nothing is edited."
        )
