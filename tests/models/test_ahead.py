"""Layers read ahead, as on an accelerator: the same numbers, each layer read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surgery.errors import BadCheckpoint
from surgery.files.checkpoint import Checkpoint
from surgery.models.anatomy import Anatomy
from surgery.models.journey import Stream
from surgery.models.lending import Lender
from surgery.patient.patient import Loading, Patient

Tiny = Callable[..., Path]
TEXT = [[5, 6, 7, 8], [9, 10, 11]]
LAYERS = 4


@pytest.fixture
def parts(tiny: Tiny) -> tuple[Checkpoint, Anatomy]:
    patient = Patient.admit(str(tiny("qwen3", layer=2, layers=LAYERS)), Loading())
    return patient.checkpoint, patient.anatomy


def passed(lender: Lender, layers: range) -> list[torch.Tensor]:
    """The residual streams after these layers."""
    lender.prepare(TEXT)
    stream = Stream.board(lender, TEXT)
    for index in layers:
        with lender.layer(index) as layer:
            stream.step(index, layer)
    return stream.states


def test_the_same_numbers_and_bytes(parts: tuple[Checkpoint, Anatomy]) -> None:
    plain, ahead = (Lender(*parts, ahead=given) for given in (False, True))
    for one, other in zip(passed(plain, range(LAYERS)), passed(ahead, range(LAYERS)), strict=True):
        assert torch.equal(one, other)
    assert ahead.bytes_read == plain.bytes_read


def test_a_journey_that_ends_early_and_another(parts: tuple[Checkpoint, Anatomy]) -> None:
    """What was begun for a journey that went no further is not taken for another layer."""
    plain, ahead = (Lender(*parts, ahead=given) for given in (False, True))
    passed(ahead, range(2))
    for one, other in zip(passed(plain, range(LAYERS)), passed(ahead, range(LAYERS)), strict=True):
        assert torch.equal(one, other)


def test_the_next_layer_is_read_while_one_is_entered(parts: tuple[Checkpoint, Anatomy]) -> None:
    lender = Lender(*parts, ahead=True)
    lender.prepare(TEXT)
    assert lender._ahead is not None
    with lender.layer(0):
        assert lender._ahead._index == 1
        assert lender._ahead._begun is not None
        begun = lender._ahead._begun.result()
    with lender.layer(1) as layer:
        found = dict(layer.named_parameters())
    path = parts[1].layers_path
    assert {name.removeprefix(f"{path}.1.") for name in begun} == set(found)
    with lender.layer(LAYERS - 1):
        assert lender._ahead._begun is None  # there is none after the last


def test_what_cannot_be_read_is_said_when_its_turn_comes(
    parts: tuple[Checkpoint, Anatomy], monkeypatch: pytest.MonkeyPatch
) -> None:
    lender = Lender(*parts, ahead=True)
    lender.prepare(TEXT)
    real = lender._stored.values

    def broken(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if ".layers.1." in name:
            raise BadCheckpoint("the file is shorter than it was")
        return real(name, shape)

    monkeypatch.setattr(lender._stored, "values", broken)
    with lender.layer(0):
        pass
    with pytest.raises(BadCheckpoint, match="shorter"), lender.layer(1):
        pass
    lender.prepare(TEXT)
    with lender.layer(0):
        pass
    lender.prepare(TEXT)  # nobody wants the second layer, so its failure is nobody's
