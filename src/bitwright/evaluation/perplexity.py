"""Token perplexity in the papers' protocol, with the protocol printed beside the number (spec section 10).

The text is tokenised once, with a beginning-of-sequence token where the tokenizer adds one, and cut into windows side
by side; the last incomplete window is dropped. The mean loss over a window's targets (length - 1 of them) is averaged
over the windows. For an artifact whose recipe quantizes the cache, each window passes through a fresh quantized
cache: a plain forward pass would leave the key-value quantizer out of the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.artifact.layout import bits_word
from bitwright.calibration import Text, consecutive_windows, load_tokenizer, tokenize
from bitwright.errors import ModelError, TextError
from bitwright.evaluation.loading import load
from bitwright.models import context_length
from bitwright.workers import Workers


@dataclass(frozen=True)
class Perplexity:
    """One measurement. `tokens` counts the tokens of all windows; each window has one target fewer than tokens."""

    perplexity: float
    bits_per_byte: float
    loss: float
    tokens: int
    windows: int
    protocol: str
    text: str
    text_sha256: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    path: str | Path,
    text: Text,
    *,
    window: int | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of the model or artifact in `path` on `text`.

    window     tokens a window; default 2048 or the model's context, whichever is smaller
    limit      at most that many windows, from the start of the text
    threads    windows worked on at a time, each on one thread; the result does not depend on it
    on_window  told (done, all) after each window
    """
    model = load(path, dtype)
    tokenizer = load_tokenizer(path)
    return evaluate_model(
        model, tokenizer, text, window=window, limit=limit, dtype=dtype, threads=threads, on_window=on_window
    )


def evaluate_model(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    window: int | None = None,
    limit: int | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """As `evaluate`, for a model at hand."""
    from bitwright.integrations.transformers import quantized_cache, recipe_of

    config = model.config.get_text_config(decoder=True)
    window = window_for(context_length(config), window)
    tokens = tokenize(tokenizer, text, config.vocab_size)
    windows = consecutive_windows(tokens, window, limit, text)
    recipe = recipe_of(model)
    done = 0

    def unit(ids: Tensor) -> float:
        nonlocal done
        ids = ids.to(model.device)
        cache = quantized_cache(model, recipe) if recipe else None
        extra = {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
        scores = model(input_ids=ids.unsqueeze(0), **extra).logits[0, :-1].float()
        done += 1
        if on_window:
            on_window(done, len(windows))
        return float(torch.nn.functional.cross_entropy(scores, ids[1:]))

    with Workers(threads) as workers:
        losses = workers.map(unit, windows)
    loss = sum(losses) / len(losses)
    if not math.isfinite(loss):
        raise ModelError(
            f"the loss on {text.name} is not finite; the model's weights or its {dtype} arithmetic are broken"
        )
    bos = bool(len(tokens)) and int(tokens[0]) == tokenizer.bos_token_id
    content_tokens = len(tokens) - int(bos)
    return Perplexity(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) * content_tokens / text.bytes,
        loss=loss,
        tokens=int(windows.numel()),
        windows=len(windows),
        protocol=_protocol(windows, tokens, bos, _quantized(model), dtype or str(model.dtype).removeprefix("torch.")),
        text=text.name,
        text_sha256=text.sha256,
    )


def window_for(context: int | None, asked: int | None) -> int:
    """Tokens a window for a model of this context. Raises TextError where those asked for do not fit it."""
    context = context or 2048
    window = asked or min(2048, context)
    if not 2 <= window <= context:
        raise TextError(
            f"a window of {window} tokens does not fit the model's context of {context}; choose 2 to {context}"
        )
    return window


def _quantized(model: Any) -> str:
    """What is quantized in a model, and to how many bits."""
    from bitwright.integrations.transformers import recipe_of

    recipe = recipe_of(model)
    if recipe is None:
        return "nothing quantized"
    weights = bits_word(layer["bits"] for layer in model.config.quantization_config.layers.values())
    activations = f"activations {recipe.activations.bits}-bit" if recipe.activations else "activations 16-bit"
    cache = f"KV cache {recipe.kv.bits}-bit" if recipe.kv else "KV cache 16-bit"
    return f"weights {weights}-bit {recipe.name}, {activations}, {cache}"


def _protocol(windows: Tensor, tokens: Tensor, bos: bool, quantized: str, dtype: str) -> str:
    measured, window = windows.shape
    available = len(tokens) // window
    part = f", the first {measured} of {available} windows of the text" if measured < available else ""
    return (
        f"windows of {window} tokens, stride {window}, {'BOS once at the start of the text' if bos else 'no BOS'},"
        f" mean loss over {window - 1} targets a window, windows averaged{part}; {quantized}; {dtype}"
    )
