"""The harness's own kinds of model, which also tell whose generation hit the limit."""

from __future__ import annotations

import gc
from typing import Any

from surgery.files.foreign import is_whole
from surgery.patient.texts import check_ids


def counting_transformers() -> type:
    """The harness's transformers model, which also tells whose generation hit the limit."""
    from lm_eval.models.huggingface import HFLM  # an extra; imports torch

    class Counting(HFLM):
        """Same results; remembers by prompt whether the generation ended by itself."""

        def hit_the_limit(self, prompt: str) -> bool | None:
            """Whether the generation was cut; None where it is not known."""
            return self.__dict__.get("_hits", {}).get(prompt)

        def tok_encode(self, *args: Any, **kwargs: Any) -> Any:
            found = super().tok_encode(*args, **kwargs)
            self._check(found)
            return found

        def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> Any:
            self._prompts = list(strings)
            found = super().tok_batch_encode(strings, *args, **kwargs)
            self._check(found[0].flatten().tolist())
            return found

        def _check(self, ids: list[int]) -> None:
            """Before they go to the model: a token without a row would only fail in there."""
            rows = getattr(self.model.config.get_text_config(), "vocab_size", None)
            check_ids(self.tokenizer, ids, rows if is_whole(rows) else None)

        def _model_generate(
            self, context: Any, max_length: int, stop: list[str], **kwargs: Any
        ) -> Any:
            result = super()._model_generate(
                context=context, max_length=max_length, stop=stop, **kwargs
            )
            hits = self.__dict__.setdefault("_hits", {})
            ends = self._ends()
            for prompt, tokens in zip(self._prompts, result.tolist(), strict=True):
                new = tokens[context.shape[1] :]
                full = len(tokens) >= max_length and ends.isdisjoint(new)
                if full and stop:
                    text = self.tok_decode(new)
                    full = not any(word and word in text for word in stop)
                hits[prompt] = full
            return result

        def _ends(self) -> set[int]:
            eos = getattr(self.model.generation_config, "eos_token_id", None)
            found = set(eos if isinstance(eos, list) else [eos])
            return {token for token in {*found, self.eot_token_id} if token is not None}

    return Counting


def counting_vllm() -> type:
    """The same for vLLM, which says by itself why a generation ended."""
    from lm_eval.models.vllm_causallms import VLLM  # an extra; imports vllm

    class Counting(VLLM):
        """Same results; remembers by prompt why the generation ended."""

        def hit_the_limit(self, prompt: str) -> bool | None:
            """Whether the generation was cut; None where it is not known."""
            tokens = tuple(self.tok_encode(prompt))
            return self.__dict__.get("_hits", {}).get(tokens)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            results = super()._model_generate(*args, **kwargs)
            hits = self.__dict__.setdefault("_hits", {})
            for result in results:
                hits[tuple(result.prompt_token_ids)] = result.outputs[0].finish_reason == "length"
            return results

    return Counting


def free_memory() -> None:
    """Give back what models that are gone still hold of a GPU's memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
