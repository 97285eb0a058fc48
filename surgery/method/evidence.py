"""The paper's measurements of massive activations, as pure functions (§3, §4, §6, Appendix B).

All take numpy arrays; what comes from a model may be in float16 or float32. Functions along the
hidden axis compute in float32 or wider, because the square of a massive activation overflows
float16. `surgery.measure` feeds them from a running model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surgery.method.locate import growth
from surgery.method.mask import largest, mask_size

Array = NDArray[np.float64]
Floats = NDArray[np.floating]

# The share of a norm's dimensions that counts as its largest gains, K / D (§3.1).
TOP_SHARE = 0.1
# In place of zero in denominators: the least normal number of float32, in wider types too.
_TINY = float(np.finfo(np.float32).tiny)


def _wide(values: ArrayLike) -> Floats:
    found = np.asarray(values)
    return found.astype(np.promote_types(found.dtype, np.float32), copy=False)


# --------------------------------------------------------------------------------------------
# Along the hidden axis
# --------------------------------------------------------------------------------------------


def token_norms(states: ArrayLike) -> Floats:
    """L2 norm of each token, [..., D] to [...].

    Of a layer's or an FFN's output: Fig. 1 and 11 to 20. Of the output of the norm before the
    FFN: WeightNorm, the unnumbered formula of §3.1 (Fig. 2).
    """
    found: Floats = np.linalg.norm(_wide(states), axis=-1)
    return found


def energy_shares(values: ArrayLike) -> Floats:
    """Each dimension's share of the squared norm, [..., D]: the p and g of eq. 2 (§3.1)."""
    squares = np.square(_wide(values))
    return squares / np.maximum(squares.sum(-1, keepdims=True), _TINY)


def top_gain_fraction(states: ArrayLike, gain: ArrayLike, share: float = TOP_SHARE) -> Floats:
    """Frac, the part of a norm's output that lies in the dimensions of largest gain (§3.1, eq. 1).

    Args:
        states: output of the norm, [..., D].
        gain: its effective gain, [D].
        share: K / D, with K = int(share * D).

    Returns:
        [...], between 0 and 1.

    Raises:
        BadSettings: where K is 0.
    """
    gain = np.asarray(gain)
    chosen = list(largest(gain, mask_size(share, len(gain))))
    return energy_shares(states)[..., chosen].sum(-1)


def gain_divergence(states: ArrayLike, gain: ArrayLike) -> Floats:
    """KL(p ‖ g) of a norm's output from the distribution of its squared gains (§3.1, eq. 2).

    Args:
        states: output of the norm, [..., D].
        gain: its effective gain, [D].

    Returns:
        Nats, [...]; infinite where the norm's bias writes into a dimension whose gain is zero.
    """
    shares, reference = energy_shares(states), energy_shares(gain)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log(shares) - np.log(reference)
        return np.where(shares == 0, 0, shares * logarithms).sum(-1)  # 0 · log 0 counts as 0


def concentration(states: ArrayLike) -> Floats:
    """Projection concentration C, the sum of squared energy shares (§3.1, eq. 3).

    Args:
        states: what a projection of the FFN puts out, [..., d].

    Returns:
        [...], from 1 / d where the energy is spread evenly to 1 where it lies in one dimension.
    """
    return np.square(energy_shares(states)).sum(-1)


def amplification(inputs: ArrayLike, outputs: ArrayLike) -> Floats:
    """Factor by which an FFN enlarges each token, the L2 norm of its output over that of its input.

    Args:
        inputs: [..., D].
        outputs: [..., D].

    Returns:
        [...] (§3.1, Fig. 4, bars).
    """
    return token_norms(outputs) / np.maximum(token_norms(inputs), _TINY)


# --------------------------------------------------------------------------------------------
# Over tokens, layers and inputs
# --------------------------------------------------------------------------------------------


def sink_minus_others(values: Array, sink: int) -> Array:
    """The sink's value less the mean of the other tokens': the Δ of eq. 1 and 2 and of Fig. 4.

    Args:
        values: [..., tokens].
        sink: the sink's position.

    Returns:
        [...]; NaN when there is no other token.
    """
    others = np.delete(values, sink, axis=-1)
    if others.shape[-1] == 0:
        return np.full(values.shape[:-1], np.nan)
    return values[..., sink] - others.mean(-1)


def magnification(norms: Array, sink: int) -> Array:
    """The sink's output norm at each layer over that at the layer before (Table 8, Appendix H).

    Args:
        norms: [layers + 1, tokens], the first row the input to layer 0.
        sink: the sink's position.

    Returns:
        [layers].
    """
    return growth(norms[:, sink])


def cosines(states: Array) -> Array:
    """Cosine similarity between inputs' sink states, [inputs, D] to [inputs, inputs] (Fig. 5 c)."""
    lengths = np.linalg.norm(states, axis=-1, keepdims=True)
    unit = states / np.maximum(lengths, _TINY)
    return unit @ unit.T


def pairwise(matrix: Array) -> Array:
    """The entries above the diagonal of a square matrix: each pair of inputs once."""
    return matrix[np.triu_indices(len(matrix), 1)]


def remaining(norms: Array, intact: Array) -> Array:
    """What a knock-out leaves of the sink's norm, by layer (Appendix B, Fig. 9).

    Args:
        norms: the sink's output norms with the knock-out, [layers].
        intact: without it, [layers].

    Returns:
        Shares, [layers]; 1 where nothing changed.
    """
    return norms / np.maximum(intact, _TINY)


# --------------------------------------------------------------------------------------------
# Attention and the mask
# --------------------------------------------------------------------------------------------


def attention_to_sink(weights: Array, sink: int) -> Array:
    """Share of attention on the sink, mean over the query tokens after it (§6, Fig. 7).

    Args:
        weights: attention probabilities, [heads, queries, keys].
        sink: the sink's position.

    Returns:
        [heads]; NaN where no token follows the sink.
    """
    later = weights[:, sink + 1 :, sink]
    return later.mean(-1) if later.shape[-1] else np.full(len(weights), np.nan)


def attention_entropy(weights: Array, sink: int) -> Array:
    """Entropy of the attention of the query tokens after the sink, mean over them (§4.1, §6).

    Args:
        weights: attention probabilities, [heads, queries, keys].
        sink: the sink's position.

    Returns:
        Nats, [heads]; NaN where no token follows the sink.
    """
    later = weights[:, sink + 1 :]
    if later.shape[1] == 0:
        return np.full(len(weights), np.nan)
    logarithms = np.log(np.where(later > 0, later, 1.0))  # 0 · log 0 counts as 0
    return -(later * logarithms).sum(-1).mean(-1)


def masked_share(attention_input: Array, dimensions: Sequence[int]) -> float:
    """Share of the energy of an attention input that the mask set S holds (§4.2, eq. 4 and 5).

    Args:
        attention_input: one token's, [D].
        dimensions: S.
    """
    squares = np.square(attention_input)
    return float(squares[list(dimensions)].sum() / squares.sum())


def cosine(one: Array, other: Array) -> float:
    """Cosine between two vectors: how far the mask turns the attention input (§4.1)."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def relative_change(before: Array, after: Array) -> float:
    """L2 norm of the change over the L2 norm before: of the sink's key or value (§4.1)."""
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))
