"""The paper's measurements of massive activations, as pure functions (§3, §4, §6, Appendix B).

Functions along the hidden axis take torch tensors, on whatever device the states are, and compute
in float32 or wider. Functions over tokens, layers and inputs take numpy arrays.
`surgery.probe` feeds them from a running model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.method.mask import largest, mask_size

Array = NDArray[np.float64]

# The share of a norm's dimensions that counts as its largest gains, K / D (§3.1).
TOP_SHARE = 0.1


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def token_norms(states: torch.Tensor) -> torch.Tensor:
    """L2 norm of each token, [..., D] to [...].

    Of a layer's or an FFN's output: Fig. 1 and 11 to 20. Of the output of the norm before the
    FFN: WeightNorm, the unnumbered formula of §3.1 (Fig. 2).
    """
    return _wide(states).norm(dim=-1)


def energy_shares(values: torch.Tensor) -> torch.Tensor:
    """Each dimension's share of the squared norm, [..., D]: the p and g of eq. 2 (§3.1)."""
    squares = _wide(values).square()
    return squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


def top_gain_fraction(
    states: torch.Tensor, gain: torch.Tensor, share: float = TOP_SHARE
) -> torch.Tensor:
    """Frac, the part of a norm's output that lies in the dimensions of largest gain (§3.1, eq. 1).

    states: output of the norm, [..., D]. gain: effective gain, [D]. share: K / D, with
    K = int(share * D). Returns [...], between 0 and 1. Raises BadSettings where K is 0.
    """
    size = mask_size(share, gain.shape[-1])
    chosen = list(largest(gain.detach().double().cpu().numpy(), size))
    return energy_shares(states)[..., chosen].sum(-1)


def gain_divergence(states: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ g) of a norm's output from the distribution of its squared gains (§3.1, eq. 2).

    states: output of the norm, [..., D]. gain: effective gain, [D]. Returns nats, [...]; infinite
    where the norm's bias writes into a dimension whose gain is zero.
    """
    shares, reference = energy_shares(states), energy_shares(gain)
    return (torch.xlogy(shares, shares) - torch.xlogy(shares, reference)).sum(-1)


def concentration(states: torch.Tensor) -> torch.Tensor:
    """Projection concentration C, the sum of squared energy shares (§3.1, eq. 3).

    states: what a projection of the FFN puts out, [..., d]. Returns [...], from 1 / d where the
    energy is spread evenly to 1 where it lies in one dimension.
    """
    return energy_shares(states).square().sum(-1)


def amplification(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Factor by which an FFN enlarges each token, the L2 norm of its output over that of its input.

    inputs, outputs: [..., D]. Returns [...] (§3.1, Fig. 4, bars).
    """
    return token_norms(outputs) / token_norms(inputs).clamp_min(torch.finfo(torch.float32).tiny)


def sink_minus_others(values: Array, sink: int) -> Array:
    """The sink's value less the mean of the other tokens': the Δ of eq. 1 and 2 and of Fig. 4.

    values: [..., tokens]. Returns [...]; NaN when there is no other token.
    """
    others = np.delete(values, sink, axis=-1)
    if others.shape[-1] == 0:
        return np.full(values.shape[:-1], np.nan)
    return values[..., sink] - others.mean(-1)


def magnification(norms: Array, sink: int) -> Array:
    """The sink's output norm at each layer over that at the layer before (Table 8, Appendix H).

    norms: [layers + 1, tokens], the first row the input to layer 0. Returns [layers].
    """
    curve = norms[:, sink]
    return curve[1:] / np.maximum(curve[:-1], np.finfo(np.float64).tiny)


def cosines(states: Array) -> Array:
    """Cosine similarity between inputs' sink states, [inputs, D] to [inputs, inputs] (Fig. 5 c)."""
    lengths = np.linalg.norm(states, axis=-1, keepdims=True)
    unit = states / np.maximum(lengths, np.finfo(np.float64).tiny)
    return unit @ unit.T


def pairwise(matrix: Array) -> Array:
    """The entries above the diagonal of a square matrix: each pair of inputs once."""
    return matrix[np.triu_indices(len(matrix), 1)]


def attention_to_sink(weights: Array, sink: int) -> Array:
    """Share of attention on the sink, mean over the query tokens after it (§6, Fig. 7).

    weights: attention probabilities, [heads, queries, keys]. Returns [heads]; NaN where no token
    follows the sink.
    """
    later = weights[:, sink + 1 :, sink]
    return later.mean(-1) if later.shape[-1] else np.full(len(weights), np.nan)


def attention_entropy(weights: Array, sink: int) -> Array:
    """Entropy of the attention of the query tokens after the sink, mean over them (§4.1, §6).

    weights: attention probabilities, [heads, queries, keys]. Returns nats, [heads]; NaN where no
    token follows the sink.
    """
    later = weights[:, sink + 1 :]
    if later.shape[1] == 0:
        return np.full(len(weights), np.nan)
    logarithms = np.log(np.where(later > 0, later, 1.0))
    return -(later * logarithms).sum(-1).mean(-1)


def masked_share(attention_input: Array, dimensions: Sequence[int]) -> float:
    """Share of the energy of an attention input that the mask set S holds (§4.2, eq. 4 and 5).

    attention_input: one token's, [D]. dimensions: S.
    """
    squares = np.square(attention_input)
    return float(squares[list(dimensions)].sum() / squares.sum())


def cosine(one: Array, other: Array) -> float:
    """Cosine between two vectors: how far the mask turns the attention input (§4.1)."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def relative_change(before: Array, after: Array) -> float:
    """L2 norm of the change over the L2 norm before: of the sink's key or value (§4.1)."""
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


def remaining(norms: Array, intact: Array) -> Array:
    """What a knock-out leaves of the sink's norm, by layer (Appendix B, Fig. 9).

    norms, intact: the sink's output norms with and without the knock-out, [layers]. Returns
    shares, [layers]; 1 where nothing changed.
    """
    return norms / np.maximum(intact, np.finfo(np.float64).tiny)
