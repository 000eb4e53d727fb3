"""bitwright generate: text from a model or an artifact, streamed."""

from __future__ import annotations

import sys
from typing import Any

import typer

from bitwright.cli import options
from bitwright.errors import BitwrightError


def command(
    path: options.ModelOrArtifact,
    prompt: str = typer.Argument(..., help="text to continue"),
    max_new_tokens: int = typer.Option(100, min=1, help="tokens to make at most"),
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 0.95,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
) -> None:
    """Continue PROMPT and print the text as it comes."""
    from bitwright.calibration import load_tokenizer
    from bitwright.evaluation import load

    model, tokenizer = load(path, dtype), load_tokenizer(path)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise BitwrightError("the prompt is empty; give some text to continue")
    stream(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed, skip_prompt=False)


def stream(
    model: Any,
    tokenizer: Any,
    ids: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    skip_prompt: bool,
) -> str:
    """Generate after token ids int64 [1, length], print as it comes, return the new text.

    Raises BitwrightError where prompt and answer do not fit the model's context.
    """
    import torch
    from transformers import TextStreamer

    from bitwright.calibration.text import check_vocabulary
    from bitwright.models import context_length

    config = model.config.get_text_config(decoder=True)
    check_vocabulary(ids, config.vocab_size)
    context = context_length(config)
    if context and ids.shape[1] >= context:
        raise BitwrightError(
            f"the prompt has {ids.shape[1]} tokens and the model's context is {context}; give a shorter prompt"
        )
    if context:
        max_new_tokens = min(max_new_tokens, context - ids.shape[1])
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling.update(temperature=temperature, top_p=top_p)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True),
            **sampling,
        )
    sys.stdout.flush()
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
