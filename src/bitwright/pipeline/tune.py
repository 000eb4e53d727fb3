"""Tuning of a solved model: Adam on levels, scales, int8 columns, norms and biases, by the logits of the original.

A step takes a few calibration sequences through the quantized model block by block and the gradient of the divergence
of its logits from the original's back, block by block: one block is in memory at a time, the inputs of the others are
in a stream on disk, as are the values of each block and the moments of Adam. Every interval the sequences that were
held back judge, and what the run then has is sealed: a killed run goes on from there. The best state is kept.

Sequences are units of work, one a thread; their gradients are added in a fixed order.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitwright.artifact.shards import write_shard
from bitwright.calibration import Stream
from bitwright.models.frame import Frame
from bitwright.models.passes import head, plain
from bitwright.pipeline.outer import with_outer_quantized
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.source import Source
from bitwright.pipeline.tunable import TunableBlock
from bitwright.pipeline.tuned import Values
from bitwright.workers import Workers

BETAS = (0.9, 0.95)
EPSILON = 1e-12  # gradients of a mean divergence by single levels are small

Logits = Callable[[Tensor], Tensor]


@dataclass
class Progress:
    """How far a tuning is; part of run.json. `losses` are (step, mean divergence of the held-back sequences, nats)."""

    step: int = 0
    best: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def loss_at(self, step: int) -> float:
        return next(loss for at, loss in self.losses if at == step)

    def finished(self, steps: int, patience: int) -> bool:
        """Judgements of the first half do not count: while rates are high they are often worse, and fall later."""
        return self.step >= steps or sum(at > max(self.best, steps // 2) for at, _ in self.losses) >= patience

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """For the manifest: the same for equal runs."""
        return {
            "steps": self.best,
            "before": self.loss_at(0),
            "after": self.loss_at(self.best),
            "losses": [list(pair) for pair in self.losses],
        }


def solved_name(block: int) -> str:
    """File of a block's shard before the tuning, in the run's directory."""
    return f"solved-{block + 1:05d}.safetensors"


def held_apart(starts: Sequence[int], length: int, held: int) -> tuple[list[int], list[int], bool]:
    """(learners, judges, whether they share no text) of segments that begin at these tokens: the last `held` judge, and
    those that overlap them do not learn, unless that would leave less than half."""
    judges = list(range(len(starts) - held, len(starts)))
    rest = list(range(len(starts) - held))
    apart = [i for i in rest if all(abs(starts[i] - starts[judge]) >= length for judge in judges)]
    return (apart, judges, True) if 2 * len(apart) >= len(rest) else (rest, judges, False)


class Tuner:
    """The tuning of one run.

    source, full  streams before the first block, quantized, and after the last one
    starts        where the calibration segments begin in the text
    """

    def __init__(
        self,
        model: Source,
        plan: Plan,
        directory: Path,
        source: Stream,
        full: Stream,
        starts: Sequence[int],
        calls: Sequence[dict[str, Any]],
        workers: Workers,
        advance: Callable[[float], None],
    ) -> None:
        assert plan.recipe.tune is not None
        self.model, self.plan, self.directory, self.workers = model, plan, directory, workers
        self.recipe, self.skeleton = plan.recipe.tune, model.skeleton
        self.source, self.full, self.advance = source, full, advance
        held = max(1, round(self.recipe.held_back * len(starts)))
        self.learners, self.judges, self.apart = held_apart(starts, plan.length, held)
        self.depth = len(self.skeleton.blocks)
        with torch.inference_mode(False):
            self.calls = [plain(call) for call in calls]
        twin = copy.deepcopy(self.skeleton.model)
        self.teacher = Frame(twin, self.skeleton.config, self.skeleton.prefix, [])
        self.teacher.blocks.extend(twin.get_submodule(self.skeleton.prefix))

    def start(self) -> Progress:
        """The state before the first step, judged and sealed."""
        with torch.inference_mode(False), torch.no_grad():
            for block in range(self.depth):
                original = self.model.block(block) if self.recipe.codes else None
                values = self.block(block, original=original).values
                zeros = [{key: torch.zeros_like(value) for key, value in values.items()} for _ in range(2)]
                _write(self._working(block), values, *zeros)
            progress = Progress()
            self._judge_and_seal(progress)
        return progress

    def go_on(self, progress: Progress) -> Progress:
        """One interval of steps, judged and sealed."""
        recipe = self.recipe
        with torch.inference_mode(False), torch.no_grad():
            for block in range(self.depth):
                self._working(block).write_bytes((self.directory / sealed_name(progress.step, block)).read_bytes())
            found = Progress(progress.step, progress.best, list(progress.losses), dict(progress.files))
            last = min(recipe.steps, progress.step + recipe.interval)
            with self._heads() as (logits, reference):
                while found.step < last:
                    self._step(found.step, logits, reference, 1 / (last - progress.step))
                    found.step += 1
            self._judge_and_seal(found)
        return found

    def block(self, index: int, values: Values | None = None, original: nn.Module | None = None) -> TunableBlock:
        """A block from its solved shard, with these values."""
        tensors = load_file(self.directory / solved_name(index))
        return TunableBlock(self.skeleton, self.plan, index, tensors, values, original)

    def best(self, progress: Progress, index: int) -> TunableBlock:
        """A block in the state that the held-back sequences like best."""
        with torch.inference_mode(False), torch.no_grad():
            values, _, _ = _read(self.directory / sealed_name(progress.best, index))
            return self.block(index, values)

    # --- a step ---

    def _step(self, step: int, logits: Logits, reference: Logits, share: float) -> None:
        batch = self._batch(step)
        inputs = self._forward(batch, "tune-inputs.f32", keep=True)
        results = self.workers.map(
            lambda place: self._divergence(
                inputs, self.depth * len(batch) + place, batch[place], logits, reference, differentiate=True
            ),
            range(len(batch)),
        )
        gradients = [gradient / len(batch) for _, gradient in results]
        factor = (1 + math.cos(math.pi * step / self.recipe.steps)) / 2
        for index in reversed(range(self.depth)):
            values, means, squares = _read(self._working(index))
            block, first = self.block(index, values), index * len(batch)

            def unit(
                task: tuple[int, Tensor], block: TunableBlock = block, first: int = first
            ) -> tuple[Tensor, Values]:
                place, gradient = task
                with torch.inference_mode(False), torch.no_grad():
                    return block.gradients(inputs.read(first + place), self.calls[block.index], gradient)

            found = self.workers.map(unit, enumerate(gradients))
            gradients = [before for before, _ in found]
            total = {key: torch.stack([pulled[key] for _, pulled in found]).sum(dim=0) for key in values}
            rates = {key: rate * factor for key, rate in block.rates().items()}
            adam(values, total, means, squares, rates, step)
            block.settle()
            _write(self._working(index), block.values, means, squares)
            self.advance(share / self.depth)

    def _batch(self, step: int) -> list[int]:
        """Sequences of a step: all learners in an order of its own for each round through them, one round after the
        other."""
        size = min(self.recipe.batch, len(self.learners))
        found: list[int] = []
        for place in range(step * size, (step + 1) * size):
            round_, at = divmod(place, len(self.learners))
            found.append(random.Random(f"{self.recipe.seed} {round_}").sample(self.learners, len(self.learners))[at])
        return found

    def _forward(self, sequences: Sequence[int], name: str, keep: bool) -> Stream:
        """Hidden states of `sequences` through all blocks as they are now, in a stream: those before block k at
        k * len(sequences), and after the last block behind them; without `keep` only the latter, at the front."""
        count = len(sequences)
        shape = ((self.depth + 1) * count if keep else count, *self.source.shape[1:])
        stream = Stream.create(self.directory / name, shape)
        for place, sequence in enumerate(sequences):
            stream.write(place, self.source.read(sequence))
        for index in range(self.depth):
            values, _, _ = _read(self._working(index))
            block = self.block(index, values)
            here, there = (index * count, (index + 1) * count) if keep else (0, 0)

            def unit(place: int, block: TunableBlock = block, here: int = here, there: int = there) -> None:
                with torch.inference_mode(False), torch.no_grad():
                    stream.write(there + place, block(stream.read(here + place), self.calls[block.index]))

            self.workers.map(unit, range(count))
        return stream

    def _divergence(
        self,
        hidden: Stream,
        place: int,
        sequence: int,
        logits: Logits,
        reference: Logits,
        differentiate: bool = False,
    ) -> tuple[float, Tensor]:
        """Mean over the positions of KL(original || quantized) in nats for the hidden states at `place`, and, where
        asked for, its gradient by them."""
        with torch.inference_mode(False), torch.no_grad():
            wanted = reference(self.full.read(sequence)).float().log_softmax(dim=-1)
            with torch.set_grad_enabled(differentiate):
                entry = hidden.read(place).requires_grad_(differentiate)
                found = logits(entry).float().log_softmax(dim=-1)
                loss = torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / found.shape[1]
            gradient = torch.autograd.grad(loss, entry)[0] if differentiate else entry
            return float(loss.detach()), gradient

    @contextmanager
    def _heads(self) -> Iterator[tuple[Logits, Logits]]:
        """What stands behind the blocks, of the quantized model and of the original."""
        values = self.model.outer("after")
        quantized = with_outer_quantized(self.skeleton, values, self.plan.outer)
        with head(self.skeleton, quantized) as logits, head(self.teacher, values) as reference:
            yield logits, reference

    # --- what lies on disk ---

    def _working(self, block: int) -> Path:
        return self.directory / f"tune-now-{block:05d}.safetensors"

    def _judge_and_seal(self, progress: Progress) -> None:
        hidden = self._forward(self.judges, "tune-judges.f32", keep=False)
        with self._heads() as (logits, reference):
            losses = self.workers.map(
                lambda place: self._divergence(hidden, place, self.judges[place], logits, reference)[0],
                range(len(self.judges)),
            )
        progress.losses.append((progress.step, sum(losses) / len(losses)))
        if progress.losses[-1][1] < progress.loss_at(progress.best):
            progress.best = progress.step
        kept = {
            name: digest for name, digest in progress.files.items() if name.startswith(sealed_prefix(progress.best))
        }
        for block in range(self.depth):
            name = sealed_name(progress.step, block)
            kept[name] = write_shard(self.directory / name, load_file(self._working(block))).sha256
        progress.files = kept


def sealed_prefix(step: int) -> str:
    return f"tune-{step:06d}-"


def sealed_name(step: int, block: int) -> str:
    """File of a block's values and moments after `step` steps."""
    return f"{sealed_prefix(step)}{block:05d}.safetensors"


def _write(path: Path, values: Values, means: Values, squares: Values) -> None:
    parts = {"value": values, "mean": means, "square": squares}
    save_file({f"{part}:{key}": t.contiguous() for part, found in parts.items() for key, t in found.items()}, path)


def _read(path: Path) -> tuple[Values, Values, Values]:
    tensors = load_file(path)

    def part(name: str) -> Values:
        return {key.removeprefix(f"{name}:"): t for key, t in tensors.items() if key.startswith(f"{name}:")}

    return part("value"), part("mean"), part("square")


def adam(values: Values, gradients: Values, means: Values, squares: Values, rates: dict[str, float], step: int) -> None:
    """One step of Adam in place, torch's own; `means` and `squares` are its running moments after `step` steps."""
    moving = [key for key in values if rates[key] > 0]
    optimizer = torch.optim.Adam(
        [{"params": [values[key]], "lr": rates[key]} for key in moving], betas=BETAS, eps=EPSILON, foreach=False
    )
    for key in moving:
        values[key].grad = gradients[key]
        optimizer.state[values[key]] = {
            "step": torch.tensor(float(step)),
            "exp_avg": means[key],
            "exp_avg_sq": squares[key],
        }
    optimizer.step()
    for key in moving:
        values[key].grad = None
