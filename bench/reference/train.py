"""Trains a small reference model from random weights; the same command on a CPU or one GPU, and again to resume.

Usage: python bench/reference/train.py bench/reference/recipes/demo.json --text-dir TEXT --work WORK --out MODEL
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import curve
import export
import numpy as np
import torch
import torch.nn.functional as F
from data import END, RecipeError, Windows, documents, save_tokenizer, source_path, token_file, train_tokenizer
from loss import summed_cross_entropy
from replicas import Replicas
from speed import flops_per_token, peak_flops
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
}


def build_model(recipe: dict[str, Any], end: int) -> PreTrainedModel:
    """The recipe's model with random float32 weights from its seed."""
    if recipe["architecture"] not in ARCHITECTURES:
        raise RecipeError(f"architecture must be one of {', '.join(ARCHITECTURES)}")
    config_class, model_class = ARCHITECTURES[recipe["architecture"]]
    config = config_class(
        vocab_size=recipe["tokenizer"]["vocab_size"],
        max_position_embeddings=recipe["context"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=False,
        **recipe["config"],
    )
    torch.manual_seed(recipe["seed"])
    return model_class(config).float()


def build_optimizer(model: PreTrainedModel, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=device.type in ("cpu", "cuda"))


def learning_rate(recipe: dict[str, Any], step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to the recipe's fraction of the peak at the last step."""
    warmup, peak, last = recipe["warmup_steps"], recipe["peak_lr"], recipe["final_lr_fraction"]
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Run:
    """Everything one training run holds: data, model, optimizer and how far it is."""

    def __init__(self, recipe: dict[str, Any], args: argparse.Namespace) -> None:
        self.recipe, self.args, self.work = recipe, args, args.work
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = args.bf16 == "on" or (args.bf16 == "auto" and self.device.type == "cuda")
        for source in recipe["sources"] + recipe["evaluation"]:  # before the minutes of work that need them
            source_path(source["name"], args.text_dir)
        torch.set_float32_matmul_precision("high")
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._tokenizer()
        tokens = [token_file(s, self.tokenizer, args.text_dir, self.work / "tokens") for s in recipe["sources"]]
        batch, context = recipe["batch_windows"], recipe["context"]
        self.steps = max(1, round(recipe["tokens"] / (batch * context)))
        self.short_steps = math.ceil(recipe.get("short_windows", {}).get("share", 0.0) * self.steps)
        weights = [source["weight"] for source in recipe["sources"]]
        self.windows = Windows(tokens, weights, self.steps * batch, context, recipe["seed"])
        self.evaluation = {source["name"]: self._evaluation_text(source) for source in recipe["evaluation"]}
        self.model = build_model(recipe, self.tokenizer.token_to_id(END)).to(self.device)
        self.optimizer = build_optimizer(self.model, self.device)
        default = torch.get_num_threads() if self.device.type == "cpu" and not args.compile else 1
        self.replicas = Replicas(self.model, args.replicas or default)
        if args.compile:
            self.model.compile()
        self.micro_batch = min(
            batch, args.micro_batch or recipe.get("micro_batch") or (1 if self.device.type == "cpu" else batch)
        )
        self.unlogged: list[torch.Tensor] = []  # losses of the steps since the last line of the curve
        self.step, self.seconds, self.machine = 0, 0.0, export.machine(self.device)

    def _tokenizer(self) -> Tokenizer:
        path = self.work / "tokenizer" / "tokenizer.json"
        if not path.exists():
            print("training the tokenizer", flush=True)
            save_tokenizer(train_tokenizer(self.recipe, self.args.text_dir), path.parent, self.recipe["context"])
        return Tokenizer.from_file(str(path))

    def _evaluation_text(self, source: dict[str, Any]) -> tuple[np.ndarray, int]:
        text = "\n".join(documents(source, self.args.text_dir))
        if not text:
            raise RecipeError(f"evaluation text {source['name']} is empty")
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array([self.tokenizer.token_to_id(END), *ids], dtype=np.int64), len(text.encode())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def loss(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy, nats, of every token of the rows but the first of each."""
        labels = rows[:, 1:].flatten()
        with self.autocast():
            if self.device.type == "cpu" and not self.bf16 and not self.args.compile:
                hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
                return summed_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, labels)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")

    def window(self, step: int) -> int:
        """Tokens that step looks back on: the recipe's short windows first, as they cost less, then its context."""
        return self.recipe["short_windows"]["length"] if step < self.short_steps else self.recipe["context"]

    def train_step(self) -> tuple[torch.Tensor, float]:
        """One optimizer step on the next batch; gives its mean loss and the gradient's norm before clipping."""
        batch, context, window = self.recipe["batch_windows"], self.recipe["context"], self.window(self.step)
        rows = torch.from_numpy(self.windows.batch(self.step * batch, batch)).to(self.device)
        rate = learning_rate(self.recipe, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = [
            torch.cat([part[:, at : at + window + 1] for at in range(0, context, window)])
            for part in rows.split(self.micro_batch)
        ]
        total = self.replicas.accumulate(parts, lambda model, part: self.loss(model, part) / (batch * context))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, float(norm)

    @torch.no_grad()
    def bits_per_byte(self) -> dict[str, float]:
        """Bits a byte of every evaluation text: disjoint windows, every token scored once."""
        self.model.eval()
        context, found = self.recipe["context"], {}
        for name, (ids, size) in self.evaluation.items():
            nats = 0.0
            full = (len(ids) - 1) // context
            rows = [ids[i * context : (i + 1) * context + 1] for i in range(full)]
            batches = [np.stack(rows[i : i + 8]) for i in range(0, full, 8)]
            if len(ids) - 1 > full * context:
                batches.append(ids[None, full * context :])
            for batch in batches:
                nats += float(self.loss(self.model, torch.from_numpy(batch).to(self.device)))
            found[name] = nats / math.log(2) / size
        self.model.train()
        return found

    def save(self) -> None:
        """The checkpoint, replaced in one go so that a kill leaves the old one or the new one."""
        state = {
            "recipe": self.recipe,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "short_steps": self.short_steps,
            "seconds": self.seconds,
            "machine": self.machine,
            "unlogged": [float(loss) for loss in self.unlogged],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        partial = self.work / "checkpoint.partial"
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self.work / "checkpoint.pt")

    def resume(self) -> None:
        """Takes up the checkpoint of the work folder if there is one."""
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["recipe"]
        if before != self.recipe:
            # More tokens are a longer schedule from here on; anything else is another model.
            if {**before, "tokens": self.recipe["tokens"]} != self.recipe or state["step"] > self.steps:
                raise RecipeError(f"{self.work} holds a run of another recipe: give another --work folder")
            if state["step"] >= state.get("short_steps", 0):  # it has learnt the far positions: there is no way back
                self.short_steps = state.get("short_steps", 0)
            print(f"the run of {before['tokens']:,} tokens is taken on to {self.recipe['tokens']:,}", flush=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.unlogged = [torch.tensor(loss, device=self.device) for loss in state.get("unlogged", [])]
        # The card names every machine that trained, not one that only exports.
        machine = state.get("machine", self.machine)
        if not self.args.export_only and not machine.endswith(self.machine):
            machine = f"{machine}; then {self.machine}"
        self.machine = machine
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        print(f"resumed at step {self.step} of {self.steps}", flush=True)

    @property
    def tokens(self) -> int:
        return self.step * self.recipe["batch_windows"] * self.recipe["context"]


def timed_steps(run: Run, until: int) -> Iterator[tuple[torch.Tensor, float]]:
    """Training steps up to step `until`, their time added to the run's."""
    while run.step < until:
        start = time.perf_counter()
        result = run.train_step()
        run.seconds += time.perf_counter() - start
        yield result


def train(run: Run) -> None:
    """The training loop: progress line, curve, evaluation and checkpoints."""
    recipe, args = run.recipe, run.args
    log = curve.Curve(run.work / "curve.jsonl", run.step)
    began = time.monotonic()
    saved, first_step, first_seconds = time.monotonic(), run.step, run.seconds
    for loss, norm in timed_steps(run, run.steps):
        run.unlogged.append(loss)
        if run.step % args.log_every == 0 or run.step == run.steps:
            mean = float(torch.stack(run.unlogged).mean())
            run.unlogged = []
            if not math.isfinite(mean):
                raise RecipeError(f"the loss is {mean} at step {run.step}: lower peak_lr")
            speed = (run.step - first_step) / max(1e-9, run.seconds - first_seconds)
            rate = learning_rate(recipe, run.step - 1, run.steps)
            log.add(step=run.step, tokens=run.tokens, loss=mean, lr=rate, norm=norm, seconds=round(run.seconds, 1))
            per_second = speed * recipe["batch_windows"] * recipe["context"]
            print(
                f"step {run.step}/{run.steps}  loss {mean:.4f}  lr {rate:.2e}  norm {norm:.2f}"
                f"  {per_second:,.0f} tokens/s  ETA {(run.steps - run.step) / speed / 60:.1f} min",
                flush=True,
            )
        # Before a checkpoint, so that what a resume drops from the curve is exactly what it computes again.
        if run.step % recipe["evaluate_every"] == 0 or run.step == run.steps:
            record_evaluation(run, log)
        stop = run.step < run.steps and time.monotonic() - began > args.stop_minutes * 60
        if stop or time.monotonic() - saved > args.save_minutes * 60 or run.step == run.steps:
            run.save()
            saved = time.monotonic()
        if stop:
            print(f"stopped at step {run.step} of {run.steps}: the same command goes on from there", flush=True)
            return


def record_evaluation(run: Run, log: curve.Curve) -> None:
    """Evaluates, and adds the figures to the log and the curve."""
    figures = run.bits_per_byte()
    log.add(step=run.step, tokens=run.tokens, bits_per_byte=figures)
    print(f"step {run.step}  " + "  ".join(f"{k} {v:.4f} bits/byte" for k, v in figures.items()), flush=True)
    curve.draw(run.work / "curve.jsonl", run.work / "curve.png", run.recipe["name"])


def benchmark(run: Run, seconds: float) -> None:
    """Throughput after a warm-up step, in short windows and in full ones; nothing is saved."""
    peak = peak_flops(run.device, torch.bfloat16 if run.bf16 else torch.float32)
    print(f"best matrix product of this machine: {peak / 1e9:,.0f} GFLOP/s")
    for first in sorted({0, next(step for step in range(run.steps) if run.window(step) == run.recipe["context"])}):
        run.step = first
        for _ in timed_steps(run, first + 1):
            pass
        run.seconds, loss = 0.0, torch.zeros(())
        for loss, _ in timed_steps(run, run.steps):  # noqa: B007 (the last loss is printed)
            if run.seconds > seconds:
                break
        speed = (run.step - first - 1) * run.recipe["batch_windows"] * run.recipe["context"] / run.seconds
        window = run.window(first)
        rate = speed * flops_per_token(run.model, window)
        print(
            f"windows of {window}: {speed:,.0f} tokens/s over {run.step - first - 1} steps, {rate / 1e9:,.0f} GFLOP/s, "
            f"{rate / peak:.0%} of that product; loss {float(loss):.3f}"
        )
    if run.device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print("epochs of each source in the whole run:", [round(value, 2) for value in run.windows.epochs()])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--text-dir", type=Path, help="folder with the text files that the recipe names")
    parser.add_argument("--work", type=Path, required=True, help="folder of this run: tokens, checkpoint, curve")
    parser.add_argument("--out", type=Path, help="where the Hugging Face model folder is written at the end")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--bf16", choices=("auto", "on", "off"), default="auto", help="autocast; auto: on a GPU only")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--tokens", type=int, help="instead of the recipe's; the schedule is stretched or shrunk to it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another number for a key of the recipe"
    )
    parser.add_argument("--micro-batch", type=int, help="windows of the context in one forward pass")
    parser.add_argument(
        "--replicas", type=int, help="threads with a batch each; default: all cores of a CPU, 1 on a GPU"
    )
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--stop-minutes", type=float, default=math.inf, help="save and stop after this time")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--benchmark", type=float, metavar="SECONDS", help="only measure the throughput")
    parser.add_argument("--export-only", action="store_true", help="only write --out from the last checkpoint")
    return parser.parse_args(argv)


def numbers(recipe: dict[str, Any], words: list[str]) -> dict[str, int | float]:
    """What `--set` changes: numbers of the recipe by numbers."""
    found: dict[str, int | float] = {}
    for word in words:
        key, _, value = word.partition("=")
        if not isinstance(recipe.get(key), (int, float)):
            known = ", ".join(key for key, value in recipe.items() if isinstance(value, (int, float)))
            raise RecipeError(f"--set {word}: {key} is no number of the recipe; its numbers are {known}")
        try:
            found[key] = type(recipe[key])(value)
        except ValueError:
            kind = "a whole number" if isinstance(recipe[key], int) else "a number"
            raise RecipeError(f"--set {word}: {value!r} is not {kind}, as {key} must be") from None
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if not args.recipe.is_file():
            raise RecipeError(f"no recipe {args.recipe}")
        recipe = json.loads(args.recipe.read_text(encoding="utf-8"))
        recipe |= numbers(recipe, [*args.set, *([f"tokens={args.tokens}"] if args.tokens else [])])
        run = Run(recipe, args)
        if args.benchmark:
            benchmark(run, args.benchmark)
            return 0
        run.resume()
        if not args.export_only:
            train(run)
        elif run.step == 0:
            raise RecipeError(f"{args.work} has no checkpoint to export")
        if args.out is not None and (args.export_only or run.step == run.steps):
            export.write(run, args.out)
            print(f"wrote {args.out}")
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
