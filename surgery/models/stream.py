"""Running a model layer by layer, straight from its checkpoint's bytes.

Only what is needed is read: the embedding rows of the prompts' tokens, then one decoder layer after
another until the emergence is established and has lasted. The model may lie on this disk or on the
Hub, and need not fit into memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import Unsupported, first_line
from surgery.files.checkpoint import Checkpoint
from surgery.method.locate import Emergence, agree, vote
from surgery.models.anatomy import Anatomy
from surgery.models.loading import auto_class, parameters_on_meta, quiet, refuse_remote_code
from surgery.models.names import StoredNames
from surgery.models.observe import backbone, decoder_layers, hidden, pad, residual

# Layers the sink must stay massive for before a stream stops. SmolLM2's early rise, which fades,
# lasts seven.
PATIENCE = 8
# Embedding rows closer than this are read in one piece.
_ROW_GAP = 64 * 1024
# Prompts within this factor of each other's length share a batch; more padding wastes time.
_SIMILAR = 1.5
# Tokens of a batch, at most, unless one prompt is longer: bounds the memory of activations.
_BATCH_TOKENS = 1024
# Elements of a tensor that are read at a time. On the Hub each piece is a request.
_PIECE = 2_000_000


@dataclass(frozen=True)
class Streamed:
    """What a stream saw. layers_run of depth; bytes_read of bytes_total in the weight files."""

    emergence: Emergence
    layers_run: int
    depth: int
    bytes_read: int
    bytes_total: int

    def summary(self) -> dict[str, int]:
        """How much was read, for JSON."""
        return {
            name: getattr(self, name)
            for name in ("layers_run", "depth", "bytes_read", "bytes_total")
        }


class _Meter:
    """Reads byte ranges and counts them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._ranges = checkpoint.ranges
        self.count = 0

    def read(self, file: str, begin: int, end: int) -> bytes:
        self.count += end - begin
        return self._ranges.read(file, begin, end)

    def read_many(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        self.count += sum(end - begin for _, begin, end in ranges)
        return self._ranges.read_many(ranges)


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The model without its parameters, in evaluation mode."""
    from transformers import AutoConfig

    refuse_remote_code(checkpoint.folder, trust_remote_code)
    with quiet(), parameters_on_meta():
        try:
            config = AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            model = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            first = first_line(error)
            raise Unsupported(
                f"transformers cannot build {checkpoint.model_type} from config.json: {first}"
            ) from error
    return model.eval()


class LayerStream:
    """A model whose decoder layers get their weights when they run, and lose them afterwards."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._checkpoint, self._anatomy = checkpoint, anatomy
        self._dtype, self._device = dtype, device or torch.device("cpu")
        self._meter = _Meter(checkpoint)
        self._model = skeleton(checkpoint, dtype, trust_remote_code)
        self._names = StoredNames(checkpoint, self._model)

    @property
    def bytes_read(self) -> int:
        """Bytes of weight files read so far."""
        return self._meter.count

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor in the dtype of the analysis."""
        entry = self._checkpoint.tensors[name]
        found = torch.empty(math.prod(entry.shape), dtype=self._dtype, device=self._device)
        # Piece by piece, so that the stored bytes never stand beside the whole tensor.
        width = entry.size // max(1, len(found))
        for begin in range(0, len(found), _PIECE):
            end = min(begin + _PIECE, len(found))
            raw = self._meter.read(
                entry.file, entry.begin + begin * width, entry.begin + end * width
            )
            found[begin:end] = self._torch(raw, entry.dtype, (end - begin,), name)
        return found.reshape(entry.shape)

    def _torch(self, raw: bytes, dtype: str, shape: tuple[int, ...], name: str) -> torch.Tensor:
        if dtype not in _TORCH:
            raise Unsupported(f"{name} is stored as {dtype}, which cannot be streamed.")
        flat = torch.frombuffer(bytearray(raw), dtype=getattr(torch, _TORCH[dtype]))
        return flat.to(self._device, self._dtype).reshape(shape)

    def prepare(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Load all that is not a decoder layer; prompts in the ids of the loaded rows."""
        base = backbone(self._model, self._anatomy)
        embedding: Any = self._model.get_input_embeddings()
        used = sorted({token for prompt in prompts for token in prompt})
        place = {token: row for row, token in enumerate(used)}
        embedding_path = next(
            name for name, module in self._model.named_modules() if module is embedding
        )
        rows = self._rows(f"{embedding_path}.weight", used)
        embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None
        embedding.num_embeddings = len(used)
        prefix = self._anatomy.layers_path.rpartition(".")[0]
        for name, module in base.named_modules(prefix=prefix):
            if module is not embedding and not name.startswith(f"{self._anatomy.layers_path}."):
                self._fill(module, name, recurse=False)
        for buffer in base.buffers():
            buffer.data = buffer.data.to(self._device)
        return [[place[token] for token in prompt] for prompt in prompts]

    def _rows(self, name: str, rows: list[int]) -> torch.Tensor:
        """Rows of a stored matrix, neighbours read together."""
        name = self._names.of(name)
        entry = self._checkpoint.tensors[name]
        width = entry.size // entry.shape[0]
        runs: list[list[int]] = []
        for row in rows:
            if runs and (row - runs[-1][-1]) * width <= _ROW_GAP:
                runs[-1].append(row)
            else:
                runs.append([row])
        spans = [
            (entry.begin + run[0] * width, entry.begin + (run[-1] + 1) * width) for run in runs
        ]
        parts = []
        raws = self._meter.read_many([(entry.file, begin, end) for begin, end in spans])
        for run, raw in zip(runs, raws, strict=True):
            shape = (run[-1] + 1 - run[0], *entry.shape[1:])
            piece = self._torch(raw, entry.dtype, shape, name)
            parts.append(piece[[row - run[0] for row in run]])
        return torch.cat(parts)

    def _fill(self, module: torch.nn.Module, path: str, *, recurse: bool = True) -> None:
        """Give a module's parameters their stored values."""
        for name, parameter in list(module.named_parameters(prefix=path, recurse=recurse)):
            owner, _, leaf = name.rpartition(".")
            values = self._stored(name, tuple(parameter.shape))
            holder = self._model.get_submodule(owner)
            holder._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)

    def _stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        sources = self._names.sources(name)
        values = self.tensor(sources[0]) if len(sources) == 1 else self._experts(name, sources)
        if tuple(values.shape) != shape:
            raise Unsupported(
                f"{name} has shape {list(shape)} in the model and {list(values.shape)} in the "
                "checkpoint, so it cannot be streamed."
            )
        return values

    def _experts(self, name: str, sources: list[str]) -> torch.Tensor:
        """Fused experts [experts, out, in] from the experts' own tensors in the checkpoint."""
        parts: dict[int, dict[str, str]] = {}
        for source in sources:
            match = _EXPERT.fullmatch(source)
            if match is None or match["part"] not in _PARTS:
                raise Unsupported(f"{name} is computed from {source}, so it cannot be streamed.")
            parts.setdefault(int(match["number"]), {})[match["part"]] = source
        return torch.stack(
            [
                torch.cat([self.tensor(parts[number][part]) for part in _PARTS if part in own])
                for number, own in sorted(parts.items())
            ]
        )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Callable[[list[NDArray[np.float64]]], bool],
        progress: Callable[[int], None] = lambda _done: None,
    ) -> list[NDArray[np.float64]]:
        """Norms per prompt, [layers run + 1, tokens], as `observe.layer_norms` gives them.

        stop: asked after every layer with the norms so far.
        """
        layers = decoder_layers(self._model, self._anatomy)
        with torch.inference_mode():
            groups = list(_groups(self.prepare(prompts)))
            states: list[torch.Tensor] = []
            calls = []
            for group in groups:
                recorded = self._calls(layers, [ids for _, ids in group])
                states.append(recorded[0][0])
                calls.append([(args, kwargs) for _, args, kwargs in recorded])
            del recorded
            norms: list[list[torch.Tensor]] = [[] for _ in prompts]
            beside: list[Any] = [None] * len(calls)
            _keep(norms, groups, states)
            for index, layer in enumerate(layers):
                self._fill(layer, f"{self._anatomy.layers_path}.{index}")
                for number, call in enumerate(calls):
                    args, kwargs = call[index]
                    kwargs = {
                        name: beside[number] if value is _BESIDE else value
                        for name, value in kwargs.items()
                    }
                    output = layer(states[number], *args, **kwargs)
                    states[number] = hidden(output)
                    beside[number] = output[1] if _is_pair(output) else None
                layer.to("meta")
                _keep(norms, groups, states)
                progress(1)
                if stop([torch.stack(rows).double().numpy() for rows in norms]):
                    break
        return [torch.stack(rows).double().numpy() for rows in norms]

    def _calls(
        self, layers: list[torch.nn.Module], prompts: list[list[int]]
    ) -> list[tuple[torch.Tensor, tuple, dict]]:
        """What the backbone calls each layer with, found by letting it call stand-ins.

        Some models' layers return their states alone, others (in transformers 4) in a tuple, or
        with something beside them that the next layer may get; what is wrong for a model shows in
        the shape that the next layer gets.
        """
        forms: tuple[Callable[[torch.Tensor], Any], ...] = (
            lambda states: states,
            lambda states: (states,),
            lambda states: (states, _BESIDE),
        )
        for form in forms:
            calls = self._record(layers, prompts, form)
            shapes = {tuple(states.shape) for states, _, _ in calls}
            if len(calls) == len(layers) and len(shapes) == 1:
                return calls
        raise Unsupported(
            f"{self._anatomy.model_type} does not call its layers one after another, so it cannot "
            "be streamed."
        )

    def _record(
        self,
        layers: list[torch.nn.Module],
        prompts: list[list[int]],
        form: Callable[[torch.Tensor], Any],
    ) -> list[tuple[torch.Tensor, tuple, dict]]:
        ids, mask = pad(prompts)
        calls: list[tuple[torch.Tensor, tuple, dict]] = []

        def record(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((states, args, kwargs))
            return form(states)

        for layer in layers:
            layer.forward = record
        try:
            backbone(self._model, self._anatomy)(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                use_cache=False,
            )
        except (IndexError, TypeError, ValueError, AttributeError, RuntimeError):
            pass  # the wrong form, or a part after the layers that is not there
        finally:
            for layer in layers:
                del layer.forward
        return calls


# Stands for what a layer returns beside its states.
_BESIDE = object()
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
# transformers 5 keeps a layer's experts in one tensor; checkpoints keep them one by one, in which
# the part that gates comes first.
_EXPERT = re.compile(r".*\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight")
_PARTS = ("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


def _is_pair(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) > 1


def _groups(prompts: list[list[int]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Prompts of similar length together, each with its place."""
    ordered = sorted(enumerate(prompts), key=lambda pair: len(pair[1]))
    group: list[tuple[int, list[int]]] = []
    for pair in ordered:
        crowded = len(pair[1]) * (len(group) + 1) > _BATCH_TOKENS
        if group and (crowded or len(pair[1]) > _SIMILAR * len(group[0][1])):
            yield group
            group = []
        group.append(pair)
    if group:
        yield group


def _keep(
    norms: list[list[torch.Tensor]],
    groups: list[list[tuple[int, list[int]]]],
    states: list[torch.Tensor],
) -> None:
    for group, state in zip(groups, states, strict=True):
        lengths = residual(state).float().norm(dim=-1).cpu()
        for row, (place, ids) in enumerate(group):
            norms[place].append(lengths[row, : len(ids)])


def established(norms: Sequence[NDArray[np.float64]], depth: int) -> bool:
    """Whether every prompt shows an emergence that has lasted for PATIENCE layers."""
    done = norms[0].shape[0] - 1
    for prompt in norms:
        found = vote(prompt, depth=depth).layer
        if found is None or done - 1 - found < PATIENCE:
            return False
    return True


def stream_emergence(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: str = "float32",
    device: torch.device | None = None,
    all_layers: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int], None] = lambda _done: None,
) -> Streamed:
    """Locate the ME Layer of a model that is never loaded whole.

    Gives the layer and the norms of the full forward pass (relative difference below 1e-3 in
    float32: padding and batching change the order of sums). Raises Unsupported for layouts whose
    tensors do not map one to one onto the model's.
    """
    stream = LayerStream(
        checkpoint,
        anatomy,
        dtype=getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )

    def stop(norms: list[NDArray[np.float64]]) -> bool:
        return not all_layers and established(norms, anatomy.depth)

    norms = stream.run(prompts, stop, progress)
    return Streamed(
        emergence=agree(norms, depth=anatomy.depth),
        layers_run=norms[0].shape[0] - 1,
        depth=anatomy.depth,
        bytes_read=stream.bytes_read,
        bytes_total=checkpoint.size,
    )
