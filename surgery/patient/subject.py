"""A checkpoint with its model, its tokenizer and the texts it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings
from surgery.files.checkpoint import Checkpoint
from surgery.reporter import Reporter
from surgery.settings import Settings

if TYPE_CHECKING:
    from surgery.measure.probe import Prompt


class Subject:
    """A checkpoint with its model and tokenizer, loaded when first needed."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, reporter: Reporter) -> None:
        self.checkpoint, self.settings, self.reporter = checkpoint, settings, reporter
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def device(self) -> Any:
        from surgery.models.loading import pick_device

        return pick_device(self.settings.device)

    @property
    def model(self) -> Any:
        if self._model is None:
            from surgery.models.loading import load_model, require_finite

            self.reporter.say(f"Loading {self.checkpoint.origin.name} ({self.settings.dtype})")
            self._model = load_model(
                self.checkpoint.folder,
                dtype=self.settings.dtype,
                device=self.device,
                trust_remote_code=self.settings.trust_remote_code,
            )
            require_finite(self._model)
        return self._model

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from surgery.models.loading import load_tokenizer

            self._tokenizer = load_tokenizer(
                self.checkpoint.folder, trust_remote_code=self.settings.trust_remote_code
            )
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The configuration, without loading the model."""
        from surgery.models.loading import load_config

        return load_config(
            self.checkpoint.folder, trust_remote_code=self.settings.trust_remote_code
        )

    def release(self) -> None:
        """Forget the model, to make room."""
        self._model = None


def locating_prompts(subject: Subject, settings: Settings) -> list[Prompt]:
    """The prompts the ME Layer is located with; BadSettings when the text is too short."""
    from surgery.measure.probe import Prompt
    from surgery.models.loading import longest_context
    from surgery.patient import texts

    chosen = _calibration_texts(settings)[: texts.LOCATING_PROMPTS]
    longest = longest_context(subject.config.get_text_config(), texts.LONGEST_PROMPT)
    tokens = texts.encode(subject.tokenizer, chosen, longest)
    prompts = [
        Prompt(text.kind, text.text, tuple(ids))
        for text, ids in zip(chosen, tokens, strict=True)
        if len(ids) >= texts.SHORTEST
    ]
    if not prompts:
        raise BadSettings("The calibration text is too short to locate an ME Layer on.")
    return prompts


def _calibration_texts(settings: Settings) -> list[Any]:
    from surgery.patient import texts

    if settings.calibration is None:
        return texts.bundled("calibration")
    return texts.read_texts(Path(settings.calibration))


def calibration_windows(subject: Subject, settings: Settings) -> list[list[int]]:
    """Sequences of calibration text, at most about `settings.calibration_tokens`."""
    from surgery.patient import texts

    chosen = _calibration_texts(settings)
    if settings.calibration is None:
        # Short texts of every kind before the few long ones: the budget buys more variety.
        chosen = sorted(chosen, key=lambda text: len(text.text) > 4000)
    limit = settings.calibration_tokens
    return texts.windows(subject.tokenizer, chosen, _longest(subject, texts.WINDOW), limit)


def heldout_windows(
    subject: Subject, limit: int, length: int | None = None, text: str | None = None
) -> list[list[int]]:
    """Sequences of held-out text for measuring, at most about `limit` tokens.

    text: a file to measure on in place of the bundled text.
    """
    from surgery.patient import texts

    longest = _longest(subject, length or texts.WINDOW)
    chosen = texts.bundled("heldout") if text is None else texts.read_texts(Path(text))
    return texts.windows(subject.tokenizer, chosen, longest, limit)


def _longest(subject: Subject, wanted: int) -> int:
    from surgery.models.loading import longest_context

    return longest_context(subject.config.get_text_config(), wanted)
