"""`with wemask(model, mask)` on models as training wraps them: PEFT, checkpointing, DDP, FSDP."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from crash_points import in_child

import surgery
from surgery.errors import BadSettings, Unsupported
from surgery.method.mask import Mask, largest
from surgery.models.anatomy import describe, effective_gain
from surgery.models.loading import load_model
from surgery.models.masking import first_real_token, weight_mask, wemask

Tiny = Callable[..., Path]

PAD = 2
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 60, (4, 11), generator=GENERATOR)
REAL = torch.ones_like(IDS)
REAL[0, :4] = REAL[1, :1] = 0  # left padding
REAL[2, 8:] = 0  # right padding


@pytest.fixture
def llama(tiny: Tiny) -> tuple[Any, Mask]:
    model = load_model(tiny("llama", layer=2, layers=6))
    return model, weight_mask(model, 2, 0.5)


def logits(model: Any, ids: torch.Tensor = IDS, real: torch.Tensor | None = REAL) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=real, use_cache=False).logits


def loss_of(model: Any) -> torch.Tensor:
    labels = IDS.masked_fill(REAL == 0, -100)
    return model(input_ids=IDS, attention_mask=REAL, labels=labels, use_cache=False).loss


FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "mixtral",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_found_in_the_model_itself(tiny: Tiny, family: str) -> None:
    """Without an anatomy: the same modules, and the same dimensions as from the checkpoint."""
    folder = tiny(family, layer=2, layers=6)
    checkpoint = surgery.resolve(str(folder))
    anatomy = describe(checkpoint)
    assert anatomy is not None
    model = load_model(folder)
    mask = weight_mask(model, 2, 0.4, scope="all")
    assert mask.layers == (3, 4, 5)
    for layer in mask.layers:
        gain = effective_gain(anatomy, checkpoint, layer)
        assert mask.dimensions[layer] == largest(gain, len(mask.dimensions[layer]))
    assert weight_mask(model, 2, 0.4, scope="first").layers == (3,)
    base = logits(model)
    with wemask(model, mask):
        found = logits(model)
    with wemask(model, mask, anatomy=anatomy):
        given = logits(model)
    assert torch.equal(found, given)
    assert (found - base).abs().max() > 1e-3


def test_what_is_watched(llama: tuple[Any, Mask]) -> None:
    """A watcher sees x before the edit, and where the first real tokens are."""
    model, mask = llama
    seen: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def watch(layer: int, states: torch.Tensor, positions: torch.Tensor | None) -> None:
        seen[layer] = (states.clone(), positions)

    for tokens in ("first", "every"):
        seen.clear()
        with wemask(model, mask, tokens, watch=watch):
            logits(model)
        assert sorted(seen) == [3, 4, 5]
        for layer, (states, positions) in seen.items():
            assert positions is not None
            assert positions.nonzero().tolist() == [[0, 4], [1, 1], [2, 0], [3, 0]]
            assert states[positions][:, list(mask.dimensions[layer])].abs().min() > 0


def test_packed_rows_under_an_attention_mask() -> None:
    """Collators that give both: every position 0 that is no padding begins a sequence."""
    ids = torch.zeros(1, 6, dtype=torch.long)
    options = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]]),
    }
    assert first_real_token((), options).tolist() == [[True, False, True, False, False, False]]
    planes = options["position_ids"].expand(3, 1, 6)
    assert first_real_token((), {**options, "position_ids": planes}).sum() == 2


# --------------------------------------------------------------------------------------------
# PEFT and activation checkpointing
# --------------------------------------------------------------------------------------------


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(
        model,
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False),
    )
    return wrapped.train()


def gradients(model: Any, mask: Mask, tokens: str = "first") -> dict[str, torch.Tensor]:
    model.zero_grad()
    with wemask(model, mask, tokens):
        loss_of(model).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("tokens", ["first", "every"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_peft_under_activation_checkpointing(
    llama: tuple[Any, Mask], tokens: str, reentrant: bool
) -> None:
    model = with_lora(llama[0])
    model.enable_input_require_grads()
    plain = gradients(model, llama[1], tokens)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.get_base_model().is_gradient_checkpointing
    recomputed = gradients(model, llama[1], tokens)
    assert plain.keys() == recomputed.keys()
    assert len(plain) == 2 * 3 * 6
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_the_first_token_gets_no_gradient_in_s(llama: tuple[Any, Mask]) -> None:
    """Under a mask of every token, LoRA's A reads nothing from S and gets no gradient there."""
    model = with_lora(llama[0])
    found = gradients(model, llama[1], "every")
    for layer, chosen in llama[1].dimensions.items():
        (name,) = (n for n in found if f"layers.{layer}.self_attn.q_proj.lora_A" in n)
        assert not found[name][:, list(chosen)].any()
        assert found[name].any()


def test_generation_inside_peft(llama: tuple[Any, Mask]) -> None:
    """Cached, left-padded generation equals uncached scoring of what it wrote."""
    model = with_lora(llama[0]).eval()
    ids, real = IDS[:2], REAL[:2]
    with wemask(model, llama[1]), torch.inference_mode():
        out = model.generate(
            input_ids=ids.masked_fill(real == 0, PAD),
            attention_mask=real,
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=[0, 1, 2],
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
        whole = torch.cat([real, torch.ones(2, 8, dtype=torch.long)], 1)
        positions = (whole.cumsum(-1) - 1).clamp(min=0)
        scored = model(
            input_ids=out.sequences, attention_mask=whole, position_ids=positions, use_cache=False
        ).logits
    assert (torch.stack(out.logits, 1) - scored[:, 10:-1]).abs().max() <= 1e-4


# --------------------------------------------------------------------------------------------
# torch.compile
# --------------------------------------------------------------------------------------------


def test_compiled_inside_the_block(tiny: Tiny) -> None:
    """Compiled inside, the mask is in the code, in one graph; outside the code is made anew."""
    model = load_model(tiny("llama", layer=1, layers=3))
    mask = weight_mask(model, 1, 0.5)
    base = logits(model)
    with wemask(model, mask):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        first = logits(compiled)
        masked = logits(model)
        assert torch.equal(first, masked)
    assert torch.equal(logits(compiled), base)
    assert not torch.equal(base, masked)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_before_the_block_is_refused(llama: tuple[Any, Mask], in_place: bool) -> None:
    model, mask = llama
    if in_place:
        model.model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(Unsupported, match="already compiled"), wemask(model, mask):
        pass


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------


def test_refusals(llama: tuple[Any, Mask], tiny: Tiny) -> None:
    model, mask = llama
    for arguments, sentence in (
        ((mask, "last"), "tokens must be one of first, every"),
        ((Mask(64, "weight", 1.0, {9: (1,)}),), "names layer 9"),
        ((Mask(32, "weight", 1.0, {3: (1,)}),), "hidden size of 32; the model has 64"),
        ((Mask(64, "weight", 1.0, {3: (64,)}),), "hidden size"),
    ):
        with pytest.raises(BadSettings, match=sentence), wemask(model, *arguments):
            pass
    with wemask(model, mask), pytest.raises(BadSettings, match="already"), wemask(model, mask):
        pass
    with pytest.raises(Unsupported, match="olmo2"), wemask(load_model(tiny("olmo2")), mask):
        pass


# --------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, folder: str, port: int, output: str, ranks: int) -> None:
    """Logits of this rank's part of the batch, by wrapper and by where the hooks were put."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    rows = 4 // ranks
    part = slice(rows * rank, rows * (rank + 1))

    def shard(model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    wrappers: dict[str, Callable[[Any], Any]] = {
        "ddp": DistributedDataParallel,
        "fsdp1": lambda model: FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        ),
        "fsdp2": shard,
    }

    def run(model: Any) -> torch.Tensor:
        model.train()
        out = model(input_ids=IDS[part], attention_mask=REAL[part], use_cache=False).logits
        out.square().mean().backward()
        return out.detach()

    found: dict[str, torch.Tensor] = {}
    for name, wrap in wrappers.items():
        model = load_model(Path(folder))
        mask = weight_mask(model, 2, 0.5)
        with wemask(model, mask):
            found[f"{name} before"] = run(wrap(model))
        wrapped = wrap(load_model(Path(folder)))
        with wemask(wrapped, mask):
            found[f"{name} after"] = run(wrapped)
        gradient = wrapped.get_parameter(
            next(
                n for n, _ in wrapped.named_parameters() if n.endswith("4.self_attn.q_proj.weight")
            )
        ).grad
        whole = getattr(gradient, "full_tensor", lambda gradient=gradient: gradient)()
        if name != "fsdp1":  # which keeps a flat shard
            found[f"{name} gradient"] = whole
    torch.save(found, f"{output}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_ddp_and_fsdp_equal_one_process(tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    """Hooks put on before or after wrapping: each rank computes what one process computes.

    A single rank is a fork, so that no process group stays in this process.
    """
    folder = tiny("llama", layer=2, layers=6)
    words = (str(folder), free_port(), str(tmp_path), ranks)
    if ranks == 1:
        assert in_child(lambda: _rank(0, *words)) == 0
    else:
        torch.multiprocessing.spawn(_rank, args=words, nprocs=ranks, join=True)
    model = load_model(folder).train()
    mask = weight_mask(model, 2, 0.5)
    base = logits(model)
    with wemask(model, mask):
        expected = logits(model)
        model(input_ids=IDS, attention_mask=REAL, use_cache=False).logits.square().mean().backward()
    gradient = model.model.layers[4].self_attn.q_proj.weight.grad
    assert (expected - base).abs().max() > 1e-2
    rows = 4 // ranks
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 8
        for name, value in found.items():
            wanted = gradient if "gradient" in name else expected[rows * rank : rows * (rank + 1)]
            assert (value - wanted).abs().max() <= 1e-5, name
