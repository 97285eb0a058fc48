"""Gated attention: Y ⊙ σ(x Wᵀ + b) before the output projection, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surgery.errors import Unsupported
from surgery.models.gated_attention import add_gates, gated
from surgery.models.loading import load_model

Tiny = Callable[..., Path]
IDS = torch.arange(9)[None] + 5


def test_the_gate_scales_what_the_projection_reads(tiny: Tiny) -> None:
    model = load_model(tiny("llama", layer=2, layers=6))
    paths = add_gates(model)
    assert paths == [f"model.layers.{layer}.self_attn.attention_gate" for layer in range(6)]
    gate = model.get_submodule(paths[2])
    torch.manual_seed(0)
    torch.nn.init.normal_(gate.weight)
    attention = model.model.layers[2].self_attn
    seen: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        hooks = [
            attention.register_forward_pre_hook(
                lambda _m, args, kwargs: seen.update(x=(args or (kwargs["hidden_states"],))[0]),
                with_kwargs=True,
            ),
            attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(y=args[0])),
        ]
        with torch.no_grad():
            logits = model(IDS).logits
        for hook in hooks:
            hook.remove()
        return logits

    base = run()
    for other in paths:  # all gates but one wide open
        model.get_submodule(other).bias.data.fill_(0.0 if other == paths[2] else 100.0)
    ungated = seen["y"]
    with gated(model):
        logits = run()
    expected = ungated * torch.sigmoid(seen["x"] @ gate.weight.T)
    assert (seen["y"] - expected).abs().max() < 1e-5
    assert (logits - base).abs().max() > 1e-3
    assert torch.equal(run(), base)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gates_train_inside_peft_under_activation_checkpointing(
    tiny: Tiny, reentrant: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_model(tiny("llama", layer=2, layers=6))
    add_gates(model)
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2,
        target_modules="all-linear",
        modules_to_save=["attention_gate"],
        exclude_modules=["attention_gate"],
        init_lora_weights=False,
    )
    wrapped = get_peft_model(model, settings).train()
    wrapped.enable_input_require_grads()

    def gradients() -> dict[str, torch.Tensor]:
        wrapped.zero_grad()
        with gated(wrapped):
            wrapped(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}

    plain = gradients()
    assert sum("attention_gate" in name for name in plain) == 2 * 6
    assert all(value.any() for name, value in plain.items() if "attention_gate" in name)
    wrapped.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_other_projections_are_refused(tiny: Tiny) -> None:
    with pytest.raises(Unsupported, match="no o_proj"):
        add_gates(load_model(tiny("gpt2")))
