"""The paper's mask on a loaded model of known anatomy; see `surgery.models.masking`."""

from surgery.models.masking import KEYWORD, first_real_token, masked

__all__ = ["KEYWORD", "first_real_token", "masked"]
