"""The paper's mask on a loaded model of known anatomy: the reference for every fold."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.masking import KEYWORD, first_real_token, wemask

__all__ = ["KEYWORD", "first_real_token", "masked"]


def masked(
    model: Any, anatomy: Anatomy, mask: Mask, tokens: str = "first"
) -> AbstractContextManager[None]:
    """`wemask` with the anatomy of a checkpoint.

    tokens: "first" is the paper's method; "all" masks every token, as the `norm` and `qkv` folds
    do. Raises as `wemask` does.
    """
    return wemask(model, mask, "every" if tokens == "all" else tokens, anatomy=anatomy)
