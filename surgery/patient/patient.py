"""The patient: a checkpoint, and everything that is opened from it when first asked."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings
from surgery.files.checkpoint import Checkpoint
from surgery.files.foreign import is_whole
from surgery.files.weights import method_of
from surgery.models.anatomy import Anatomy, describe, is_multimodal, refuse_quantised
from surgery.patient import texts
from surgery.patient.mixture import LONG_WINDOW, Mixture, mix
from surgery.patient.quantised import dequantised
from surgery.patient.source import resolve
from surgery.patient.texts import Prompt, Text
from surgery.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from surgery.models.ground import Ground
    from surgery.models.stream import LayerStream

logger = logging.getLogger(__name__)

# Share of the available memory that a loaded model's parameters may take.
COMFORTABLE = 1 / 3
# Bytes of a number, by the name of its format.
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Texts above this length (characters) are long ones.
_LONG = 4000


@dataclass(frozen=True)
class Loading:
    """How a model is opened, and what it is shown.

    Attributes:
        revision: branch, tag or commit of a Hub model.
        device: such as "cpu" or "cuda:0"; None for the best there is.
        dtype: of the analysis; what is written keeps the source's.
        trust_remote_code: whether the checkpoint's own Python code may run.
        calibration: a file of text in place of the bundled prompts.
        calibration_tokens: tokens of calibration text, at most about.
        stream: whether the model runs layer by layer from its files instead of being loaded; None
            for what suits its size and the memory.
    """

    revision: str | None = None
    device: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    calibration: str | None = None
    calibration_tokens: int = 6144
    stream: bool | None = None


class Patient:
    """A checkpoint on the table; model, tokenizer and texts are opened when first asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loading: Loading | None = None,
        reporter: Reporter = SILENT,
        *,
        traced: bool = True,
        dequantise: bool = True,
        anatomy: Anatomy | None = None,
    ) -> None:
        """Lay a checkpoint on the table; nothing is read yet.

        Args:
            checkpoint: as it is stored: what is copied and edited.
            loading: how it is opened.
            reporter: whom to tell.
            traced: whether the anatomy is confirmed by running the model's code on the meta device.
            dequantise: whether quantised weights are made floats for running; otherwise the model
                runs, or does not run, as it is stored.
            anatomy: where it is known already, from a checkpoint of the same architecture.
        """
        self.checkpoint, self.loading = checkpoint, loading or Loading()
        self.reporter = reporter
        self._traced, self._dequantise, self._known = traced, dequantise, anatomy

    @classmethod
    def admit(
        cls,
        model: str,
        loading: Loading,
        reporter: Reporter = SILENT,
        **options: Any,
    ) -> Patient:
        """The patient that a user named: a folder, a Hub id, a .gguf file or "demo"."""
        checkpoint = resolve(model, loading.revision, reporter.say)
        return cls(checkpoint, loading, reporter, **options)

    @cached_property
    def plain(self) -> Checkpoint:
        """The same model in floating point, which can be run."""
        if not self._dequantise:
            return self.checkpoint
        stored = self.checkpoint
        if stored.remote is not None and method_of(stored.config):
            # Packed weights are not streamed: each is unpacked from several tensors.
            origin = stored.origin
            stored = resolve(origin.name, origin.commit, self.reporter.say)
        return dequantised(stored, self.reporter.say)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Who reads the attention input, layer by layer; Unsupported where none can be edited."""
        if self._known is not None:
            return self._known
        return examine(
            self.plain,
            check=self._traced,
            trust_remote_code=self.loading.trust_remote_code,
        )

    @property
    def device(self) -> Any:
        """The device that the model runs on."""
        from surgery.models.loading import pick_device  # imports torch

        return pick_device(self.loading.device)

    @cached_property
    def streams(self) -> bool:
        """Whether the model runs layer by layer from its files.

        Loaded is a little faster, so that a model that fits comfortably is loaded: its parameters
        take at most a third of the memory that is available now. So are packed weights, which
        run as they are stored or not at all.
        """
        if method_of(self.plain.config):
            return False
        if self.loading.stream is not None:
            return self.loading.stream
        from surgery.models.loading import available_on  # imports torch

        width = WIDTHS[self.loading.dtype]
        needed = width * sum(math.prod(entry.shape) for entry in self.plain.tensors.values())
        return needed > COMFORTABLE * available_on(self.device)

    @property
    def ground(self) -> Ground:
        """The model for journeys through its layers, loaded or layer by layer from its files."""
        from surgery.models.ground import Loaded  # imports torch

        return self.lent if self.streams else Loaded(self.model, self.anatomy)

    @cached_property
    def lent(self) -> LayerStream:
        """The model layer by layer from its files, whether or not it would fit into memory."""
        from surgery.models.stream import LayerStream  # imports torch

        return LayerStream(self.plain, self.anatomy, **self._running)

    def passable(self, sequences: Sequence[Sequence[int]]) -> Any:
        """The model for forward passes of its backbone over some sequences.

        Loaded; or one whose layers get their matrices when they run, from its files every time.
        """
        if not self.streams:
            return self.model
        from surgery.models.lending import LentModel

        return LentModel(self.plain, self.anatomy, **self._running).open(sequences)

    @property
    def _running(self) -> dict[str, Any]:
        loading = self.loading
        return {
            "dtype": loading.dtype,
            "device": self.device,
            "trust_remote_code": loading.trust_remote_code,
        }

    @cached_property
    def model(self) -> Any:
        """The model, loaded by transformers."""
        from surgery.models.loading import load_model, require_finite  # import torch

        self.reporter.say(f"Loading {self.plain.origin.name} ({self.loading.dtype})")
        model = load_model(
            self.plain.folder,
            dtype=self.loading.dtype,
            device=self.device,
            trust_remote_code=self.loading.trust_remote_code,
        )
        require_finite(model)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from surgery.models.loading import load_tokenizer  # imports transformers

        return load_tokenizer(self.plain.folder, trust_remote_code=self.loading.trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """The configuration, without loading the model."""
        from surgery.models.loading import load_config  # imports transformers

        return load_config(self.plain.folder, trust_remote_code=self.loading.trust_remote_code)

    def release(self) -> None:
        """Forget the model, to make room."""
        self.__dict__.pop("model", None)

    # ---------------------------------------------------------------------------------------
    # Texts
    # ---------------------------------------------------------------------------------------

    def prompts(self) -> list[Prompt]:
        """The prompts the ME Layer is located with; BadSettings when the text is too short."""
        chosen = self._calibration_texts()[: texts.LOCATING_PROMPTS]
        longest = self._longest(texts.LONGEST_PROMPT)
        tokens = texts.encode(self.tokenizer, chosen, longest, self.vocabulary)
        prompts = [
            Prompt(text.kind, texts.written(self.tokenizer, text), tuple(ids))
            for text, ids in zip(chosen, tokens, strict=True)
            if len(ids) >= texts.SHORTEST
        ]
        if not prompts:
            raise BadSettings("The calibration text is too short to locate an ME Layer on.")
        return prompts

    def calibration(self) -> list[list[int]]:
        """Sequences of calibration text, at most about `loading.calibration_tokens`."""
        chosen = self._calibration_texts()
        if self.loading.calibration is None:
            # Short texts of every kind before the few long ones: the budget buys more variety.
            chosen = sorted(chosen, key=lambda text: len(text.text) > _LONG)
        return self.windows(chosen, self.loading.calibration_tokens)

    def calibration_text(self) -> tuple[list[list[int]], list[list[int]]]:
        """Calibration text for a detector, also chats and late tokens; and a window kept back.

        The second is empty where the text is too short for one.
        """
        tokens = self.loading.calibration_tokens
        found = self._mixed(self._calibration_texts(), tokens, spare=1)
        long, spare = found.long[:-1], found.long[-1:]
        if not long:
            long, spare = spare, []
        return replace(found, long=long).sequences, spare

    def held_out_mixture(self, limit: int) -> Mixture:
        """Held-out text for the gate, about `limit` tokens: also chats, and late tokens."""
        return self._mixed(texts.bundled("heldout"), limit)

    def _mixed(self, chosen: list[Text], limit: int, spare: int = 0) -> Mixture:
        longest = self._longest(LONG_WINDOW)
        return mix(self.tokenizer, chosen, limit, longest, self.vocabulary, spare=spare)

    def held_out(
        self, limit: int, length: int | None = None, text: str | None = None
    ) -> list[list[int]]:
        """Sequences of held-out text for measuring.

        Args:
            limit: tokens in all, at most about.
            length: tokens of a sequence, at most; the windows' usual length by default.
            text: a file to measure on in place of the bundled text.
        """
        chosen = texts.bundled("heldout") if text is None else texts.read_texts(Path(text))
        return self.windows(chosen, limit, length)

    def windows(self, chosen: list[Text], limit: int, length: int | None = None) -> list[list[int]]:
        """Texts as sequences of tokens that the model's context holds."""
        longest = self._longest(length or texts.WINDOW)
        return texts.windows(self.tokenizer, chosen, longest, limit, self.vocabulary)

    def _calibration_texts(self) -> list[Text]:
        if self.loading.calibration is None:
            return texts.bundled("calibration")
        return texts.read_texts(Path(self.loading.calibration))

    @cached_property
    def vocabulary(self) -> int | None:
        """How many tokens the model has embeddings for; None where its configuration is silent."""
        from surgery.models.loading import text_settings  # imports torch

        found = getattr(text_settings(self.config), "vocab_size", None)
        return found if is_whole(found) else None

    def _longest(self, wanted: int) -> int:
        from surgery.models.loading import longest_context, text_settings  # import torch

        return longest_context(text_settings(self.config), wanted)


def examine(
    checkpoint: Checkpoint, *, check: bool = True, trust_remote_code: bool = False
) -> Anatomy:
    """The anatomy of a checkpoint: from the table, confirmed by a trace unless `check` is off.

    Multimodal checkpoints are always traced: the table does not say where their decoder lies.

    Raises:
        Unsupported: where no truthful edit is possible, or table and trace disagree.
    """
    described, multimodal = describe(checkpoint), is_multimodal(checkpoint.config)
    if described is not None and not check and not multimodal:
        return described
    from surgery.models.loading import refuse_remote_code
    from surgery.models.trace import confirm, trace  # imports torch

    refuse_quantised(checkpoint)
    refuse_remote_code(checkpoint.folder, trust_remote_code)
    logger.info("Tracing %s on the meta device", checkpoint.origin.name)
    traced = trace(checkpoint, trust_remote_code=trust_remote_code)
    return confirm(described, traced, multimodal=multimodal)
