"""Let two checkpoints answer the same questions; uses transformers alone.

python docs/side_by_side.py BASE CONVERTED
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

QUESTIONS = ("What is the capital of Portugal?", "Why does ice float on water?")


def answer(folder: str, question: str) -> str:
    """A short greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(**tokens, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Print the answers, model by model."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for question in QUESTIONS:
        print(f"\n{question}")
        for name, folder in (("base", sys.argv[1]), ("converted", sys.argv[2])):
            print(f"  {name:>9}: {' '.join(answer(folder, question).split())}")


if __name__ == "__main__":
    main()
