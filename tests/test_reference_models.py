"""The models in reference/ are what their cards say. Skipped where the repository is not a checkout that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import support

MODELS = sorted(path.parent for path in (support.REPO / "reference").glob("*/config.json"))
# In bfloat16 the three shapes alone are 107 MB (5.5, 16.2 and 32.0 million parameters).
BYTES = 111_000_000


def figures_of(model: Path) -> Any:
    return json.loads((model / "figures.json").read_text())


def test_all_together_they_are_small() -> None:
    files = [path for path in (support.REPO / "reference").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BYTES
    assert all(path.stat().st_size < 16 * 2**20 for path in files)


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_the_card_says_what_was_measured(model: Path) -> None:
    card = (model / "README.md").read_text()
    figures = figures_of(model)
    assert {row["text"] for row in figures} >= {"wikitext2_test.txt", "wiki_valid.txt", "ptb.test.txt"}
    for row in figures:
        assert f"| {row['perplexity']:.4f} | {row['bits_per_byte']:.4f} |" in card
        assert row.get("same", row["perplexity"]) == pytest.approx(row["plain_loop"], rel=1e-3)
    for word in (
        "tokens seen in",
        "seconds of training steps on",
        "python bench/reference/train.py",
        "| training loss |",
    ):
        assert word in card


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_it_writes(model: Path) -> None:
    """Fifty tokens that are no loop: bfloat16 shards load, and the most frequent of them is not most of them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("The history of the city begins in the", return_tensors="pt").input_ids
    torch.manual_seed(0)
    written = loaded.generate(ids, max_new_tokens=50, min_new_tokens=50, do_sample=True, temperature=0.7, top_p=0.9)
    new = written[0, ids.shape[1] :].tolist()
    assert len(new) == 50
    assert max(new.count(token) for token in set(new)) < 15


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_eval_prints_the_figures_of_the_card(model: Path, shared: Path) -> None:
    """On the shortest of its texts."""
    row = next(row for row in figures_of(model) if row["text"] == "ptb.test.txt")
    found = support.run_cli("eval", model, "--text", shared / "text" / "ptb.test.txt", "--json").json
    assert found["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert found["text_sha256"] == row["text_sha256"]
