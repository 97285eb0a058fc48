"""One runtime, one model: `runners.py RUNTIME MODEL [ADAPTER]`, prompts as JSON on stdin.

Stdin: {"prompts": [[token ids]], "tokens": how many to generate, "end": the token that would end
a text, which is not to be chosen, "work": where to put what a runtime makes of a checkpoint}.
Stdout, last line: the runtime's version, greedily chosen tokens by prompt, and for each prompt the
log-probabilities of the first of them, as far as the runtime tells. A process each, because their
thread pools do not like each other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Answer = dict[str, Any]
TOP = 20


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max()
    return shifted - np.log(np.exp(shifted).sum())


def top(logits: np.ndarray) -> dict[str, float]:
    """The most likely next tokens and their log-probabilities."""
    values = log_softmax(logits)
    return {str(i): float(values[i]) for i in np.argsort(-values)[:TOP]}


def by_logits(next_logits: Any, job: Answer) -> Answer:
    """Greedy choice for runtimes that give logits: the whole text again for every token."""
    tokens, first = [], []
    for prompt in job["prompts"]:
        ids = list(prompt)
        for step in range(job["tokens"]):
            logits = np.array(next_logits(ids))
            if step == 0:
                first.append(top(logits))
            logits[job["end"]] = -np.inf  # as the others do when told how much to generate
            ids.append(int(np.argmax(logits)))
        tokens.append(ids[len(prompt) :])
    return {"tokens": tokens, "first": first}


def transformers(model: str, job: Answer, _adapter: str | None) -> Answer:
    import torch
    import transformers as library

    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens, first = [], []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            first.append(top(network(input_ids=ids).logits[0, -1].numpy()))
            made = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=job["tokens"],
                min_new_tokens=job["tokens"],
                pad_token_id=0,
            )
        tokens.append(made[0, len(prompt) :].tolist())
    return {"version": library.__version__, "tokens": tokens, "first": first}


def llama_cpp(model: str, job: Answer, adapter: str | None) -> Answer:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.cpuparams.n_threads = 2
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)
        parameters.lora_adapters = [lora]
    server = xllamacpp.Server(parameters)
    tokens, first = [], []
    for prompt in job["prompts"]:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": job["tokens"],
                "temperature": 0.0,
                "samplers": ["top_k"],
                "top_k": 1,
                "logprobs": TOP,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        tokens.append([step["id"] for step in steps])
        first.append({str(one["id"]): one["logprob"] for one in steps[0]["top_logprobs"]})
    return {"version": xllamacpp.__version__, "tokens": tokens, "first": first}


def ctranslate2(model: str, job: Answer, _adapter: str | None) -> Answer:
    import ctranslate2 as library
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    made = Path(job["work"]) / "ctranslate2"
    TransformersConverter(model).convert(str(made), force=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = library.Generator(str(made), compute_type="float32", intra_threads=2)
    prompts = [tokenizer.convert_ids_to_tokens(prompt) for prompt in job["prompts"]]
    tokens, first = [], []
    for prompt in prompts:
        (result,) = generator.generate_batch(
            [prompt],
            sampling_topk=1,
            max_length=job["tokens"],
            min_length=job["tokens"],
            include_prompt_in_result=False,
        )
        tokens.append(result.sequences_ids[0])
        logits = np.array(generator.forward_batch([prompt]))[0, len(prompt) - 1]
        first.append(top(logits))
    return {"version": library.__version__, "tokens": tokens, "first": first}


def _logits_only(model: str) -> Any:
    """A module from token ids to logits, for the exporters."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.network(input_ids=ids, use_cache=False).logits

    return Logits()


def _onnx(model: str, job: Answer) -> Path:
    """The checkpoint as an ONNX file, by torch's exporter."""
    import torch

    made = Path(job["work"]) / "model.onnx"
    torch.onnx.export(
        _logits_only(model),
        (torch.arange(9)[None],),
        str(made),
        input_names=["ids"],
        output_names=["logits"],
        dynamic_shapes={"ids": {1: torch.export.Dim("length", min=2, max=512)}},
        dynamo=True,
        verbose=False,
    )
    return made


def onnxruntime(model: str, job: Answer, _adapter: str | None) -> Answer:
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = 2
    made = str(_onnx(model, job))
    session = library.InferenceSession(made, options, providers=["CPUExecutionProvider"])

    def logits(ids: list[int]) -> np.ndarray:
        return session.run(None, {"ids": np.array([ids], dtype=np.int64)})[0][0, -1]

    return {"version": library.__version__, **by_logits(logits, job)}


def openvino(model: str, job: Answer, _adapter: str | None) -> Answer:
    import openvino as library

    core = library.Core()
    # Its own converter of torch modules does not know all that transformers' masks are made of.
    converted = core.read_model(str(_onnx(model, job)))
    # The CPU plug-in computes in bfloat16 where the processor can, unless told otherwise.
    compiled = core.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def logits(ids: list[int]) -> np.ndarray:
        return compiled(np.array([ids], dtype=np.int64))[0][0, -1]

    version = library.__version__.split("-")[0]
    return {"version": version, **by_logits(logits, job)}


RUNTIMES = {
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "ctranslate2": ctranslate2,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def main() -> None:
    name, model, *adapter = sys.argv[1:]
    answer = RUNTIMES[name](model, json.load(sys.stdin), adapter[0] if adapter else None)
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
