"""bitwright chat: a conversation with a model or an artifact on the terminal."""

from __future__ import annotations

import sys
from typing import Any

import typer

from bitwright.cli import console, options
from bitwright.cli.generate import stream


def command(
    path: options.ModelOrArtifact,
    system: str | None = typer.Option(None, help="system message, where the model's chat template has one"),
    max_new_tokens: int = typer.Option(256, min=1, help="tokens an answer at most"),
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
) -> None:
    """Talk. An empty line or /exit ends; /reset forgets what was said."""
    from bitwright.calibration import load_tokenizer
    from bitwright.evaluation import load

    model, tokenizer = load(path, dtype), load_tokenizer(path)
    if not tokenizer.chat_template:
        console.err.print("this model has no chat template: what you write is continued as plain text")
    opening = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = list(opening)
    while True:
        try:
            said = console.err.input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if said in ("", "/exit"):
            break
        if said == "/reset":
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": said})
        ids = _prompt(tokenizer, turns, model, max_new_tokens, path)
        answer = stream(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed + len(turns), skip_prompt=True)
        turns.append({"role": "assistant", "content": answer})


def _prompt(tokenizer: Any, turns: list[dict[str, str]], model: Any, max_new_tokens: int, path: str) -> Any:
    """Token ids of the conversation; where it outgrows the context, the oldest exchanges are forgotten, aloud."""
    from bitwright.models import context_length

    context = context_length(model.config)
    room = max(context - max_new_tokens, context // 2) if context else 0
    while True:
        if tokenizer.chat_template:
            text = _written_out(tokenizer, turns, path)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(" ".join(turn["content"] for turn in turns), return_tensors="pt")["input_ids"]
        oldest = 1 if turns[0]["role"] == "system" else 0
        if not room or ids.shape[1] <= room or len(turns) <= oldest + 1:
            return ids
        console.err.print("(the conversation is longer than the context: the oldest exchange is forgotten)")
        del turns[oldest : oldest + 2]


def _written_out(tokenizer: Any, turns: list[dict[str, str]], path: str) -> str:
    """The conversation as the chat template has it. Raises ModelError where that refuses it: it is a program of the
    model's, which may raise what it likes."""
    from bitwright.errors import ModelError
    from bitwright.models.passes import first_line

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as problem:
        hint = "; try without --system" if turns[0]["role"] == "system" else "; `bitwright generate` takes plain text"
        raise ModelError(
            f"the chat template of {path} does not take this conversation: {first_line(problem)}{hint}"
        ) from None
