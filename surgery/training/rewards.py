"""The reward of reinforcement learning on mathematics: the exact answer."""

from __future__ import annotations

from typing import Any


def exact_answer(completions: list[Any], answer: list[str], **_columns: Any) -> list[float]:
    """1 where the completion's final answer equals the expected one, by math-verify; else 0.

    completions: texts, or turns whose last one holds the text. answer: the expected answers, one
    for each. An answer that cannot be read as mathematics is compared as text.
    """
    from math_verify import parse, verify

    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        gold = parse(expected)
        if not gold:
            rewards.append(float(text.strip().endswith(expected.strip())))
            continue
        found = parse(text)
        rewards.append(float(bool(found) and verify(gold, found)))
    return rewards
