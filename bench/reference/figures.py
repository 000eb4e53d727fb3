"""Measures a trained model with bitwright's evaluator, checks it against a plain loop, and writes both on its card.

Usage: python bench/reference/figures.py MODEL --text wikitext2_test.txt --text wiki_valid.txt --text ptb.test.txt
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitwright.calibration import read_text
from bitwright.evaluation.perplexity import evaluate_model

HEADING = "## Figures"
PROMPT = "The history of the city begins in the"
# More of a text would only repeat what these say of the evaluator, for hours on a CPU.
PLAIN_WINDOWS = 100


def plain_loop(model: Any, tokenizer: Any, text: str) -> float:
    """Perplexity by nothing but transformers: disjoint windows of the context, mean loss of each, averaged.

    Of the first PLAIN_WINDOWS windows.
    """
    window = min(2048, model.config.max_position_embeddings)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    losses = []
    with torch.inference_mode():
        for row in ids[: len(ids) // window * window].view(-1, window)[:PLAIN_WINDOWS]:
            losses.append(float(model(input_ids=row[None], labels=row[None]).loss))
    return math.exp(sum(losses) / len(losses))


def measure(model: Any, tokenizer: Any, texts: list[Path], limit: int | None = None) -> list[dict[str, Any]]:
    """Both perplexities of every text, or of its first `limit` windows."""
    rows = []
    for path in texts:
        text = read_text([path])
        found = evaluate_model(model, tokenizer, text, limit=limit)
        same = found if found.windows <= PLAIN_WINDOWS else evaluate_model(model, tokenizer, text, limit=PLAIN_WINDOWS)
        plain = plain_loop(model, tokenizer, path.read_text(encoding="utf-8"))
        rows.append(
            {
                **found.to_dict(),
                "cut": found.windows == limit,
                "plain_loop": plain,
                "plain_windows": same.windows,
                "same": same.perplexity,
            }
        )
        print(
            f"{path.name}: {found.perplexity:.4f} a token, {found.bits_per_byte:.4f} bits a byte;"
            f" plain loop {plain:.4f}, and {same.perplexity:.4f} on its {same.windows} windows",
            flush=True,
        )
    return rows


def sample(model: Any, tokenizer: Any) -> str:
    """Fifty tokens after a prompt, drawn with seed 0."""
    torch.manual_seed(0)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=50, min_new_tokens=50, do_sample=True, temperature=0.7, top_p=0.9)
    return tokenizer.decode(out[0])


def section(rows: list[dict[str, Any]], text: str) -> str:
    """The card's section, in Markdown."""
    lines = [
        HEADING,
        "",
        "By `bitwright eval MODEL --text TEXT`, with `--windows N` where it says first N windows (and by a plain loop"
        " over transformers); both in float32.",
        "",
        "| text | perplexity a token | bits a byte | plain loop | tokens |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        part = row["plain_windows"] < row["windows"]
        note = f" ({row['same']:.4f} by `eval`, first {row['plain_windows']} windows)" if part else ""
        cut = f", first {row['windows']} windows" if row["cut"] else ""
        lines.append(
            f"| `{row['text']}`{cut} | {row['perplexity']:.4f} | {row['bits_per_byte']:.4f} "
            f"| {row['plain_loop']:.4f}{note} | {row['tokens']:,} |"
        )
    protocol = next((row for row in rows if not row["cut"]), rows[0])["protocol"]
    lines += ["", f"Protocol: {protocol}.", ""]
    lines += [f'Fifty tokens after "{PROMPT}" (temperature 0.7, top-p 0.9, seed 0):', ""]
    lines += [f"> {line}" for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--windows", type=int, help="at most so many windows of each text (default: all)")
    args = parser.parse_args(argv)
    missing = [str(path) for path in [args.model / "README.md", *args.text] if not path.is_file()]
    if missing:
        print(f"error: no file {', '.join(missing)}", file=sys.stderr)
        return 2
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = measure(model, tokenizer, args.text, args.windows)
    (args.model / "figures.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    card = args.model / "README.md"
    kept = card.read_text(encoding="utf-8").split(HEADING)[0].rstrip()
    card.write_text(f"{kept}\n\n{section(rows, sample(model, tokenizer))}", encoding="utf-8")
    worst = max(abs(row["same"] / row["plain_loop"] - 1) for row in rows)
    print(f"largest relative difference from the plain loop: {worst:.1e}")
    return 0 if worst <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
