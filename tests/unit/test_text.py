from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitwright.calibration import (
    consecutive_windows,
    load_tokenizer,
    random_windows,
    read_text,
    text_of,
    tokenize,
)
from bitwright.errors import ModelError, TextError

from .twins import examples

STORY = "Once upon a time\nthere was a quantizer.\n\nThe end.\n"


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "no_suffix"])
def test_plain_text_is_taken_verbatim(tmp_path: Path, name: str) -> None:
    text = read_text([write(tmp_path / name, STORY + "é\n")])
    assert text.name == name
    assert text.content == STORY + "é\n"
    assert text.sha256 == hashlib.sha256((STORY + "é\n").encode()).hexdigest()
    assert text.bytes == len(STORY) + 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_records_of_jsonl_are_joined_by_a_blank_line(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": "one\ntwo", "id": 3}), "", json.dumps({"text": "three"}), "  "]
    assert read_text([write(tmp_path / name, "\n".join(lines))]).content == "one\ntwo\n\nthree"
    assert read_text([write(tmp_path / name, "\r\n".join(lines))]).content == "one\ntwo\n\nthree"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_jsonl_ends_at_a_newline_alone(tmp_path: Path, separator: str) -> None:
    """JSON allows these unescaped inside a string, and str.splitlines would cut there."""
    line = json.dumps({"text": f"one{separator}two"}, ensure_ascii=False)
    assert read_text([write(tmp_path / "a.jsonl", line + "\n")]).content == f"one{separator}two"


def test_several_files_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    paths: list[str | Path] = [write(tmp_path / "a.txt", "one\n"), str(write(tmp_path / "b.txt.xz", "two"))]
    text = read_text(paths)
    assert (text.name, text.content) == ("a.txt+b.txt.xz", "one\n\n\ntwo")
    assert text.sha256 != read_text(paths[::-1]).sha256


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        ("none", " a b \nc\n\nd\n"),
        ("space", "a b c  d"),
        ("blank-line", "a b\n\nc\n\n\n\nd"),
    ],
)
def test_joins_of_lines(tmp_path: Path, join: str, expected: str) -> None:
    assert read_text([write(tmp_path / "a.txt", " a b \nc\n\nd\n")], join).content == expected
    if join != "none":
        assert read_text([write(tmp_path / "a.txt", " a b \r\nc\r\n\r\nd\r\n")], join).content == expected


def test_joins_cut_at_newlines_alone(tmp_path: Path) -> None:
    assert read_text([write(tmp_path / "a.txt", "a\u2028b\x85c\nd\n")], "space").content == "a\u2028b\x85c d"


def test_joins_reach_across_no_file(tmp_path: Path) -> None:
    paths: list[str | Path] = [write(tmp_path / "a.txt", "a\nb\n"), write(tmp_path / "b.txt", "c\nd\n")]
    assert read_text(paths, "space").content == "a b\n\nc d"


def test_text_at_hand() -> None:
    text = text_of("note", "hello")
    assert (text.name, text.content, text.bytes) == ("note", "hello", 5)
    with pytest.raises(TextError, match="note holds no text"):
        text_of("note", " \n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\t\n", "blank.txt is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"latin.txt is not UTF-8 text \(byte 3\); convert it first"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl line 2 is not a JSON object with a field 'text'"),
        ("a.jsonl", b'{"body": "a"}', "a.jsonl line 1 is not a JSON object with a field 'text'"),
        ("a.jsonl", b'\n["text"]', "a.jsonl line 2 is not a JSON object with a field 'text'"),
        ("a.jsonl", b'"text"', "a.jsonl line 1 is not a JSON object with a field 'text'"),
        ("a.jsonl", b'{"text": 5}', "a.jsonl line 1 is not a JSON object with a field 'text'"),
        ("a.jsonl", b'{"text": null}', "a.jsonl line 1 is not a JSON object with a field 'text'"),
        ("none.jsonl", b'{"text": ""}', "none.jsonl is empty"),
    ],
)
def test_unusable_content_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(TextError, match=message):
        read_text([write(tmp_path / name, content)])


def test_broken_archives_are_named(tmp_path: Path) -> None:
    whole = lzma.compress(STORY.encode())
    for content in (b"this is not xz", whole[: len(whole) // 2]):
        (tmp_path / "a.txt.xz").write_bytes(content)
        with pytest.raises(TextError, match=r"a.txt.xz is not a whole .xz file"):
            read_text([tmp_path / "a.txt.xz"])


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no text file was given"):
        read_text([])
    with pytest.raises(TextError, match=r"gone.txt does not exist"):
        read_text([tmp_path / "gone.txt"])
    with pytest.raises(TextError, match=r"is a directory; give a text file"):
        read_text([tmp_path])
    inside_a_file = write(tmp_path / "a.txt", STORY) / "b.txt"
    with pytest.raises(TextError, match=r"cannot read text file .*b.txt: Not a directory"):
        read_text([inside_a_file])


# --- windows ---


def test_random_windows_are_drawn_by_the_seed_alone() -> None:
    tokens = torch.arange(1000)
    text = text_of("t", "x")
    windows = random_windows(tokens, 50, 16, 7, text)
    assert windows.shape == (50, 16)
    assert torch.equal(windows, random_windows(tokens, 50, 16, 7, text))
    assert not torch.equal(windows, random_windows(tokens, 50, 16, 8, text))
    assert torch.equal(windows[:20], random_windows(tokens, 20, 16, 7, text))
    assert (windows.diff(dim=1) == 1).all()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
@examples(60)
def test_random_windows_stay_inside(total: int, length: int, seed: int) -> None:
    tokens, text = torch.arange(total), text_of("corpus", "x")
    if length > total:
        message = f"corpus has {total} tokens and one window needs {length}; give more text or a smaller"
        with pytest.raises(TextError, match=message + r" calibration\.length"):
            random_windows(tokens, 5, length, seed, text)
        return
    windows = random_windows(tokens, 40, length, seed, text)
    assert windows.dtype == torch.int64
    assert 0 <= int(windows.min()) <= int(windows.max()) < total
    if total - length <= 2:  # every start is drawn in 40 tries, the first and the last too
        assert set(windows[:, 0].tolist()) == set(range(total - length + 1))


@given(st.integers(0, 40), st.integers(1, 12), st.one_of(st.none(), st.integers(1, 9)))
@examples(60)
def test_consecutive_windows(total: int, length: int, limit: int | None) -> None:
    tokens, text = torch.arange(total), text_of("corpus", "x")
    if total < length:
        with pytest.raises(TextError, match=f"corpus has {total} tokens and one window needs {length}.*--window"):
            consecutive_windows(tokens, length, limit, text)
        return
    windows = consecutive_windows(tokens, length, limit, text)
    count = total // length if limit is None else min(limit, total // length)
    assert windows.tolist() == [list(range(i * length, (i + 1) * length)) for i in range(count)]


# --- tokens ---


def tokenizer_of(words: dict[str, int]) -> Any:
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", words["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


WORDS = {"<s>": 0, "<unk>": 1, "once": 2, "upon": 3, "time": 9}


def test_tokens_start_with_one_beginning(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(WORDS)
    text = text_of("t", "once upon\n\nonce more time")
    expected = [0, 2, 3, 2, 1, 9]
    assert tokenize(tokenizer, text).tolist() == expected
    assert tokenize(tokenizer, text).dtype == torch.int64
    tokenizer.save_pretrained(tmp_path)
    assert tokenize(load_tokenizer(tmp_path), text).tolist() == expected
    assert tokenize(load_tokenizer(str(tmp_path)), text, vocabulary=10).tolist() == expected


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    text = text_of("t", "once upon time")
    with pytest.raises(ModelError, match=r"makes token 9, but the model's vocabulary has 9;.*do not belong together"):
        tokenize(tokenizer_of(WORDS), text, vocabulary=9)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer that transformers can load: \w"):
        load_tokenizer(tmp_path)
