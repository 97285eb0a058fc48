"""The paper's measurements against loops that copy its formulas, and against running models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import build, decoder_layers

import surgery
from surgery.errors import BadSettings
from surgery.measure import attention, feed_forward, traces
from surgery.method import evidence
from surgery.models.anatomy import Anatomy

torch.set_num_threads(1)


@pytest.fixture
def states():
    """Five tokens of twelve dimensions, the first one concentrated."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    found[0, 3] *= 40
    return found


@pytest.fixture
def gain():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, generator=generator, dtype=torch.float64)


def fraction_loop(token, gain, count):
    """Frac_t = E_t^K / E_t (§3.1)."""
    order = sorted(range(len(gain)), key=lambda i: -abs(float(gain[i])))
    total = sum(float(value) ** 2 for value in token)
    inside = sum(float(token[i]) ** 2 for i in order[:count])
    return inside / total


def divergence_loop(token, gain):
    """KL(p_t ‖ g) (§3.1, eq. 2)."""
    energy = sum(float(value) ** 2 for value in token)
    gains = sum(float(value) ** 2 for value in gain)
    total = 0.0
    for value, factor in zip(token, gain, strict=True):
        p, g = float(value) ** 2 / energy, float(factor) ** 2 / gains
        total += p * math.log(p / g) if p else 0.0
    return total


def concentration_loop(token):
    """C_t (§3.1, eq. 3)."""
    energy = sum(float(value) ** 2 for value in token)
    return sum((float(value) ** 2 / energy) ** 2 for value in token)


def delta_loop(values):
    """The first token less the mean of the others (eq. 1 and 2)."""
    return values[0] - sum(values[1:]) / (len(values) - 1)


def test_delta_fraction(states, gain):
    found = evidence.top_gain_fraction(states, gain, 0.25)
    expected = [fraction_loop(token, gain, 3) for token in states]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    delta = evidence.sink_minus_others(found[None], 0)
    np.testing.assert_allclose(delta, [delta_loop(expected)], rtol=1e-12)


def test_top_gains_are_by_magnitude_and_must_be_some():
    gain = torch.tensor([0.1, -9.0, 1.0, 0.2])
    states = torch.tensor([[0.0, 5.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]])
    np.testing.assert_allclose(evidence.top_gain_fraction(states, gain, 0.3), [1.0, 16 / 25])
    with pytest.raises(BadSettings):
        evidence.top_gain_fraction(states, gain, 0.1)


def test_delta_kl(states, gain):
    found = evidence.gain_divergence(states, gain)
    expected = [divergence_loop(token, gain) for token in states]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(
        evidence.sink_minus_others(found, 0), delta_loop(expected), rtol=1e-12
    )


def test_divergence_is_zero_for_the_gains_themselves_and_takes_zeros(gain):
    assert evidence.gain_divergence(gain[None], gain).item() == pytest.approx(0, abs=1e-12)
    half = gain.clone()
    half[6:] = 0  # 0 · log 0 counts as 0
    assert np.isfinite(evidence.gain_divergence(half[None], gain)).all()


def test_concentration(states):
    found = evidence.concentration(states)
    np.testing.assert_allclose(found, [concentration_loop(token) for token in states], rtol=1e-12)
    assert evidence.concentration(torch.ones(1, 8)).item() == pytest.approx(1 / 8)
    assert evidence.concentration(torch.eye(8)[:1]).item() == 1


def test_norms_and_amplification(states):
    expected = [math.sqrt(sum(float(value) ** 2 for value in token)) for token in states]
    np.testing.assert_allclose(evidence.token_norms(states), expected, rtol=1e-12)
    np.testing.assert_allclose(evidence.amplification(states, 7 * states), [7] * 5, rtol=1e-12)


def test_half_precision_is_widened_before_squaring():
    states = torch.full((1, 4), 60_000.0, dtype=torch.float16)  # the square overflows float16
    assert evidence.token_norms(states).item() == pytest.approx(120_000, rel=1e-3)
    assert evidence.concentration(states).item() == pytest.approx(0.25)


def test_sink_minus_others_anywhere_and_alone():
    values = np.array([[1.0, 5.0, 3.0], [2.0, 2.0, 8.0]])
    np.testing.assert_allclose(evidence.sink_minus_others(values, 1), [3.0, -3.0])
    assert np.isnan(evidence.sink_minus_others(values[:, :1], 0)).all()


def test_magnification():
    norms = np.array([[2.0, 1.0], [4.0, 1.0], [400.0, 1.0]])
    np.testing.assert_allclose(evidence.magnification(norms, 0), [2.0, 100.0])


def test_cosines():
    states = np.random.default_rng(0).normal(size=(4, 6))
    found = evidence.cosines(states)
    for i, one in enumerate(states):
        for j, other in enumerate(states):
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
            assert found[i, j] == pytest.approx(dot / lengths)
    pairs = [found[i, j] for i in range(4) for j in range(4) if i < j]
    np.testing.assert_allclose(evidence.pairwise(found), pairs)


def causal_weights(heads=2, tokens=5):
    scores = np.random.default_rng(1).normal(size=(heads, tokens, tokens))
    weights = np.where(np.tril(np.ones((tokens, tokens), dtype=bool)), np.exp(scores), 0)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("sink", [0, 2])
def test_attention_to_sink_and_entropy(sink):
    weights = causal_weights()
    shares, entropies = [], []
    for head in weights:
        later = range(sink + 1, len(head))
        shares.append(sum(head[query][sink] for query in later) / len(later))
        total = 0.0
        for query in later:
            total += -sum(w * math.log(w) for w in head[query] if w > 0)
        entropies.append(total / len(later))
    np.testing.assert_allclose(evidence.attention_to_sink(weights, sink), shares)
    np.testing.assert_allclose(evidence.attention_entropy(weights, sink), entropies)


def test_attention_without_later_tokens():
    assert np.isnan(evidence.attention_to_sink(causal_weights(), 4)).all()
    assert np.isnan(evidence.attention_entropy(causal_weights(), 4)).all()


def test_mask_numbers():
    x = np.array([3.0, 4.0, 0.0, 12.0])
    chosen = (0, 3)
    assert evidence.masked_share(x, chosen) == pytest.approx((9 + 144) / 169)
    after = np.array([0.0, 4.0, 0.0, 0.0])
    assert evidence.cosine(x, after) == pytest.approx(4 / 13)
    # Cosine and share say the same for a mask of full strength.
    assert evidence.cosine(x, after) ** 2 == pytest.approx(1 - evidence.masked_share(x, chosen))
    assert evidence.relative_change(x, after) == pytest.approx(math.sqrt(9 + 144) / 13)
    np.testing.assert_allclose(
        evidence.remaining(np.array([1.0, 5.0]), np.array([2.0, 5.0])), [0.5, 1.0]
    )


# --------------------------------------------------------------------------------------------
# Gathered from running models
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tiny):
    return surgery.analyze(str(tiny("qwen3")), evidence=True)


@pytest.fixture(scope="module")
def by_hand(planted):
    """The first prompt's forward pass, recorded with plain hooks."""
    from surgery.models.loading import load_model

    model = load_model(planted.checkpoint.folder)
    tokens = torch.tensor([planted.evidence.traces[0].prompt.tokens])
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda _module, _args, result: seen.update({name: result[0].detach()})

    layer = decoder_layers(model)[3]
    handles = [
        layer.post_attention_layernorm.register_forward_hook(keep("norm")),
        layer.mlp.register_forward_hook(keep("ffn")),
        layer.mlp.gate_proj.register_forward_hook(keep("gate")),
        layer.mlp.down_proj.register_forward_hook(keep("down")),
    ]
    with torch.inference_mode():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    seen["gain"] = layer.post_attention_layernorm.weight.detach()
    return model, tokens, seen


def test_gathered_norms_and_gains(planted, by_hand):
    _, tokens, seen = by_hand
    trace = planted.evidence.traces[0]
    length = tokens.shape[1]
    assert trace.sink == 0
    for name, expected in (
        ("weight_norm", seen["norm"].norm(dim=-1)),
        ("ffn_output", seen["ffn"].norm(dim=-1)),
        ("amplification", seen["ffn"].norm(dim=-1) / seen["norm"].norm(dim=-1)),
    ):
        found = getattr(trace, name)
        assert found.shape == (8, length)
        np.testing.assert_allclose(found[3], expected.numpy(), rtol=1e-4)
    # 10 % of 64 dimensions: K is 6.
    expected = [fraction_loop(token, seen["gain"], 6) for token in seen["norm"]]
    np.testing.assert_allclose(trace.fraction[3], expected, rtol=1e-4)
    expected = [divergence_loop(token, seen["gain"]) for token in seen["norm"]]
    np.testing.assert_allclose(trace.divergence[3], expected, rtol=1e-4)
    for name in ("gate", "down"):
        expected = [concentration_loop(token) for token in seen[name]]
        np.testing.assert_allclose(getattr(trace, name)[3], expected, rtol=1e-3)


def test_the_planted_layer_stands_out(planted):
    rows, found = planted.evidence.rows, planted.evidence
    assert planted.emergence.layer == 3
    for name in ("magnification", "ffn_sink", "amplification", "down"):
        values = [getattr(row, name) for row in rows]
        assert int(np.argmax(values)) == 3, name
    for row, known in zip(rows, planted.emergence.rows, strict=True):
        assert row.sink == pytest.approx(known.sink_output, rel=1e-4)
        assert row.magnification == pytest.approx(known.magnification, rel=1e-4)
        assert row.others == pytest.approx(known.others, rel=1e-4)
    assert [part.norm for part in found.feed_forwards] == ["post_attention_layernorm"] * 8
    assert any("same tokens up to the sink" in note for note in found.notes)


def test_knockouts(planted):
    without_ffn, without_norm = planted.evidence.knockouts
    assert (without_ffn.part, without_norm.part) == ("ffn", "norm")
    assert without_ffn.emergence is None
    assert without_ffn.remaining[3] < 0.1
    np.testing.assert_allclose(without_ffn.remaining[:3], 1, rtol=1e-4)
    assert without_norm.emergence == 3


def test_attention(planted, by_hand):
    model, _, _ = by_hand
    found = planted.evidence.attention
    prompts = [
        trace.prompt.tokens[: attention.ATTENTION_TOKENS] for trace in planted.evidence.traces
    ]
    model.set_attn_implementation("eager")
    total = np.zeros((8, 4))
    for tokens in prompts:
        with torch.inference_mode():
            result = model(input_ids=torch.tensor([tokens]), output_attentions=True)
        for layer, weights in enumerate(result.attentions):
            for head in range(4):
                rows = weights[0, head, 1:, 0]
                total[layer, head] += sum(float(row) for row in rows) / len(rows)
    np.testing.assert_allclose(found.to_sink, total / len(prompts), rtol=1e-4)
    assert list(found.heatmaps) == ["ME Layer 3", "layer 4", "layer 4, masked"]
    for weights in found.heatmaps.values():
        assert weights.shape == (attention.HEATMAP_TOKENS,) * 2
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-4)


def test_mask_effect(planted, by_hand):
    model, tokens, _ = by_hand
    found = planted.evidence.mask
    assert found.layer == 4
    assert len(found.dimensions) == 6
    layer = decoder_layers(model)[4]
    seen = []
    handle = layer.input_layernorm.register_forward_hook(
        lambda _module, _args, result: seen.append(result[0, 0].detach())
    )
    with torch.inference_mode():
        model(input_ids=tokens)
    handle.remove()
    before = seen[0]
    after = before.clone()
    after[list(found.dimensions)] = 0
    np.testing.assert_allclose(found.inputs, before.abs().numpy(), rtol=1e-3, atol=1e-6)
    assert found.cosine == pytest.approx(evidence.cosine(before.numpy(), after.numpy()), rel=1e-5)
    value = layer.self_attn.v_proj.weight.detach()
    change = evidence.relative_change((value @ before).numpy(), (value @ after).numpy())
    assert found.value == pytest.approx(change, rel=1e-2)
    # Rotation at position 0 is the identity, and a norm of the key does not see its scale.
    key, normed = layer.self_attn.k_proj.weight.detach(), layer.self_attn.k_norm
    keys = [normed((key @ x).view(2, 16)).detach().reshape(-1).numpy() for x in (before, after)]
    assert found.key == pytest.approx(evidence.relative_change(*keys), rel=1e-2)


def test_attention_implementation_is_restored(planted, by_hand):
    model, *_ = by_hand
    model.set_attn_implementation("sdpa")
    seen = []

    def fail() -> None:
        with attention.eager_attention(model):
            seen.append(model.config._attn_implementation)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert seen == ["eager"]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "norm", "shared", "post", "roles", "note"),
    [
        ("qwen3_moe", "post_attention_layernorm", False, None, [], "mixture of experts"),
        ("phi3", "post_attention_layernorm", False, None, ["gate", "up", "down"], ""),
        (
            "gemma2",
            "pre_feedforward_layernorm",
            False,
            "post_feedforward_layernorm",
            ["gate", "up", "down"],
            "Another norm follows",
        ),
        ("gpt2", "ln_2", False, None, ["up", "down"], "no gate"),
        ("cohere", "input_layernorm", True, None, ["gate", "up", "down"], "same norm"),
        (
            "olmo2",
            None,
            False,
            "post_feedforward_layernorm",
            ["gate", "up", "down"],
            "No norm stands directly before",
        ),
    ],
)
def test_parts_of_other_families(family, norm, shared, post, roles, note):
    model, _ = build(family, layers=3, layer=1)
    prefix = "transformer.h" if family == "gpt2" else "model.layers"
    inputs = [None] * 3
    if shared:
        from surgery.models.anatomy import AttentionInput

        inputs = [
            AttentionInput(i, f"{prefix}.{i}.{norm}", f"{prefix}.{i}.self_attn", (), "", None, ())
            for i in range(3)
        ]
    anatomy = Anatomy(family, 64, prefix, tuple(inputs), 0.0, 1, "", "table")
    parts = feed_forward.feed_forwards(model, anatomy, [0, 5, 6, 7])
    for part in parts:
        assert part.module == "mlp"
        assert (part.norm, part.shared, part.post_norm) == (norm, shared, post)
        assert list(part.projections) == roles
    notes = feed_forward.describe_parts(parts)
    assert any(note in words for words in notes) if note else not notes


def test_halves_of_a_fused_projection():
    """Phi-3 writes gate and up into one output, gate first."""
    model, _ = build("phi3", layers=3, layer=1)
    anatomy = Anatomy("phi3", 64, "model.layers", (None,) * 3, 0.0, 1, "", "table")
    parts = feed_forward.feed_forwards(model, anatomy, [0, 5, 6, 7])
    recorder = traces._Recorder(model, anatomy, parts, 0.1)
    fused: list[torch.Tensor] = []
    linear = decoder_layers(model)[1].mlp.gate_up_proj
    recorder.handles.append(linear.register_forward_hook(lambda *args: fused.append(args[2][0])))
    recorder.begin(4, 0)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[0, 5, 6, 7]]))
    for handle in recorder.handles:
        handle.remove()
    gate, up = fused[0][:, :96], fused[0][:, 96:]
    for role, states in (("gate", gate), ("up", up)):
        expected = [concentration_loop(token) for token in states]
        np.testing.assert_allclose(recorder.arrays[role][1], expected, rtol=1e-4)


def test_unit_offset_gain():
    """Gemma's norms multiply by 1 + weight."""
    model, _ = build("gemma", layers=3, layer=1)
    norm = decoder_layers(model)[0].post_attention_layernorm
    gain = traces.effective_gain(norm, -1.0)
    x = torch.ones(1, 64)
    torch.testing.assert_close(norm(x)[0].detach(), gain, rtol=1e-4, atol=1e-4)
    assert traces.effective_gain(torch.nn.LayerNorm(4, elementwise_affine=False), 0.0) is None


def test_no_emergence(tiny):
    found = surgery.analyze(str(tiny("llama", planted=False, layers=4)), evidence=True)
    assert found.emergence.layer is None
    assert found.evidence.knockouts == ()
    assert found.evidence.mask is None
    assert found.evidence.attention.heatmaps == {}
    assert len(found.evidence.rows) == 4


def test_without_asking_there_is_no_evidence(tiny):
    assert surgery.analyze(str(tiny("llama", layers=4, layer=1))).evidence is None
