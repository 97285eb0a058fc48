"""The hooks mask the first real token of each sequence, once: padded, packed, cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_tokenizer

import surgery
from surgery.errors import Unsupported
from surgery.method.mask import Mask, largest
from surgery.models.anatomy import Anatomy, describe, effective_gain
from surgery.models.loading import load_model
from surgery.models.masking import KEYWORD, first_real_token, masked

Tiny = Callable[..., Path]

TEXTS = [
    "The keeper counted 365 steps; what will the wind do today, asked the baker?",
    "Bread and coffee.",
    "Numbers are useful as well: 1, 2, 3, 10.",
]
PAD = 2


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2", "cohere"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def subject(tiny: Tiny, family: str) -> tuple[Any, Anatomy, Mask]:
    """A model massive from layer 2 on, and a mask strong enough to be seen."""
    folder = tiny(family, layer=2, layers=6)
    checkpoint = surgery.resolve(str(folder))
    anatomy = describe(checkpoint)
    assert anatomy is not None
    chosen = {at: largest(effective_gain(anatomy, checkpoint, at), 40) for at in (3, 4, 5)}
    return load_model(folder), anatomy, Mask(64, "weight", 1.0, chosen)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    tokenizer = make_tokenizer()
    return [tokenizer(text).input_ids for text in TEXTS]


def forward(model: Any, ids: list[list[int]] | torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.as_tensor(ids), use_cache=False, **options).logits


def padded(sequences: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), PAD)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        begin = longest - len(sequence) if left else 0
        ids[row, begin : begin + len(sequence)] = torch.tensor(sequence)
        mask[row, begin : begin + len(sequence)] = 1
    return ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions as generation gives them: counted from the first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def naive(model: Any, anatomy: Anatomy, mask: Mask) -> Iterator[None]:
    """The released code: whatever is at index 0 of the call, every call."""

    def at(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[:, 0, list(mask.dimensions[layer])] = 0
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        return hook

    handles = [
        model.get_submodule(anatomy.at(layer).attention).register_forward_pre_hook(
            at(layer), with_kwargs=True
        )
        for layer in mask.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooks_of(model: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


# --------------------------------------------------------------------------------------------
# One sequence
# --------------------------------------------------------------------------------------------


def test_the_first_token_alone(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]]
) -> None:
    """One plain sequence: masked where the released code masks it, and with an effect."""
    model, anatomy, mask = subject
    ids = [sequences[0]]
    base = forward(model, ids)
    with masked(model, anatomy, mask):
        first = forward(model, ids)
    with naive(model, anatomy, mask):
        released = forward(model, ids)
    with masked(model, anatomy, mask, "all"):
        every = forward(model, ids)
    assert torch.equal(first, released)
    assert (first - base).abs().max() > 1e-2
    assert (every - first).abs().max() > 1e-1


def test_what_attention_is_given(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]]
) -> None:
    """Zero in S at the first token of the target layers, and nowhere else touched."""
    model, anatomy, mask = subject
    seen: dict[int, torch.Tensor] = {}

    def spy(layer: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict) -> None:
            assert KEYWORD not in kwargs  # attention never sees it
            seen[layer] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def run() -> dict[int, torch.Tensor]:
        handles = [
            model.get_submodule(found.attention).register_forward_pre_hook(
                spy(found.layer), with_kwargs=True
            )
            for found in anatomy.inputs
            if found is not None
        ]
        forward(model, [sequences[0]])
        for handle in handles:
            handle.remove()
        return dict(seen)

    before = run()
    with masked(model, anatomy, mask):
        after = run()
    for layer in range(4):  # up to the first target layer, inputs are those of the base
        expected = before[layer].clone()
        if layer == 3:
            expected[:, 0, list(mask.dimensions[3])] = 0
        assert torch.equal(after[layer], expected)
    for layer in (4, 5):
        chosen = list(mask.dimensions[layer])
        assert not after[layer][0, 0, chosen].any()
        assert after[layer][0, 1:, chosen].all()


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]], strength: float
) -> None:
    model, anatomy, mask = subject
    weak = Mask(64, "weight", strength, mask.dimensions)
    base = forward(model, [sequences[0]])
    with masked(model, anatomy, weak):
        some = forward(model, [sequences[0]])
    with masked(model, anatomy, mask):
        full = forward(model, [sequences[0]])
    if strength == 0.0:
        assert torch.equal(some, base)
    else:
        assert not torch.equal(some, base)
        assert not torch.equal(some, full)


# --------------------------------------------------------------------------------------------
# Padding and packing
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("give_positions", [True, False])
def test_padded_batch_equals_single(
    subject: tuple[Any, Anatomy, Mask],
    sequences: list[list[int]],
    left: bool,
    give_positions: bool,
    family: str,
) -> None:
    if left and not give_positions and family == "gpt2":
        give_positions = True  # learned positions: without them the batch is another text
    model, anatomy, mask = subject
    ids, real = padded(sequences, left)
    options = {"position_ids": positions_of(real)} if give_positions else {}
    with masked(model, anatomy, mask):
        together = forward(model, ids, attention_mask=real, **options)
        alone = [forward(model, [sequence])[0] for sequence in sequences]
    with naive(model, anatomy, mask):
        released = forward(model, ids, attention_mask=real, **options)
    for row, single in enumerate(alone):
        chosen = real[row].bool()
        assert (together[row][chosen] - single).abs().max() <= 1e-4
        if left and not chosen[0]:  # there the released code masks a pad
            assert (released[row][chosen] - single).abs().max() > 1e-2


def test_packed_sequences(subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]]) -> None:
    """Several sequences in one row, told apart by positions that begin again at 0."""
    model, anatomy, mask = subject
    packed = [[token for sequence in sequences for token in sequence]]
    positions = torch.tensor([[place for sequence in sequences for place in range(len(sequence))]])
    with masked(model, anatomy, mask):
        together = forward(model, packed, position_ids=positions)[0]
        alone = torch.cat([forward(model, [sequence])[0] for sequence in sequences])
    with naive(model, anatomy, mask):
        released = forward(model, packed, position_ids=positions)[0]
    assert (together - alone).abs().max() <= 1e-4
    assert (released - alone).abs().max() > 1e-2


def test_embeddings_in_place_of_ids(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]]
) -> None:
    model, anatomy, mask = subject
    ids = torch.tensor([sequences[0]])
    with masked(model, anatomy, mask), torch.inference_mode():
        by_ids = forward(model, ids)
        embedded = model.get_input_embeddings()(ids)
        by_embeddings = model(inputs_embeds=embedded, use_cache=False).logits
    assert (by_ids - by_embeddings).abs().max() <= 1e-4


# --------------------------------------------------------------------------------------------
# Caches and generation
# --------------------------------------------------------------------------------------------


def generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, use_cache: bool
) -> tuple[list[list[int]], torch.Tensor]:
    """New tokens, and the logits they were chosen by. No token twice: random models stutter."""
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            use_cache=use_cache,
            no_repeat_ngram_size=1,
            suppress_tokens=[0, 1, 2],
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, ids.shape[1] :].tolist(), torch.stack(out.logits, 1)


def test_cached_generation_equals_uncached(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]]
) -> None:
    model, anatomy, mask = subject
    ids = torch.tensor([sequences[0]])
    ones = torch.ones_like(ids)
    with masked(model, anatomy, mask):
        cached, logits = generate(model, ids, ones, use_cache=True)
        uncached, expected = generate(model, ids, ones, use_cache=False)
    assert cached == uncached
    assert len(set(cached[0])) == 12
    assert (logits - expected).abs().max() <= 1e-4
    _, unmasked = generate(model, ids, ones, use_cache=True)
    with naive(model, anatomy, mask):
        _, released = generate(model, ids, ones, use_cache=True)
    assert (unmasked - expected).abs().max() > 1e-2
    assert (released - expected).abs().max() > 1e-2  # it masks every decoded token as well


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_generation_equals_single(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]], use_cache: bool
) -> None:
    model, anatomy, mask = subject
    ids, real = padded(sequences, left=True)
    with masked(model, anatomy, mask):
        together, logits = generate(model, ids, real, use_cache)
        for row, sequence in enumerate(sequences):
            ones = torch.ones(1, len(sequence), dtype=torch.long)
            alone, expected = generate(model, torch.tensor([sequence]), ones, use_cache)
            assert together[row] == alone[0]
            assert (logits[row] - expected[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("give_mask", [True, False])
def test_decoded_tokens_are_not_masked(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]], give_mask: bool
) -> None:
    """Token by token under a cache gives what one pass over the whole text gives."""
    model, anatomy, mask = subject
    ids = torch.tensor([sequences[0]])
    split = ids.shape[1] - 5

    def step_by_step() -> torch.Tensor:
        found, cache = [], None
        with torch.inference_mode():
            for begin, end in [(0, split), *((at, at + 1) for at in range(split, ids.shape[1]))]:
                options: dict[str, Any] = {}
                if give_mask:
                    options["attention_mask"] = torch.ones(1, end, dtype=torch.long)
                out = model(
                    input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, **options
                )
                cache = out.past_key_values
                found.append(out.logits)
        return torch.cat(found, 1)

    with masked(model, anatomy, mask):
        whole = forward(model, ids)
        steps = step_by_step()
    with naive(model, anatomy, mask):
        released = step_by_step()
    assert (steps - whole).abs().max() <= 1e-4
    assert (released[:, split:] - whole[:, split:]).abs().max() > 1e-2


def test_every_token_is_masked_under_a_cache_too(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]]
) -> None:
    model, anatomy, mask = subject
    ids = torch.tensor([sequences[0]])
    with masked(model, anatomy, mask, "all"), torch.inference_mode():
        whole = forward(model, ids)
        prefill = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=prefill.past_key_values).logits
    assert (last[:, 0] - whole[:, -1]).abs().max() <= 1e-4


# --------------------------------------------------------------------------------------------
# Leaving nothing behind
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_hooks_are_gone_afterwards(
    subject: tuple[Any, Anatomy, Mask], sequences: list[list[int]], tokens: str
) -> None:
    model, anatomy, mask = subject
    base, count = forward(model, [sequences[0]]), hooks_of(model)
    with masked(model, anatomy, mask, tokens):
        assert hooks_of(model) > count
        forward(model, [sequences[0]])
    assert hooks_of(model) == count
    with pytest.raises(ZeroDivisionError), masked(model, anatomy, mask, tokens):
        raise ZeroDivisionError
    assert hooks_of(model) == count
    assert torch.equal(forward(model, [sequences[0]]), base)


def test_layers_that_hand_no_keywords_on_are_masked_too(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, sequences: list[list[int]]
) -> None:
    """As they are in Falcon, Bloom, MPT and others; only recomputation cannot be masked there."""
    folder = tiny("llama", layer=2, layers=6)
    anatomy = describe(surgery.resolve(str(folder)))
    assert anatomy is not None
    model = load_model(folder)
    mask = Mask(64, "weight", 1.0, {3: (1, 2), 4: (3,)})
    with masked(model, anatomy, mask):
        expected = forward(model, [sequences[0]])
    layer = model.model.layers[4]
    forward_of_layer = layer.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(KEYWORD, None)
        return forward_of_layer(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", forgetful)
    with masked(model, anatomy, mask):
        assert torch.equal(forward(model, [sequences[0]]), expected)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.tensor([sequences[0]])
    with masked(model, anatomy, mask):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        with pytest.raises(Unsupported, match=r"Layer 4 runs again.*activation checkpointing"):
            loss.backward()


def test_without_a_forward_pass_nothing_is_claimed(subject: tuple[Any, Anatomy, Mask]) -> None:
    model, anatomy, mask = subject
    with masked(model, anatomy, mask):
        pass


# --------------------------------------------------------------------------------------------
# Where the first real token is
# --------------------------------------------------------------------------------------------


def cache(length: int) -> Any:
    return SimpleNamespace(get_seq_length=lambda: length)


@pytest.mark.parametrize(
    ("length", "options", "expected"),
    [
        (3, {}, [1, 0, 0]),
        (3, {"past_key_values": cache(0)}, [1, 0, 0]),
        (3, {"past_key_values": cache(4)}, [0, 0, 0]),
        (3, {"attention_mask": [1, 1, 1]}, [1, 0, 0]),
        (3, {"attention_mask": [0, 1, 1]}, [0, 1, 0]),
        (3, {"attention_mask": [0, 0, 1]}, [0, 0, 1]),
        (3, {"attention_mask": [1, 0, 0]}, [1, 0, 0]),
        (3, {"attention_mask": [0, 0, 0]}, [0, 0, 0]),
        # Under a cache the mask spans past and present.
        (1, {"attention_mask": [0, 1, 1, 1], "past_key_values": cache(3)}, [0]),
        (2, {"attention_mask": [0, 0, 0, 1], "past_key_values": cache(2)}, [0, 1]),
        # The mask is asked before the positions, the positions before the cache.
        (3, {"attention_mask": [0, 1, 1], "position_ids": [0, 0, 1]}, [0, 1, 0]),
        (4, {"position_ids": [0, 1, 0, 1]}, [1, 0, 1, 0]),
        (1, {"position_ids": [7]}, [0]),
        (2, {"position_ids": [5, 6], "past_key_values": cache(0)}, [0, 0]),
    ],
)
def test_first_real_token(length: int, options: dict[str, Any], expected: list[int]) -> None:
    options = {
        name: torch.tensor([value]) if isinstance(value, list) else value
        for name, value in options.items()
    }
    ids = torch.zeros(1, length, dtype=torch.long)
    for args, kwargs in (((), {"input_ids": ids}), ((ids,), {})):
        found = first_real_token(args, {**kwargs, **options})
        assert found.dtype == torch.bool
        assert found.tolist() == [[bool(value) for value in expected]]


def test_first_real_token_of_a_batch() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = first_real_token((), {"input_ids": ids, "attention_mask": mask})
    assert found.tolist() == [[False, True, False], [True, False, False]]
    shared = first_real_token((), {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2]])})
    assert shared.tolist() == [[True, False, False]] * 2


def test_a_prepared_four_dimensional_mask_is_passed_over() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    found = first_real_token((), {"input_ids": ids, "attention_mask": torch.zeros(1, 1, 2, 2)})
    assert found.tolist() == [[True, False]]
