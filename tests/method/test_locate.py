"""The Massive Emergence Layer from norms: measured curves, and models where it is planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import rest_in_full
from tiny_models import FAMILIES, ROWS

import surgery
from surgery import errors
from surgery.errors import NoEmergence, SurgeryError, Unsupported
from surgery.method.locate import agree, others_median, vote

Tiny = Callable[..., Path]

# What a sink token's output norm did in real models.
SMOLLM2 = [
    *(67, 229, 746, 743, 738, 731, 724, 712, 600, 167, 150),  # a first rise that does not last
    23911,  # layer 11
    *(23920, 23930, 23940, 23950, 23960, 23970, 23980, 23990, 24000, 24010, 24020),
    *(24030, 24040, 24050, 24060, 24070),
    *(9000, 700),  # the last two layers, where it falls
]
GEMMA = [2988, 6600, 7000, 9000, 14000, 20000, 26000, 31000, 40000, 48000, 55000, 63000, 70000]
GEMMA += [80000, 90000, 98000, 104000, 30000]


def prompt(
    sink: list[float],
    embedding: float,
    others: list[float] | float,
    *,
    tokens: int = 20,
    position: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Norms [layers + 1, tokens] with this sink curve; the other tokens scatter by a tenth."""
    rows = np.empty((len(sink) + 1, tokens))
    scatter = 1 + 0.1 * np.random.default_rng(seed).uniform(-1, 1, size=rows.shape)
    rows[1:] = np.reshape(others, (-1, 1))
    rows[0] = embedding
    rows *= scatter
    rows[0, position] = embedding
    rows[1:, position] = sink
    return rows


def smollm2(**options: int) -> np.ndarray:
    others = list(np.linspace(40, 400, len(SMOLLM2)))
    return prompt(SMOLLM2, 4.0, others, **options)


def gemma(**options: int) -> np.ndarray:
    return prompt(GEMMA, 26.1, list(np.linspace(93, 1200, len(GEMMA))), **options)


def flat(**options: int) -> np.ndarray:
    """A model in which all tokens grow alike."""
    curve = list(10 * 1.1 ** np.arange(16))
    return prompt(curve, 9.0, curve, **options)


@pytest.mark.parametrize("tokens", [8, 30, 1000])
def test_smollm2(tokens: int) -> None:
    found = vote(smollm2(tokens=tokens))
    assert found.layer == 11
    assert found.position == 0
    assert found.tokens == tokens
    assert found.magnification == pytest.approx(23911 / 150)
    assert found.runner_up < 1.1
    assert found.massive_positions == (0,)


def test_the_first_rise_of_smollm2_does_not_last() -> None:
    """Without what follows it would count."""
    norms = smollm2()
    norms[9:12, 0] = 700
    norms[12:, 0] = 760
    assert vote(norms).layer != 11


@pytest.mark.parametrize("tokens", [8, 1000])
def test_gemma(tokens: int) -> None:
    found = vote(gemma(tokens=tokens))
    assert found.layer == 0
    assert found.magnification == pytest.approx(2988 / 26.1)
    assert found.runner_up == pytest.approx(6600 / 2988)


@pytest.mark.parametrize("layer", [14, 15])
def test_a_second_event_in_the_last_two_layers_never_counts(layer: int) -> None:
    alone = flat()
    alone[layer + 1 :, 0] *= 5000
    assert vote(alone).layer is None
    both = flat()
    both[5:, 0] *= 200
    both[layer + 1 :, 0] *= 5000
    assert vote(both).layer == 4


def test_the_layer_before_the_last_two_counts() -> None:
    norms = flat()
    norms[14:, 0] *= 200
    assert vote(norms).layer == 13


@pytest.mark.parametrize("position", [1, 7, 19])
def test_a_sink_elsewhere(position: int) -> None:
    found = vote(smollm2(position=position))
    assert (found.layer, found.position) == (11, position)
    assert found.massive_positions == (position,)


def test_two_sinks() -> None:
    """A delimiter that becomes massive at the same layer, and a little less so."""
    norms = smollm2()
    norms[12:, 9] = 0.7 * norms[12:, 0]
    found = vote(norms)
    assert (found.layer, found.position) == (11, 0)
    assert found.massive_positions == (0, 9)


def test_padding_is_not_looked_at() -> None:
    """On the left, on the right, and whatever its norms are."""
    clean = vote(smollm2(tokens=20))
    for before, after in ((5, 0), (0, 5), (3, 9)):
        norms = np.pad(smollm2(tokens=20), ((0, 0), (before, after)), constant_values=1e9)
        valid = np.zeros(norms.shape[1], dtype=bool)
        valid[before : before + 20] = True
        found = vote(norms, valid)
        assert (found.layer, found.magnification) == (clean.layer, clean.magnification)
        assert found.position == before
        assert found.massive_positions == (before,)
        assert found.tokens == 20
        assert agree([norms], [valid]).rows == agree([smollm2(tokens=20)]).rows


def test_no_massive_activation() -> None:
    emergence = agree([flat(seed=seed) for seed in range(6)])
    assert emergence.layer is None
    assert emergence.confidence == "none"
    assert emergence.counts == {None: 6}
    with pytest.raises(NoEmergence, match=r"no Massive Emergence Layer found.*--layer") as refused:
        emergence.require()
    assert refused.value.exit_code == 3


def test_exit_codes_are_distinct() -> None:
    codes = [
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, SurgeryError)
    ]
    assert len(codes) == len(set(codes)) == 7
    assert 0 not in codes


def test_slow_growth_is_not_emergence() -> None:
    """×1.8 per layer ends at ×2800, and no layer did it."""
    sink = list(10 * 1.8 ** np.arange(1, 17))
    norms = prompt(sink, 10.0, 12.0)
    assert norms[-1, 0] / norms[0, 0] > 2000
    assert vote(norms).layer is None
    assert agree([norms]).layer is None


def test_an_outlier_embedding_is_not_emergence() -> None:
    """Large from the start, and no layer did that either."""
    norms = flat()
    norms[:, 0] = 5000
    assert vote(norms).layer is None


def test_a_passing_spike_is_not_emergence() -> None:
    norms = flat()
    norms[5, 0] *= 500
    assert vote(norms).layer is None


def test_prompts_that_disagree() -> None:
    def at(layer: int, seed: int) -> np.ndarray:
        norms = flat(seed=seed)
        norms[layer + 1 :, 0] *= 300
        return norms

    split = agree([at(3, 0), at(3, 1), at(5, 2), at(5, 3), at(7, 4)])
    assert split.layer is None
    assert split.agreement == pytest.approx(0.4)
    with pytest.raises(NoEmergence) as refused:
        split.require()
    for part in ("layer 3: 2", "layer 5: 2", "layer 7: 1"):
        assert part in str(refused.value)

    most = agree([at(3, 0), at(3, 1), at(3, 2), at(5, 3), at(7, 4)])
    assert most.require() == 3
    assert most.agreement == pytest.approx(0.6)
    assert most.confidence == "low"

    everyone = agree([at(3, seed) for seed in range(5)])
    assert (everyone.layer, everyone.confidence) == (3, "high")


def test_a_majority_without_emergence_wins_too() -> None:
    norms = flat()
    norms[4:, 0] *= 300
    assert agree([flat(seed=1), flat(seed=2), norms]).layer is None


@given(
    depth=st.integers(4, 40),
    tokens=st.integers(8, 60),
    jump=st.floats(20, 2000),
    growth=st.floats(0.99, 1.15),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_planted_curve_is_found(
    depth: int, tokens: int, jump: float, growth: float, seed: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, depth - 3))
    position = data.draw(st.integers(0, tokens - 1))
    generator = np.random.default_rng(seed)
    norms = 10 * growth ** np.arange(depth + 1)[:, None] * generator.uniform(0.8, 1.25, tokens)
    norms[layer + 1 :, position] *= jump
    found = vote(norms)
    assert (found.layer, found.position) == (layer, position)
    assert found.magnification == pytest.approx(jump * growth)
    # Units do not matter, nor the order of the other tokens.
    assert vote(norms * 1e-3).layer == layer
    order = generator.permutation(tokens)
    shuffled = vote(norms[:, order])
    assert (shuffled.layer, order[shuffled.position]) == (layer, position)


@given(
    depth=st.integers(3, 30),
    tokens=st.integers(8, 40),
    growth=st.floats(0.9, 1.3),
    seed=st.integers(0, 2**32),
)
def test_tokens_of_one_kind_are_never_an_emergence(
    depth: int, tokens: int, growth: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    norms = 10 * growth ** np.arange(depth + 1)[:, None]
    norms = norms * generator.uniform(0.5, 2, size=(depth + 1, tokens))
    assert vote(norms).layer is None


def test_the_table() -> None:
    emergence = agree([smollm2(seed=seed) for seed in range(3)])
    assert [row.layer for row in emergence.rows] == list(range(30))
    row = emergence.rows[11]
    assert row.sink_input == 150
    assert row.sink_output == 23911
    assert row.magnification == pytest.approx(23911 / 150)
    assert row.ratio == pytest.approx(row.sink_output / row.others)
    assert 0.8 < row.others / np.linspace(40, 400, 30)[11] < 1.2
    assert emergence.sink_positions == {0: 3}
    assert emergence.as_dict()["rows"][11]["sink_output"] == 23911


def test_others_median() -> None:
    norms = np.array([[9.0, 1, 2, 3], [9, 4, 5, 6]])
    assert others_median(norms, 0).tolist() == [2, 5]
    assert others_median(norms[:, :1], 0).tolist() == [0, 0]


# --------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three prompts, the longest of about a hundred tokens."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        '{"text": "The harbour was quiet before dawn, and the boats lay along the quay."}',
        '{"messages": [{"role": "user", "content": "What is 12 + 365, and why is it so?"}]}',
        '{"text": "%s"}' % ("An old keeper walked up the stairs, counting each step. " * 6),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("layer", [0, 2, 5])
@pytest.mark.parametrize("family", rest_in_full(FAMILIES, ROWS))
def test_planted_layer_is_found(family: str, layer: int, tiny: Tiny, short_prompts: str) -> None:
    folder = str(tiny(family, layer=layer))
    if family == "olmo2":
        with pytest.raises(Unsupported, match="no normed attention input"):
            surgery.analyze(folder, calibration=short_prompts)
        return
    found = surgery.analyze(folder, calibration=short_prompts).emergence
    assert found.require() == layer
    assert found.confidence == "high"
    assert found.magnification > 100
    assert found.runner_up < 3
    assert found.sink_positions == {0: 3}
    assert found.found_by == "search"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_nothing_planted_nothing_found(family: str, tiny: Tiny, short_prompts: str) -> None:
    found = surgery.analyze(str(tiny(family, planted=False)), calibration=short_prompts)
    assert found.emergence.layer is None
    assert found.targets("first") == found.targets("all") == ()


def test_bundled_prompts(tiny: Tiny) -> None:
    """From about ten to over a thousand tokens, as in the paper's Appendix D."""
    analysis = surgery.analyze(str(tiny("qwen3", layer=4)))
    lengths = [vote.tokens for vote in analysis.emergence.votes]
    assert analysis.emergence.layer == 4
    assert len(lengths) >= 6
    assert min(lengths) < 40
    assert max(lengths) > 1000
    assert analysis.targets("first") == (5,)
    assert analysis.targets("all") == (5, 6, 7)


def test_bfloat16_analysis(tiny: Tiny, short_prompts: str) -> None:
    folder = str(tiny("llama", layer=2))
    found = surgery.analyze(folder, calibration=short_prompts, dtype="bfloat16").emergence
    assert found.layer == 2
