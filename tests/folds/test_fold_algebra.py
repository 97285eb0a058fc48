"""The folds as algebra: edited weights against the mask written out in numpy."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import BadSettings, Unsupported
from surgery.files import dtypes
from surgery.folds import edits as fold
from surgery.folds.edits import Bias, Columns, Edit, Gain, RankOne, SinkDirection, pack, unpack
from surgery.folds.registry import make_edits
from surgery.method.algebra import detector
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy, AttentionInput

FORMATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]
formats = pytest.mark.parametrize("dtype", FORMATS)


def anatomy_of(
    width: int, *, bias: bool = False, null: float = 0.0, axis: int = 1, refusal: str = ""
) -> Anatomy:
    found = AttentionInput(
        layer=0,
        norm="layers.0.norm",
        attention="layers.0.attn",
        readers=("layers.0.attn.q", "layers.0.attn.k"),
        gain="g",
        bias="b" if bias else None,
        weights=("q", "k"),
    )
    return Anatomy("test", width, "layers", (found,), null, axis, refusal, "table")


def edit_all(edits: tuple[Edit, ...], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors after the edits, in float64 throughout."""
    changed = {edit.tensor: edit.apply(tensors[edit.tensor], "F64") for edit in edits}
    assert len(changed) == len(edits)
    return {**tensors, **changed}


def rms_norm(h: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6) * gain


def layer_norm(h: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = h - h.mean(-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-5) * gain + bias


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.random.Generator, int, tuple[int, ...], float]:
    """A source of random tensors, a width D, a mask set S and a strength γ > 0."""
    width = draw(st.integers(2, 24))
    chosen = draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1))
    strength = draw(st.sampled_from([1.0, 1.0, 0.5, 0.3, 0.125]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return generator, width, tuple(sorted(chosen)), strength


NORMS = ["rms", "rms, 1 + w", "layer norm"]


def model(kind: str, generator: np.random.Generator, width: int) -> dict[str, np.ndarray]:
    """A norm and two linears [out, D], as stored."""
    tensors = {
        "g": generator.normal(size=width),
        "q": generator.normal(size=(7, width)),
        "k": generator.normal(size=(3, width)),
    }
    if kind == "layer norm":
        tensors["b"] = generator.normal(size=width)
    return tensors


def attention_input(kind: str, tensors: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    if kind == "layer norm":
        return layer_norm(h, tensors["g"], tensors["b"])
    return rms_norm(h, tensors["g"] + (1.0 if "1 + w" in kind else 0.0))


@pytest.mark.parametrize("kind", NORMS)
@given(case=cases())
def test_norm_equals_qkv_equals_mask(
    kind: str, case: tuple[np.random.Generator, int, tuple[int, ...], float]
) -> None:
    generator, width, chosen, strength = case
    tensors = model(kind, generator, width)
    h = generator.normal(size=(5, width)) * 10.0 ** generator.integers(-2, 4)
    anatomy = anatomy_of(width, bias="b" in tensors, null=-1.0 if "1 + w" in kind else 0.0)
    mask = Mask(width, "weight", strength, {0: chosen})

    x = attention_input(kind, tensors, h)
    masked = x.copy()
    masked[:, list(chosen)] *= 1.0 - strength
    by_norm = edit_all(make_edits(anatomy, mask, "norm"), tensors)
    by_qkv = edit_all(make_edits(anatomy, mask, "qkv"), tensors)

    close = {"rtol": 1e-9, "atol": 1e-9 * np.abs(x).max()}
    np.testing.assert_allclose(attention_input(kind, by_norm, h), masked, **close)
    for name in ("q", "k"):
        expected = masked @ tensors[name].T
        np.testing.assert_allclose(
            attention_input(kind, by_norm, h) @ by_norm[name].T, expected, **close
        )
        np.testing.assert_allclose(x @ by_qkv[name].T, expected, **close)
    if strength == 1.0:
        assert not attention_input(kind, by_norm, h)[:, list(chosen)].any()  # zero, not nearly
        assert not by_qkv["q"][:, list(chosen)].any()
    # And each leaves alone what is not its own.
    assert all(by_norm[name] is tensors[name] for name in ("q", "k"))
    assert by_qkv["g"] is tensors["g"]


def test_a_sink_fold_without_its_directions_is_refused() -> None:
    """Every target layer needs one, of this mask; never zeroed rows, nor a traceback."""
    anatomy, mask = anatomy_of(8), Mask(8, "weight", 1.0, {0: (1, 2)})
    sink = SinkDirection(np.ones(2, np.float32), np.ones(8, np.float32))
    assert [type(edit) for edit in make_edits(anatomy, mask, "sink", {0: sink})] == [RankOne] * 2
    for sinks in (None, {}, {1: sink}):
        with pytest.raises(BadSettings, match="has none of layer 0"):
            make_edits(anatomy, mask, "sink", sinks)
    for center, detector_ in ((3, 8), (2, 7)):
        other = SinkDirection(np.ones(center, np.float32), np.ones(detector_, np.float32))
        with pytest.raises(BadSettings, match="of another mask"):
            make_edits(anatomy, mask, "sink", {0: other})


@given(case=cases())
def test_only_the_mask_set_changes(
    case: tuple[np.random.Generator, int, tuple[int, ...], float],
) -> None:
    generator, width, chosen, strength = case
    others = [d for d in range(width) if d not in chosen]
    weight, gain = generator.normal(size=(6, width)), generator.normal(size=width)
    columns = Columns("q", 0, chosen, strength).apply(weight, "F64")
    entries = Gain("g", 0, chosen, strength).apply(gain, "F64")
    assert (columns[:, others] == weight[:, others]).all()
    assert (entries[others] == gain[others]).all()
    assert (columns[:, list(chosen)] != weight[:, list(chosen)]).all()
    np.testing.assert_allclose(columns[:, list(chosen)], weight[:, list(chosen)] * (1 - strength))


@formats
@given(case=cases())
def test_zeroing_is_idempotent(
    dtype: str, case: tuple[np.random.Generator, int, tuple[int, ...], float]
) -> None:
    generator, width, chosen, _ = case
    weight = dtypes.round_once(generator.normal(size=(6, width)), dtype)
    for edit, stored in (
        (Columns("q", 0, chosen, 1.0), weight),
        (Columns("q", 0, chosen, 1.0, axis=0), np.ascontiguousarray(weight.T)),
        (Gain("g", 0, chosen, 1.0), weight[0]),
        (Gain("g", 0, chosen, 1.0, null=-1.0), weight[0]),
    ):
        once = edit.apply(stored, dtype)
        assert once.tobytes() != stored.tobytes()
        assert edit.apply(once, dtype).tobytes() == once.tobytes()


@formats
def test_no_negative_zero(dtype: str) -> None:
    """Zero is one bit pattern, whatever was there before."""
    stored = dtypes.round_once(-np.abs(np.linspace(-3, 3, 24)).reshape(4, 6) - 0.5, dtype)
    stored[0, 0] = -0.0
    chosen = (0, 2, 5)
    columns = Columns("q", 0, chosen, 1.0).apply(stored, dtype)
    rows = Columns("q", 0, (0, 3), 1.0, axis=0).apply(stored, dtype)
    gain = Gain("g", 0, chosen, 1.0).apply(stored[0], dtype)
    bias = Bias("b", 0, chosen, 1.0).apply(stored[0], dtype)
    for zeroed in (columns[:, chosen], rows[[0, 3]], gain[list(chosen)], bias[list(chosen)]):
        assert set(np.ascontiguousarray(zeroed).tobytes()) == {0}


@formats
@given(values=st.lists(st.floats(-400, 400, width=16), min_size=3, max_size=12))
def test_unit_offset_null_is_exactly_minus_one(dtype: str, values: list[float]) -> None:
    stored = dtypes.round_once(np.array(values), dtype)
    edited = Gain("g", 0, (0, 2), 1.0, null=-1.0).apply(stored, dtype).astype(np.float64)
    assert edited[0] == edited[2] == -1.0
    assert edited[1] == float(stored[1])


def test_unit_offset_scales_the_effective_gain() -> None:
    stored = np.array([0.0, 1.0, -0.5, 7.0])
    edited = Gain("g", 0, (0, 1, 2), 0.25, null=-1.0).apply(stored, "F64")
    np.testing.assert_array_equal(1 + edited, [0.75, 1.5, 0.375, 8.0])


@formats
def test_strength_zero_changes_no_byte(dtype: str) -> None:
    width, chosen = 6, (1, 4)
    stored = dtypes.round_once(np.linspace(-2, 2, 24).reshape(4, width), dtype)
    stored[0, 1] = -0.0
    sink = SinkDirection(np.ones(2, np.float32), np.ones(width, np.float32))
    for edit in (
        Columns("q", 0, chosen, 0.0),
        Gain("g", 0, chosen, 0.0, null=-1.0),
        RankOne("q", 0, chosen, 0.0, sink=sink),
    ):
        assert edit.apply(stored, dtype).tobytes() == stored.tobytes()
    mask = Mask(width, "weight", 0.0, {0: chosen})
    for name in ("norm", "qkv", "sink"):
        assert make_edits(anatomy_of(width), mask, name, {0: sink}) == ()


@formats
def test_the_stored_array_is_not_touched(dtype: str) -> None:
    stored = dtypes.round_once(np.linspace(-2, 2, 24).reshape(4, 6), dtype)
    before = stored.tobytes()
    edited = Columns("q", 0, (0, 1), 1.0).apply(stored, dtype)
    assert stored.tobytes() == before
    assert edited.dtype == stored.dtype


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@given(case=cases())
def test_conv1d_is_the_transposed_linear(
    dtype: str, strength: float, case: tuple[np.random.Generator, int, tuple[int, ...], float]
) -> None:
    generator, width, chosen, _ = case
    linear = dtypes.round_once(generator.normal(size=(9, width)), dtype)
    conv = np.ascontiguousarray(linear.T)
    by_linear = Columns("q", 0, chosen, strength).apply(linear, dtype)
    by_conv = Columns("q", 0, chosen, strength, axis=0).apply(conv, dtype)
    assert np.ascontiguousarray(by_conv.T).tobytes() == by_linear.tobytes()


@st.composite
def sinks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, SinkDirection, tuple[int, ...], float]:
    """A linear, a sink vector c, its direction with v·c = 1, S and γ."""
    generator, width, chosen, strength = draw(cases())
    weight = generator.normal(size=(8, width))
    center = (generator.normal(size=width) * 3).astype(np.float32).astype(np.float64)
    ordinary = generator.normal(size=(200, width))
    v = detector(center, ordinary.T @ ordinary / 200, 1e-3)
    direction = SinkDirection(center[list(chosen)].astype(np.float32), v.astype(np.float32))
    return weight, center, direction, chosen, strength


@given(case=sinks(), seed=st.integers(0, 2**32))
def test_sink_edit(
    case: tuple[np.ndarray, np.ndarray, SinkDirection, tuple[int, ...], float], seed: int
) -> None:
    """W'c = W(c − γ m⊙c) on the sink token, W'x = W x where v·x = 0."""
    weight, center, direction, chosen, strength = case
    edited = RankOne("q", 0, chosen, strength, sink=direction).apply(weight, "F64")
    masked = center.copy()
    masked[list(chosen)] *= 1.0 - strength
    scale = np.abs(weight).max() * np.abs(center).max() * len(center)
    np.testing.assert_allclose(edited @ center, weight @ masked, rtol=0, atol=1e-5 * scale)
    assert np.linalg.matrix_rank(edited - weight, tol=1e-10 * scale) <= 1

    v = direction.detector.astype(np.float64)
    x = np.random.default_rng(seed).normal(size=(5, len(v)))
    x -= np.outer(x @ v, v) / (v @ v)
    np.testing.assert_allclose(x @ edited.T, x @ weight.T, rtol=0, atol=1e-9 * scale)
    # The closed form, literally.
    m = np.zeros(len(v))
    m[list(chosen)] = 1.0
    formula = weight - strength * np.outer(weight @ (m * center), v)
    np.testing.assert_allclose(edited, formula, rtol=0, atol=1e-12 * scale)


@given(case=sinks())
def test_sink_edit_of_conv1d(
    case: tuple[np.ndarray, np.ndarray, SinkDirection, tuple[int, ...], float],
) -> None:
    weight, _, direction, chosen, strength = case
    by_linear = RankOne("q", 0, chosen, strength, sink=direction).apply(weight, "F64")
    conv = np.ascontiguousarray(weight.T)
    by_conv = RankOne("q", 0, chosen, strength, axis=0, sink=direction).apply(conv, "F64")
    np.testing.assert_allclose(by_conv.T, by_linear, rtol=1e-11, atol=1e-11)


@given(case=sinks(), block=st.integers(1, 60))
def test_blocks_give_the_whole(
    case: tuple[np.ndarray, np.ndarray, SinkDirection, tuple[int, ...], float], block: int
) -> None:
    weight, _, direction, chosen, strength = case
    conv, gain = np.ascontiguousarray(weight.T), weight[0].copy()
    edits = [
        (Columns("q", 0, chosen, strength), weight),
        (Columns("q", 0, chosen, strength, axis=0), conv),
        (Gain("g", 0, chosen, strength, null=-1.0), gain),
        (Bias("b", 0, chosen, strength), gain),
        (RankOne("q", 0, chosen, strength, sink=direction), weight),
        (RankOne("q", 0, chosen, strength, axis=0, sink=direction), conv),
    ]
    whole = [edit.apply(stored, "F64") for edit, stored in edits]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "BLOCK_ELEMENTS", block)
        parts = [edit.apply(stored, "F64") for edit, stored in edits]
    for (edit, _), one, other in zip(edits, whole, parts, strict=True):
        if edit.kind == "rank_one":  # sums in another order
            np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)
        else:
            assert other.tobytes() == one.tobytes()


@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 50)), st.tuples(st.integers(0, 30), st.integers(0, 9))
    ),
    block=st.integers(1, 40),
)
def test_row_blocks_tile(shape: tuple[int, ...], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "BLOCK_ELEMENTS", block)
        slices = list(fold.row_blocks(shape))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(shape[0]))
    width = max(1, int(np.prod(shape[1:])))
    assert all((part.stop - part.start) * width <= max(block, width) for part in slices)


@given(width=st.integers(1, 30), tokens=st.integers(0, 60), seed=st.integers(0, 2**32))
def test_detector_answers_one(width: int, tokens: int, seed: int) -> None:
    """Also with fewer tokens than dimensions, and with none at all."""
    generator = np.random.default_rng(seed)
    center = generator.normal(size=width) + 0.1
    ordinary = generator.normal(size=(tokens, width)) @ generator.normal(size=(width, width))
    v = detector(center, ordinary.T @ ordinary / max(1, tokens), 1e-3)
    assert np.isfinite(v).all()
    assert v @ center == pytest.approx(1.0, rel=1e-6)


def test_detector_is_the_ridge_solution() -> None:
    """Σ is regularised by `ridge` times its mean eigenvalue; without tokens v is c / |c|²."""
    generator = np.random.default_rng(3)
    center, ordinary = generator.normal(size=5), generator.normal(size=(3, 5))
    moment = 7.0 * ordinary.T @ ordinary
    loaded = moment + 0.25 * np.linalg.eigvalsh(moment).mean() * np.eye(5)
    expected = np.linalg.inv(loaded) @ center
    np.testing.assert_allclose(
        detector(center, moment, 0.25), expected / (center @ expected), rtol=1e-10
    )
    alone = detector(center, np.zeros((5, 5)), 0.25)
    np.testing.assert_allclose(alone, center / (center @ center), rtol=1e-12)


@hypothesis.settings(max_examples=30)
@given(width=st.integers(2, 12), seed=st.integers(0, 2**32))
def test_detector_answers_least_to_ordinary_tokens(width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ordinary = generator.normal(size=(400, width)) * np.exp(generator.normal(size=width))
    center = generator.normal(size=width) * 5
    moment = ordinary.T @ ordinary / 400
    v = detector(center, moment, 1e-9)
    energy = v @ moment @ v
    for _ in range(20):
        other = v + generator.normal(size=width) * np.linalg.norm(v) * 0.3
        other /= other @ center
        assert other @ moment @ other >= energy * (1 - 1e-6)


@pytest.mark.parametrize(
    ("name", "bias", "expected"),
    [
        ("norm", False, [("g", "gain")]),
        ("norm", True, [("g", "gain"), ("b", "bias")]),
        ("qkv", True, [("q", "columns"), ("k", "columns")]),
        ("sink", False, [("q", "rank_one"), ("k", "rank_one")]),
    ],
)
def test_what_each_fold_edits(name: str, bias: bool, expected: list[tuple[str, str]]) -> None:
    sink = SinkDirection(np.ones(1, np.float32), np.ones(4, np.float32))
    edits = make_edits(
        anatomy_of(4, bias=bias, null=-1.0, axis=0),
        Mask(4, "weight", 1.0, {0: (2,)}),
        name,
        {0: sink},
    )
    assert [(edit.tensor, edit.kind) for edit in edits] == expected
    for edit in edits:
        assert edit.facts["null"] == (-1.0 if edit.kind == "gain" else 0.0)
        assert edit.dimensions == (2,)
        if edit.kind in ("columns", "rank_one"):
            assert edit.facts["axis"] == 0
        assert (getattr(edit, "sink", None) is sink) == (name == "sink")


def test_norm_that_feeds_others_is_refused() -> None:
    anatomy = anatomy_of(4, refusal="the MLP reads the same norm")
    mask = Mask(4, "weight", 1.0, {0: (2,)})
    with pytest.raises(Unsupported, match="the MLP reads the same norm; use --fold qkv"):
        make_edits(anatomy, mask, "norm")
    assert len(make_edits(anatomy, mask, "qkv")) == 2


@given(st.lists(st.floats(width=32), max_size=20))
def test_packed_vectors(values: list[float]) -> None:
    vector = np.array(values, dtype=np.float32)
    assert unpack(pack(vector)).tobytes() == vector.tobytes()


@pytest.mark.parametrize("text", ["AAA", "*", "AAAAA===", "AAAA", "é"])
def test_other_text_does_not_unpack(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):  # binascii's words, numpy's or the codec's
        unpack(text)


def test_packing_is_little_endian() -> None:
    assert pack(np.array([1.0], dtype=">f4")) == "AACAPw=="
