"""One forward pass without values: who reads what each norm of a decoder layer gives.

The model lies on the meta device (no memory, no arithmetic). Every norm output is followed through
operations that keep its columns in place, and every consumer is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from surgery.errors import Unsupported, first_line
from surgery.models.discovery import attention_names, is_norm
from surgery.models.loading import quiet
from surgery.models.observe import hooked, standing_in

logger = logging.getLogger(__name__)

# Length of the traced prompt.
TOKENS = 4
# Operations whose result holds the same columns in the same places, zeros still zero.
_TRANSPARENT = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"),
    *("detach", "to", "type", "type_as", "float", "half", "bfloat16", "dropout", "dropout_"),
    *("expand", "__get__"),
}
_TENSOR: Any = torch.Tensor  # the type of its properties is not what mypy thinks
_TRANSPOSE = (_TENSOR.T.__get__, _TENSOR.mT.__get__, _TENSOR.t, torch.t)
# Attributes and bookkeeping that read no values.
_HARMLESS = {"size", "dim", "is_floating_point", "numel", "stride", "is_contiguous", "__len__"}


@dataclass
class Consumer:
    """One use of a norm's output.

    Attributes:
        module: path of the innermost module in which it happens.
        operation: the torch function that read it, or "call" for a module called with it.
        weight: the parameter it is multiplied by, for a linear.
        axis: that weight's axis that runs over the norm's columns.
    """

    module: str
    operation: str
    weight: str | None = None
    axis: int = 1


@dataclass
class Flow(TorchFunctionMode):
    """What was seen of one forward pass.

    Attributes:
        names: id of a parameter to its name in the model.
        width: the hidden size.
        attentions: paths of the attention modules of the decoder layers.
        transposed: id of a transposed parameter to that parameter's name.
        runs: path of a norm to how often it ran.
        stack: paths of the modules that are running, the outermost first.
        origin: id of a tensor to the path of the norm whose output it holds.
        consumers: path of a norm to every use of its output.
        kept: tensors whose ids must not be given to others.
    """

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
        """Note that a tensor holds the output of a norm, column for column."""
        self.kept.append(tensor)
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


def follow(model: Any, layers_path: str, width: int) -> Flow:
    """One forward pass of a model on the meta device, followed from norm to consumer.

    What a layer gives whose routing to experts fails must have the form that the model expects:
    the states alone or, in transformers 4, in a tuple.

    Args:
        model: on the meta device, in evaluation mode, its attention eager.
        layers_path: module path of the list of decoder layers.
        width: the hidden size.

    Raises:
        Unsupported: where the model cannot run without values.
    """
    error: Exception | None = None
    for in_tuple in (False, True):
        try:
            return _run(model, layers_path, width, in_tuple)
        except Exception as failure:
            error = error or failure
    assert error is not None
    first = first_line(error)
    raise Unsupported(f"Tracing {type(model).__name__} failed: {first}") from error


def _run(model: Any, layers_path: str, width: int, in_tuple: bool) -> Flow:
    layers = {
        f"{layers_path}.{i}": layer for i, layer in enumerate(model.get_submodule(layers_path))
    }
    flow = Flow(
        names={id(parameter): name for name, parameter in model.named_parameters()},
        width=width,
        attentions=frozenset(
            f"{path}.{name}" for path, layer in layers.items() for name in attention_names(layer)
        ),
    )
    handles = [
        child.register_forward_pre_hook(_enter(flow, f"{path}.{name}"), with_kwargs=True)
        for path, layer in layers.items()
        for name, child in layer.named_children()
        if not flow.in_attention(f"{path}.{name}")
    ]
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_push(flow, name)))
        if name.rpartition(".")[0].startswith(f"{layers_path}.") and is_norm(module):
            handles.append(module.register_forward_hook(_mark(flow, name)))
        handles.append(module.register_forward_hook(_pop(flow)))
    surviving = [_survive_routing(flow, layer, path, in_tuple) for path, layer in layers.items()]
    with (
        hooked(handles),
        standing_in(list(layers.values()), surviving),
        torch.inference_mode(),
        quiet(),
        _autocast_on_meta(),
        flow,
    ):
        # With a mask given, transformers looks for no packed sequences, which needs values.
        ones = torch.ones(1, TOKENS, dtype=torch.long, device="meta")
        model(input_ids=ones, attention_mask=ones, use_cache=False)
    logger.debug("%d norms of %s are read by somebody", len(flow.consumers), type(model).__name__)
    return flow


def _survive_routing(
    flow: Flow, layer: torch.nn.Module, path: str, in_tuple: bool
) -> Callable[..., Any]:
    """A layer's forward that goes on where routing to experts fails, which depends on values.

    By then attention has run; what enters a module beside attention counts as read by it.
    """
    forward, depth = layer.forward, path.count(".") + 1

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(hidden_states, *args, **kwargs)
        except Exception:
            failed = next((name for name in flow.stack if name.count(".") >= depth), path)
            if flow.in_attention(failed) or failed == path:
                raise
            del flow.stack[flow.stack.index(path) + 1 :]
            return (hidden_states,) if in_tuple else hidden_states

    return run


def _enter(flow: Flow, name: str) -> Any:
    def enter(_module: Any, args: tuple, kwargs: dict) -> None:
        for tensor in _tensors((*args, *kwargs.values())):
            norm = flow.origin.get(id(tensor))
            if norm is not None:
                flow.consumers.setdefault(norm, []).append(Consumer(name, "call"))

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


def _push(flow: Flow, name: str) -> Any:
    return lambda _module, _args: flow.stack.append(name)


def _pop(flow: Flow) -> Any:
    def pop(_module: Any, _args: Any, _result: Any) -> None:
        flow.stack.pop()

    return pop


def _mark(flow: Flow, name: str) -> Any:
    def mark(_module: Any, _args: Any, result: Any) -> None:
        flow.runs[name] = flow.runs.get(name, 0) + 1
        if isinstance(result, torch.Tensor):
            flow.tag(result, name)

    return mark
