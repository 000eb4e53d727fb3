"""Writes a run as a Hugging Face model folder: bfloat16 weights, tokenizer and a card with its figures."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import curve
import torch
import transformers
from transformers import GenerationConfig

if TYPE_CHECKING:
    from train import Run

SOURCE_NOTES = {
    "pydoc-topics": "the language help of `pydoc_data.topics` (part of every Python), without the demo's "
    "evaluation topics",
    "stdlib-docstrings": "the docstrings of the standard library of the Python that trained it, without tests",
    "wiki_train_a.txt.xz": "English Wikipedia articles of 2015 as plain text (CC BY-SA 3.0)",
    "wiki_train_b.txt.xz": "further English Wikipedia articles in WikiText's spacing (CC BY-SA 3.0)",
}
# Files of a repository stay small; transformers cuts a checkpoint at whole tensors.
SHARD_BYTES = 15 * 2**20
EVALUATION_NOTES = {
    "pydoc-topics-evaluation": "held-out topics of `pydoc_data.topics`: `evaluation_text()` of `bitwright.demo.corpus`",
    "wiki_valid.txt": "held-out English Wikipedia articles",
}


def machine(device: torch.device) -> str:
    """The processor that trained, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def size_note(size: int | None) -> str:
    """How much of a source was read, for the card."""
    return "all of it" if size is None else f"its first {size / 1e6:.4g} MB"


def card(run: Run) -> str:
    """The model card: what it is, what it read and what it reached."""
    recipe = run.recipe
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    records = curve.read(run.work / "curve.jsonl")
    train = [record for record in records if "loss" in record and record["step"] <= run.step]
    held_out = [record for record in records if "bits_per_byte" in record and record["step"] <= run.step]
    share = sum(source["weight"] for source in recipe["sources"])
    state = "the end of the run" if run.step == run.steps else f"step {run.step} of {run.steps}, before the end"
    lines = [
        f"# {recipe['name']}",
        "",
        f"A small {recipe['architecture']} of {parameters:,} parameters, trained from random weights for the tests and",
        "measurements of bitwright. It has learnt the shape of its text and few facts: use it to try quantization,",
        "not to answer questions.",
        "",
        "| trained on | share of tokens | passes |",
        "|---|---|---|",
    ]
    for source, epochs in zip(recipe["sources"], run.windows.epochs(), strict=True):
        what = SOURCE_NOTES.get(source["name"], f"`{source['name']}`")
        read = size_note(source.get("max_bytes"))
        weight, done = source["weight"] / share, epochs * run.step / run.steps
        lines.append(f"| {what}; {read} | {weight:.0%} | {done:.2f} |")
    speed = run.tokens / run.seconds if run.seconds else 0.0
    precision = "bfloat16 autocast" if run.bf16 else "float32"
    short = recipe.get("short_windows")
    windows = f"windows of {recipe['context']}"
    if short:
        first = run.short_steps * recipe["batch_windows"] * recipe["context"]
        windows = f"windows of {short['length']} for the first {first:,} and of {recipe['context']} after"
    lines += [
        "",
        f"Weights of {state}: {run.tokens:,} tokens seen in {windows}, batches of "
        f"{recipe['batch_windows'] * recipe['context']:,} tokens, seed {recipe['seed']}.",
        f"AdamW, peak learning rate {recipe['peak_lr']:g}, {recipe['warmup_steps']} warmup steps, then a cosine to "
        f"{recipe['final_lr_fraction']:.0%} of it; {precision}.",
        f"{run.seconds:,.0f} seconds of training steps on {run.machine}: {speed:,.0f} tokens a second "
        f"(torch {torch.__version__}, transformers {transformers.__version__}).",
        f"Tokenizer: byte-level BPE of {recipe['tokenizer']['vocab_size']} tokens, trained on the same text; "
        "`<|endoftext|>` stands before every document.",
        "",
        "The command, from a checkout of bitwright (TEXT: the folder with the text files):",
        "",
        f"    python bench/reference/train.py bench/reference/recipes/{run.args.recipe.name} "
        f"{''.join(f'--set {word} ' for word in run.args.set)}"
        f"{f'--tokens {run.args.tokens} ' if run.args.tokens else ''}--text-dir TEXT --work WORK --out OUT",
        "",
    ]
    if train:
        names = list(run.evaluation)
        lines += ["Loss curve: training loss in nats a token (mean of some steps), held-out text in bits a byte.", ""]
        lines += ["| tokens | training loss | " + " | ".join(f"`{name}`" for name in names) + " |"]
        lines += ["|---" * (2 + len(names)) + "|"]
        # About eight rows, the last record always among them.
        stride = max(1, len(held_out) // 8)
        for record in held_out[::-1][::stride][::-1]:
            loss = next(r["loss"] for r in reversed(train) if r["step"] <= record["step"])
            figures = " | ".join(f"{record['bits_per_byte'].get(name, float('nan')):.4f}" for name in names)
            lines.append(f"| {record['tokens']:,} | {loss:.4f} | {figures} |")
        lines.append("")
        for source in recipe["evaluation"]:
            read = size_note(source.get("max_bytes"))
            lines.append(f"`{source['name']}`: {EVALUATION_NOTES.get(source['name'], 'held-out text')}; {read}.")
    return "\n".join(lines).rstrip() + "\n"


def write(run: Run, out: Path) -> None:
    """The model folder, written beside `out` first: every file is replaced in one go."""
    out.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(run.model).to(torch.bfloat16)
    model.config.use_cache = True
    end = model.config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}.") as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(run.work / "tokenizer" / file, folder / file)
        (folder / "README.md").write_text(card(run), encoding="utf-8")
        for old in out.glob("model*.safetensors*"):  # of another number of shards
            if not (folder / old.name).exists():
                old.unlink()
        # config.json goes last: a reader that waits for it finds the rest in place.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o644)
            os.replace(path, out / path.name)
