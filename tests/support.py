"""What the behaviour tests share: small models, a command runner, readers of files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import struct
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import bitwright
from bitwright.calibration import Text

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BITWRIGHT_SHARED") or REPO.parent / "shared")

CONTEXT = 128
# What every small quantization uses unless the test is about something else.
SMALL = {"calibration.sequences": 6, "calibration.length": 64}


# --- text -------------------------------------------------------------------------------------------------------------


def words(count: int, seed: int) -> str:
    """Text of made-up words in sentences and paragraphs, the same for the same seed."""
    rng = random.Random(seed)
    syllables = ["ba", "ren", "tol", "mi", "sha", "kur", "ve", "lon", "pi", "da", "gor", "est", "a", "un", "i", "to"]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(150)]
    weights = [1 / (rank + 1) for rank in range(len(lexicon))]
    parts: list[str] = []
    written = 0
    while written < count:
        sentences = []
        for _ in range(rng.randint(2, 5)):
            length = rng.randint(4, 12)
            sentences.append(" ".join(rng.choices(lexicon, weights, k=length)).capitalize() + ".")
            written += length
        parts.append(" ".join(sentences))
    return "\n\n".join(parts) + "\n"


def save_tokenizer(
    directory: Path, text: str, size: int = 300, bos: bool = False, chat_template: str | None = None
) -> None:
    """A byte-level BPE tokenizer trained on `text`, saved as Hugging Face files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if chat_template:
        fast.chat_template = chat_template
    fast.save_pretrained(directory)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


# --- models -----------------------------------------------------------------------------------------------------------


def give_structure(model: nn.Module, seed: int) -> None:
    """Make a few input channels of norms and linears eight times as large, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "lm_head" in name:
                continue
            if parameter.dim() == 1 and "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
                parameter[torch.randperm(len(parameter), generator=generator)[:3]] *= 8
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
                parameter[:, torch.randperm(parameter.shape[1], generator=generator)[:3]] *= 8


def save_model(
    directory: Path,
    config: Any,
    dtype: torch.dtype,
    seed: int,
    max_shard_size: str | None = None,
    **tokenizer: Any,
) -> Path:
    """A randomly initialised model of that config with structure in its weights, and its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    give_structure(model, seed)
    extra = {"max_shard_size": max_shard_size} if max_shard_size else {}
    model.to(dtype).save_pretrained(directory, **extra)
    save_tokenizer(directory, words(3000, seed), **tokenizer)
    return directory


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The one `error:` line of a refused command, without its first word."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, f"expected one error line, found {self.err!r}"
        return lines[0].removeprefix("error: ")


def run_cli(*arguments: str | Path, stdin: str = "") -> Outcome:
    """`bitwright ARGUMENTS` in this process: the same entry point, argv, streams and exit code as the command."""
    from bitwright.cli import main

    out, err = io.StringIO(), io.StringIO()
    argv, source = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["bitwright", *map(str, arguments)], io.StringIO(stdin)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
            except BaseException:
                # What the interpreter would do: a traceback and exit code 1.
                traceback.print_exc()
                code = 1
    finally:
        sys.argv, sys.stdin = argv, source
    return Outcome(code, out.getvalue(), err.getvalue())


# --- files ------------------------------------------------------------------------------------------------------------


def tree(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below `directory`."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_threads_do_not_show(model: Path, recipe: bitwright.Recipe, calibration: Text, folder: Path) -> None:
    """Quantizes into `folder`/1 with one thread and into `folder`/3 with three: the same bytes."""
    for threads in (1, 3):
        bitwright.quantize(model, folder / str(threads), recipe, calibration, threads=threads)
    assert tree(folder / "1") == tree(folder / "3")


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file as its bytes say: no library of tensors takes part."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes


def read_safetensors(path: Path) -> dict[str, Entry]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: Entry(
            path.name,
            entry["dtype"],
            tuple(entry["shape"]),
            data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def read_tensors(directory: Path) -> dict[str, Entry]:
    """All tensors of all weight files of a directory."""
    found: dict[str, Entry] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(read_safetensors(path))
    return found


def write_safetensors(path: Path, entries: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file from raw bytes; dtypes and shapes are not checked, on purpose."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, raw) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in entries.values()))


def rewrite_safetensors(path: Path, change: Any) -> None:
    """Apply `change` to the dict name -> (dtype, shape, bytes) of a weight file."""
    entries = {name: (entry.dtype, entry.shape, entry.raw) for name, entry in read_safetensors(path).items()}
    change(entries)
    write_safetensors(path, entries)


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(bytes(data))


def edit_json(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
