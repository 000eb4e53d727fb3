"""Text files to token windows: local files, read whole, tokenised once, cut by a stated rule."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import ModelError, TextError

JOINS = {"none": None, "space": " ", "blank-line": "\n\n"}


@dataclass(frozen=True)
class Text:
    """A text with its provenance."""

    name: str
    content: str
    sha256: str

    @property
    def bytes(self) -> int:
        return len(self.content.encode("utf-8"))


def read_text(paths: list[str | Path], join: str = "none") -> Text:
    """Read .txt, .xz (compressed text) or .jsonl (field `text`) files; several are joined by a blank line.

    `join` first joins the lines of each file: `space` (PTB in the papers) or `blank-line`; `none` takes it verbatim.
    Raises TextError that names the file.
    """
    if not paths:
        raise TextError("no text file was given")
    contents = [_read_one(Path(path)) for path in paths]
    separator = JOINS[join]
    if separator is not None:
        contents = [separator.join(line.strip() for line in _lines(content)) for content in contents]
    content = "\n\n".join(contents)
    return Text(
        "+".join(Path(path).name for path in paths), content, hashlib.sha256(content.encode("utf-8")).hexdigest()
    )


def check_join(join: str) -> None:
    """Raises TextError where `join` is no way of joining lines."""
    if join not in JOINS:
        raise TextError(f"--join {join!r} is not one of {', '.join(JOINS)}")


def text_of(name: str, content: str) -> Text:
    """A text that is at hand as a string."""
    if not content.strip():
        raise TextError(f"{name} holds no text")
    return Text(name, content, hashlib.sha256(content.encode("utf-8")).hexdigest())


def _read_one(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
    except FileNotFoundError:
        raise TextError(f"text file {path} does not exist") from None
    except IsADirectoryError:
        raise TextError(f"{path} is a directory; give a text file") from None
    except OSError as error:
        raise TextError(f"cannot read text file {path}: {error.strerror}") from None
    except (lzma.LZMAError, EOFError) as error:
        raise TextError(f"{path} is not a whole .xz file: {error}") from None
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    if ".jsonl" in path.suffixes:
        content = _from_jsonl(path, content)
    if not content.strip():
        raise TextError(f"text file {path} is empty")
    return content


def _lines(content: str) -> list[str]:
    """Lines that end at newlines alone; str.splitlines cuts at U+2028 and others too, which may stand in a text."""
    return content.removesuffix("\n").split("\n")


def _from_jsonl(path: Path, content: str) -> str:
    texts = []
    for number, line in enumerate(_lines(content), 1):
        if not line.strip():
            continue
        try:
            text: Any = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise TextError(f"{path} line {number} is not a JSON object with a field 'text'")
        texts.append(text)
    return "\n\n".join(texts)


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a model directory. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{directory} has no tokenizer that transformers can load: {first}") from None


def tokenize(tokenizer: Any, text: Text, vocabulary: int | None = None) -> Tensor:
    """int64 [tokens]; a beginning-of-sequence token, where the tokenizer adds one, stands once at the start.

    Raises ModelError where the tokenizer makes ids that the model's embedding does not have.
    """
    ids = tokenizer(text.content, return_tensors=None, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    if vocabulary is not None:
        check_vocabulary(tokens, vocabulary)
    return tokens


def check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    """Raises ModelError where the embedding has no row for one of the tokens."""
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise ModelError(
            f"the tokenizer makes token {int(tokens.max())}, but the model's vocabulary has {vocabulary};"
            " tokenizer and weights do not belong together"
        )


def _too_short(text: Text, tokens: int, length: int, key: str) -> TextError:
    return TextError(
        f"{text.name} has {tokens} tokens and one window needs {length}; give more text or a smaller {key}"
    )


def random_windows(tokens: Tensor, sequences: int, length: int, seed: int, text: Text) -> Tensor:
    """`sequences` random segments, int64 [sequences, length] (GPTQ's calibration protocol)."""
    if len(tokens) < length:
        raise _too_short(text, len(tokens), length, "calibration.length")
    return torch.stack([tokens[at : at + length] for at in random_starts(len(tokens), sequences, length, seed)])


def random_starts(tokens: int, sequences: int, length: int, seed: int) -> list[int]:
    """Where the segments of `random_windows` begin; some may overlap."""
    generator = random.Random(seed)
    return [generator.randint(0, tokens - length) for _ in range(sequences)]


def consecutive_windows(tokens: Tensor, length: int, limit: int | None, text: Text, option: str = "--window") -> Tensor:
    """Windows side by side from the start, int64 [windows, length]; the rest of the text is left out.

    `option` is what a user sets the length by, for the message where the text is too short.
    """
    count = len(tokens) // length
    if limit is not None:
        count = min(count, limit)
    if count == 0:
        raise _too_short(text, len(tokens), length, option)
    return tokens[: count * length].view(count, length)
