"""`generate` and `chat` through the command line, on originals and on artifacts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import bitwright
import support

PROMPT = "Renta mi ba."


def continued(directory: Path, prompt: str, tokens: int) -> str:
    """Greedy text by the API, prompt included."""
    model, tokenizer = bitwright.load(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["original", "artifact"])
def test_generate_is_greedy_by_default(kind: str, models: dict[str, Path], artifact: Callable[..., Path]) -> None:
    directory = models["llama"] if kind == "original" else artifact("llama")
    outcome = support.run_cli("generate", directory, PROMPT, "--max-new-tokens", "8")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(PROMPT)
    assert outcome.out.rstrip("\n") == continued(directory, PROMPT, 8).rstrip("\n")


def test_sampling_has_a_seed(artifact: Callable[..., Path]) -> None:
    command = ["generate", artifact("llama"), PROMPT, "--max-new-tokens", "12", "--temperature", "1.5", "--seed"]
    one, again, other = (support.run_cli(*command, seed) for seed in ("1", "1", "2"))
    assert one.code == 0
    assert one.out == again.out
    assert one.out != other.out


def test_generation_stops_at_the_context(artifact: Callable[..., Path]) -> None:
    """Asked for more than fits, it makes what fits, and no error."""
    outcome = support.run_cli("generate", artifact("qwen2"), PROMPT * 9, "--max-new-tokens", "5000")
    assert outcome.code == 0
    tokenizer = AutoTokenizer.from_pretrained(artifact("qwen2"))
    assert len(tokenizer(outcome.out)["input_ids"]) <= support.CONTEXT + 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_generate_in_16_bits(dtype: str, artifact: Callable[..., Path]) -> None:
    outcome = support.run_cli("generate", artifact("mistral"), PROMPT, "--max-new-tokens", "3", "--dtype", dtype)
    assert outcome.code == 0
    assert outcome.out.startswith(PROMPT)


def chat(directory: Path, said: str, *options: str) -> support.Outcome:
    return support.run_cli("chat", directory, "--max-new-tokens", "6", "--temperature", "0", *options, stdin=said)


def answer(directory: Path, text: str, special: bool) -> str:
    """What the model says after `text`, by the API."""
    model, tokenizer = bitwright.load(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_chat_with_a_template(artifact: Callable[..., Path]) -> None:
    """Two turns and a system message: the second answer has seen the first exchange, /exit ends."""
    directory = artifact("llama")
    outcome = chat(directory, "Ba ren.\nTol mi?\n/exit\nnever read\n", "--system", "Sha kur.")
    assert outcome.code == 0
    assert "no chat template" not in outcome.err
    assert outcome.err == ""
    opening = "system: Sha kur.\nuser: Ba ren.\nassistant:"
    first = answer(directory, opening, special=False)
    second = answer(directory, f"{opening} {first}\nuser: Tol mi?\nassistant:", special=False)
    assert first in outcome.out
    assert second in outcome.out


def test_chat_without_a_template(artifact: Callable[..., Path]) -> None:
    directory = artifact("mistral")
    outcome = chat(directory, "Ba ren.\n")
    assert outcome.code == 0, "end of input ends the conversation"
    assert "no chat template" in outcome.err
    assert outcome.out.strip("\n") == answer(directory, "Ba ren.", special=True).strip("\n")


STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + support.CHAT_TEMPLATE
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (STRICT, "System role not supported"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
    ],
)
def test_a_template_that_refuses(template: str, said: str, artifact_copy: Path) -> None:
    """In one line, with what the template says and what may be done."""
    (artifact_copy / "chat_template.jinja").write_text(template)
    outcome = chat(artifact_copy, "Ba ren.\n", "--system", "Sha kur.")
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert f"chat template of {artifact_copy} " in outcome.message
    assert said in outcome.message
    assert "without --system" in outcome.message
    if template == STRICT:
        assert chat(artifact_copy, "Ba ren.\n").code == 0


@pytest.mark.parametrize("ending", ["", "\n", "/exit\n", "  \n"])
def test_chat_ends(ending: str, artifact: Callable[..., Path]) -> None:
    outcome = chat(artifact("mistral"), ending)
    assert outcome.code == 0
    assert outcome.out == ""


def test_reset_forgets(artifact: Callable[..., Path]) -> None:
    """After /reset the same words get the same answer as in the beginning."""
    directory = artifact("llama")
    once = chat(directory, "Ba ren.\n").out
    assert chat(directory, "Ba ren.\n/reset\nBa ren.\n").out == once * 2
    assert chat(directory, "Ba ren.\nBa ren.\n").out != once * 2


def test_a_long_conversation_forgets_its_beginning(artifact: Callable[..., Path]) -> None:
    """Beyond the context the oldest exchange goes, aloud, and the talk goes on."""
    directory = artifact("llama")
    line = "Ba ren tol mi sha kur ve lon pi da gor est.\n"
    outcome = chat(directory, line * 8)
    assert outcome.code == 0
    assert "the oldest exchange is forgotten" in outcome.err
    assert "error:" not in outcome.err


def test_a_line_beyond_the_context_is_refused(artifact: Callable[..., Path]) -> None:
    outcome = chat(artifact("llama"), "Ba ren tol mi sha kur " * 60 + "\n")
    assert outcome.code == 1
    assert "the model's context is 128" in outcome.message
    assert "Traceback" not in outcome.err


def test_version_and_help() -> None:
    outcome = support.run_cli("--version")
    assert (outcome.code, outcome.out) == (0, f"bitwright {bitwright.__version__}\n")
    outcome = support.run_cli("--help")
    assert outcome.code == 0
    for command in ("demo", "plan", "quantize", "verify", "eval", "generate", "chat"):
        assert command in outcome.out
