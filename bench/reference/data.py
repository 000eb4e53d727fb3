"""Text sources, the tokenizer, cached token files and the order in which training sees their windows."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import lzma
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
CORPUS = Path(__file__).resolve().parents[2] / "src" / "bitwright" / "demo" / "corpus.py"
SKIPPED_FOLDERS = {"__pycache__", "_bundled", "dist-packages", "idle_test", "pydoc_data", "site-packages"}
SKIPPED_FOLDERS |= {"test", "tests"}
# A document is tokenised in pieces of about this many characters, cut at line ends, to bound memory.
PIECE_CHARS = 200_000
# A heading of the first level; deeper ones have a second equals sign right after the first.
TITLE = re.compile(r" = [^=\n]+ = \n?")


class RecipeError(Exception):
    """Something the person at the command line has to put right; shown as one line."""


def demo_corpus() -> ModuleType:
    """The package's demo text module, loaded by its file so that the package need not be installed."""
    if not CORPUS.is_file():
        raise RecipeError(f"{CORPUS.name} is missing: run from a checkout that has src/bitwright/demo")
    spec = importlib.util.spec_from_file_location("bitwright_demo_corpus", CORPUS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stdlib_docstrings() -> Iterator[str]:
    """One document per standard library module: its docstrings in source order."""
    held_out: frozenset[str] = demo_corpus().evaluation_paragraphs()
    top = Path(sysconfig.get_path("stdlib"))
    for folder, names, files in os.walk(top):
        names[:] = sorted(name for name in names if name not in SKIPPED_FOLDERS)
        for file in sorted(name for name in files if name.endswith(".py")):
            try:
                tree = ast.parse((Path(folder) / file).read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            found: dict[str, None] = {}
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = (ast.get_docstring(node) or "").strip()
                    flat = " ".join(text.split())
                    if text and not any(part in flat for part in held_out):
                        found[text] = None
            if found:
                yield "\n\n".join(found) + "\n"


def file_documents(path: Path, max_bytes: int | None, headings: bool = False) -> Iterator[str]:
    """The documents of a plain or .xz text file, separated by lines that say only the end token.

    With `headings`, a line ` = Title = ` starts a document too, as in WikiText, which has no other mark.
    """
    lines: list[str] = []
    left = max_bytes if max_bytes is not None else 1 << 62
    with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as stream:
        for raw in stream:
            left -= len(raw)
            if left < 0:
                break
            line = raw.decode("utf-8", errors="replace")
            ended = line.strip() == END
            if (ended or (headings and TITLE.fullmatch(line))) and lines:
                yield "".join(lines)
                lines = []
            if not ended:
                lines.append(line)
    if lines:
        yield "".join(lines)


SPECIAL_SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "pydoc-topics": lambda: iter([demo_corpus().training_text()]),
    "pydoc-topics-evaluation": lambda: iter([demo_corpus().evaluation_text()]),
    "stdlib-docstrings": stdlib_docstrings,
}


def source_path(name: str, text_dir: Path | None) -> Path | None:
    """The file of a source, None for the built-in ones; a missing file is the person's to put right."""
    if name in SPECIAL_SOURCES:
        return None
    if text_dir is None:
        raise RecipeError(f"the recipe reads {name}: say with --text-dir which folder holds it")
    if not (text_dir / name).is_file():
        raise RecipeError(f"no file {name} in the --text-dir {text_dir}")
    return text_dir / name


def documents(source: dict[str, Any], text_dir: Path | None) -> Iterator[str]:
    """The documents of one source of a recipe, no more than its `max_bytes`."""
    name, cap = source["name"], source.get("max_bytes")
    path = source_path(name, text_dir)
    if path is not None:
        yield from file_documents(path, cap, source.get("split") == "headings")
        return
    left = cap if cap is not None else 1 << 62
    for text in SPECIAL_SOURCES[name]():
        if left <= 0:
            return
        raw = text.encode()
        # A character cut in half by the cap is left out.
        yield text if len(raw) <= left else raw[:left].decode(errors="ignore")
        left -= len(raw)


def pieces(text: str) -> Iterator[str]:
    """`text` in parts of about PIECE_CHARS, each but the last ending at a line end."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = text.rfind("\n", start, start + PIECE_CHARS) + 1
        cut = cut if cut > start else start + PIECE_CHARS
        yield text[start:cut]
        start = cut
    yield text[start:]


def train_tokenizer(recipe: dict[str, Any], text_dir: Path | None) -> Tokenizer:
    """A byte-level BPE tokenizer: no unknown token, and decoding gives the text back byte for byte."""
    settings = recipe["tokenizer"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample() -> Iterator[str]:
        total = sum(source["weight"] for source in recipe["sources"])
        for source in recipe["sources"]:
            budget = int(settings["sample_bytes"] * source["weight"] / total)
            # A small source is read again until it has its share of the sample, as it has of the training.
            while budget > 0:
                before = budget
                for text in documents(source, text_dir):
                    yield text[:budget]
                    budget -= len(text)
                    if budget <= 0:
                        break
                if before == budget:
                    raise RecipeError(f"source {source['name']} has no text")

    tokenizer.train_from_iterator(sample(), trainer)
    if tokenizer.get_vocab_size() != settings["vocab_size"]:
        raise RecipeError(f"the text gave only {tokenizer.get_vocab_size()} of {settings['vocab_size']} tokens")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """tokenizer.json and tokenizer_config.json as AutoTokenizer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[np.ndarray]:
    """Token ids of each batch of documents, an end token in front of every document."""
    end = tokenizer.token_to_id(END)
    marked = (("" if number else END) + piece for text in texts for number, piece in enumerate(pieces(text)))
    while batch := list(itertools.islice(marked, 64)):
        ids = [item.ids for item in tokenizer.encode_batch(batch, add_special_tokens=False)]
        yield np.fromiter(itertools.chain.from_iterable(ids), dtype=np.uint16)
    yield np.array([end], dtype=np.uint16)


def token_file(source: dict[str, Any], tokenizer: Tokenizer, text_dir: Path | None, folder: Path) -> np.ndarray:
    """The source's tokens as a read-only memory map, made on the first call."""
    if tokenizer.get_vocab_size() > 1 << 16:
        raise RecipeError("token files hold 16-bit ids: vocab_size must be at most 65536")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{source['name'].replace('/', '_')}.{source.get('max_bytes', 'all')}.npy"
    if not path.exists():
        parts = list(encode(tokenizer, documents(source, text_dir)))
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(parts))
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


class Windows:
    """Which window of which source is trained on at each position; a function of the seed alone.

    Every source is passed over in a new order, with a new offset of its windows, for each epoch, and the sources are
    mixed in one shuffled order: so the data position is just the number of windows done, and resuming needs no state.
    """

    def __init__(self, tokens: list[np.ndarray], weights: list[float], total: int, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        share = np.asarray(weights, dtype=np.float64) / sum(weights)
        counts = np.floor(share * total).astype(np.int64)
        counts[int(np.argmax(share))] += total - int(counts.sum())
        self.source = np.repeat(np.arange(len(tokens)), counts)
        np.random.default_rng([seed, 1]).shuffle(self.source)
        self.rank = np.zeros(total, dtype=np.int64)
        for index, count in enumerate(counts):
            self.rank[self.source == index] = np.arange(count)
        self.counts = counts
        self.epoch_windows = [(len(part) - context - 1) // context for part in tokens]
        if min(self.epoch_windows) < 1:
            raise RecipeError(f"a source is shorter than one window of {context} tokens")
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def _order(self, source: int, epoch: int) -> tuple[int, np.ndarray]:
        key = (source, epoch)
        if key not in self._orders:
            rng = np.random.default_rng([self.seed, 2, source, epoch])
            order = int(rng.integers(self.context)), rng.permutation(self.epoch_windows[source])
            self._orders = {old: kept for old, kept in self._orders.items() if old[0] != source}
            self._orders[key] = order
        return self._orders[key]

    def epochs(self) -> list[float]:
        """How often the whole run passes over each source."""
        return [float(count / windows) for count, windows in zip(self.counts, self.epoch_windows, strict=True)]

    def batch(self, first: int, count: int) -> np.ndarray:
        """Windows `first` to `first + count`, each of context + 1 tokens, as int64 rows."""
        rows = np.empty((count, self.context + 1), dtype=np.int64)
        for row in range(count):
            source = int(self.source[first + row])
            epoch, place = divmod(int(self.rank[first + row]), self.epoch_windows[source])
            offset, order = self._order(source, epoch)
            start = offset + int(order[place]) * self.context
            rows[row] = self.tokens[source][start : start + self.context + 1]
        return rows
