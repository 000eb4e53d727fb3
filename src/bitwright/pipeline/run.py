"""A plan carried out: block by block from a model directory to an artifact, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import bitwright
from bitwright.artifact.manifest import read_manifest
from bitwright.artifact.shards import write_shard, write_text
from bitwright.calibration import (
    Stream,
    Text,
    consecutive_windows,
    load_tokenizer,
    random_starts,
    random_windows,
    tokenize,
)
from bitwright.errors import BitwrightError, RunError
from bitwright.models import Checkpoint, Skeleton
from bitwright.models.checkpoint import sha256_file
from bitwright.models.passes import embed
from bitwright.pipeline.allocate import allocate, settle
from bitwright.pipeline.block import propagate, solve_sites
from bitwright.pipeline.finish import finish
from bitwright.pipeline.job import SHARES, BlockJob
from bitwright.pipeline.measure import measure
from bitwright.pipeline.needs import check_disk
from bitwright.pipeline.outer import outer_tensors, with_outer_quantized
from bitwright.pipeline.plan import Plan, plan_for
from bitwright.pipeline.reporter import Reporter as Reporter
from bitwright.pipeline.reporter import Silent as Silent
from bitwright.pipeline.search import PackedBlocks, Ratios
from bitwright.pipeline.searching import FINAL, Searching, SearchStage, asked_ratios, embed_windows
from bitwright.pipeline.source import Source, expand_for
from bitwright.pipeline.state import RunDirectory, RunState
from bitwright.pipeline.sums import measure_energy
from bitwright.pipeline.tune import Progress, Tuner, solved_name
from bitwright.recipe import Recipe
from bitwright.runtime import QuantizedLinear
from bitwright.workers import Workers


@dataclass(frozen=True)
class Quantized:
    """What `quantize` leaves: the directory, the plan it was held to, the log, what was measured on the way, and how
    the tuning went, if there was one."""

    directory: Path
    plan: Plan
    log: list[dict[str, Any]]
    measured: dict[str, Any]
    tuning: dict[str, Any] | None = None


def quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe,
    calibration: Text,
    *,
    evaluation: Text | None = None,
    evaluation_windows: int = 32,
    threads: int | None = None,
    restart: bool = False,
    log_file: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Quantized:
    """Quantize the model directory into the artifact `output`.

    model        Hugging Face directory: config.json, safetensors, tokenizer
    calibration  text from which recipe.calibration draws its segments
    evaluation   text on which both models are measured on the way, for the card; windows of the calibration's length
    log_file     JSON lines, one a linear; default `output` + ".log.jsonl"

    The same inputs give the same bytes in `output`, with any number of threads, broken off and resumed or not.
    Raises ModelError, RecipeError, TextError or RunError; OSError where the disk fails.
    """
    return _Run(
        model,
        output,
        recipe,
        calibration,
        evaluation,
        evaluation_windows,
        threads,
        restart,
        log_file,
        reporter or Silent(),
    ).carry_out()


class _Run:
    """One call of `quantize`."""

    def __init__(
        self,
        model: str | Path,
        output: str | Path,
        recipe: Recipe,
        calibration: Text,
        evaluation: Text | None,
        evaluation_windows: int,
        threads: int | None,
        restart: bool,
        log_file: str | Path | None,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.calibration, self.evaluation = recipe, calibration, evaluation
        self.restart, self.reporter, self.threads = restart, reporter, threads
        self.skeleton = expand_for(Skeleton(Checkpoint(model)), recipe)
        self.checkpoint = self.skeleton.checkpoint
        self.source = Source(self.skeleton, recipe)
        self.plan = plan_for(self.skeleton, recipe, 0, threads)
        self.output = Path(output).absolute()
        self.log_file = Path(log_file) if log_file else self.output.with_name(self.output.name + ".log.jsonl")
        tokenizer = load_tokenizer(self.checkpoint.directory)
        text_config = self.skeleton.config.get_text_config(decoder=True)
        tokens = tokenize(tokenizer, calibration, text_config.vocab_size)
        asked, length = recipe.calibration, self.plan.length
        self.windows = random_windows(tokens, asked.sequences, length, asked.seed, calibration)
        self.starts = random_starts(len(tokens), asked.sequences, length, asked.seed)
        self.searching = Searching(recipe, tokens, length, calibration)
        self.probes = 0
        if evaluation is not None:
            held_out = tokenize(tokenizer, evaluation, text_config.vocab_size)
            held_out = consecutive_windows(held_out, length, evaluation_windows, evaluation, "calibration.length")
            self.probes = len(held_out)
            self.windows = torch.cat([self.windows, held_out])
            self.plan = plan_for(self.skeleton, recipe, self.probes, threads)
        self.directory = RunDirectory(self.output)

    def carry_out(self) -> Quantized:
        facts = self._facts()
        if self.plan.ignored:
            self.reporter.note(
                f"{len(self.plan.ignored)} tensors of the weight files are not part of the model and are left out,"
                f" first {self.plan.ignored[0]}"
            )
        for note in self.plan.notes:
            self.reporter.note(note)
        if self.output.exists():
            return self._already_there(facts)
        with self.directory.locked():
            if self.restart:
                self.directory.restart()
            state = self.directory.load()
            if state is None:
                check_disk(
                    self.plan.work_disk + self.searching.disk(self.skeleton.width, self.windows.numel()),
                    self.directory.path,
                )
            else:
                self.directory.check(state, facts)
                self.directory.clean(state)
                self.reporter.note(f"resuming: {state.completed} of {len(self.skeleton.blocks)} blocks are done")
            with Workers(self.threads) as workers, torch.inference_mode():
                values = self.source.outer("before")
                if state is None:
                    state = self._start(facts, values)
                calls = self._calls(values)
                del values
                self._settle(self._allocation(state, calls, workers))
                self.reporter.begin(self.plan, state.completed)
                while state.completed < len(self.skeleton.blocks):
                    self._do_block(state, calls[state.completed], workers)
                if self.recipe.tune is not None:
                    self._tune(state, calls, workers)
                ratios = self._search(state, calls, workers)
                streams = {role: self._stream(state, role) for role in ("full", "quantized")}
                measured = measure(self.source, self.plan, streams, self.windows, workers)
            found = self._summary(state)
            finish(self.directory.artifact, self.skeleton, self.plan, state, facts, measured, ratios, found)
            self._write_log(state)
            self.directory.publish()
        return Quantized(self.output, self.plan, state.log, measured, self._summary(state).get("tuning"))

    def _facts(self) -> dict[str, Any]:
        """Everything that the bytes of the artifact depend on; kept in the manifest, compared on resume."""
        digests = self.checkpoint.digests()
        return {
            "bitwright": bitwright.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "recipe": self.recipe.to_dict(),
            "model": {"name": self.plan.model, "files": digests},
            "calibration": {"name": self.calibration.name, "sha256": self.calibration.sha256},
            "evaluation": self.evaluation
            and {"name": self.evaluation.name, "sha256": self.evaluation.sha256, "windows": self.probes},
            "windows": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
        }

    def _already_there(self, facts: dict[str, Any]) -> Quantized:
        """The same command again after it has finished: say so. Anything else in the way is not touched."""
        try:
            manifest = read_manifest(self.output)
        except BitwrightError:
            raise RunError(
                f"{self.output} exists and is no finished artifact; give another output or remove it"
            ) from None
        differing = sorted(key for key, value in facts.items() if manifest.get(key) != value)
        if differing:
            raise RunError(
                f"{self.output} already holds another artifact (it differs in {', '.join(differing)});"
                " give another output or remove it"
            )
        if self.directory.is_ours():
            self.directory.remove()
        self._settle(manifest.get("allocation", {}))
        self.reporter.note(f"{self.output} is already complete; nothing to do")
        return Quantized(self.output, self.plan, manifest["layers"], manifest["measured"], manifest.get("tuning"))

    def _shape(self) -> tuple[int, int, int]:
        return (len(self.windows), self.plan.length, self.skeleton.width)

    def _stream(self, state: RunState, role: str) -> Stream:
        return Stream.open(self.directory.path / state.streams[role], self._shape())

    def _start(self, facts: dict[str, Any], values: dict[str, Tensor]) -> RunState:
        """Shard 0 and the hidden states before block 0."""
        self.directory.restart()
        self.directory.artifact.mkdir(parents=True, exist_ok=True)
        state = RunState(facts)
        stored = outer_tensors(self.skeleton, self.plan.outer) if self.plan.outer else self.source.outer(stored=True)
        self._write_shard(state, 0, stored)
        # One file serves both streams until they part: in block 0, or before it where the embedding is quantized.
        full = self._embedded("stream-0.f32", values)
        quantized = full
        if self.recipe.outer.embedding < 16:
            exchanged = with_outer_quantized(self.skeleton, values, self.plan.outer)
            quantized = self._embedded("stream-0-quantized.f32", exchanged)
        tuned = {"entry": quantized} if self.recipe.tune is not None else {}
        self._seal(state, {"full": full, "quantized": quantized, **tuned})
        return state

    def _embedded(self, name: str, values: dict[str, Tensor]) -> str:
        """Write the hidden states before block 0 into the stream file `name`."""
        embed_windows(self.skeleton, values, self.windows, self.directory.path / name)
        return name

    def _calls(self, values: dict[str, Tensor]) -> list[dict[str, Any]]:
        """What the model passes to each block beside the hidden states: the same for every window."""
        return [kwargs for _, kwargs in embed(self.skeleton, values, self.windows[:1])]

    def _do_block(self, state: RunState, call: dict[str, Any], workers: Workers) -> None:
        index = state.completed
        job = self._job(index, self.source.block(index), call, workers)
        paths = {role: self.directory.path / f"stream-{index + 1}-{role}.f32" for role in ("full", "quantized")}
        source_full, source = self._stream(state, "full"), self._stream(state, "quantized")
        full = Stream.create(paths["full"], self._shape())
        measure_energy(job, source_full, full)
        modules, entries = solve_sites(job, source, source_full)
        quantized = Stream.create(paths["quantized"], self._shape())
        distance = propagate(job, source, quantized, full)
        for entry in entries:
            entry["stream_error"] = distance
        self._write_shard(state, index + 1, self._block_tensors(job, modules))
        full.finish()
        quantized.finish()
        state.log.extend(entries)
        state.completed = index + 1
        self._seal(state, {role: path.name for role, path in paths.items()})
        self._write_log(state)
        self.reporter.block_done(index, entries)

    def _job(self, index: int, block: torch.nn.Module, call: dict[str, Any], workers: Workers) -> BlockJob:
        return BlockJob(
            index=index,
            depth=len(self.skeleton.blocks),
            name=self.skeleton.block_name(index),
            block=block,
            sites=self.skeleton.sites(index),
            writers=self.skeleton.writers(index) if self.recipe.calibration.residual else {},
            layers={layer.name: layer for layer in self.plan.layers_of(index)},
            recipe=self.searching.solving,
            calls=call,
            sequences=self.recipe.calibration.sequences,
            workers=workers,
            advance=lambda step, share: self.reporter.advance(SHARES[step] / 100 * share),
        )

    def _allocation(self, state: RunState, calls: list[dict[str, Any]], workers: Workers) -> dict[str, Any]:
        """Sites that are stored in ways of their own; empty where the recipe leaves nothing to choose."""
        if self.recipe.allocate is not None and not state.allocation:
            found = allocate(
                self.source,
                self.plan,
                self._stream(state, "full"),
                calls,
                workers,
                self.directory.path,
                state.choosing,
                lambda choosing: self.directory.seal(state, choosing=choosing),
                self.reporter.allocating,
            )
            self.directory.seal(state, choosing={}, allocation=found)
        return state.allocation

    def _settle(self, allocation: dict[str, Any]) -> None:
        """Plan the run with what was chosen."""
        if allocation:
            self.plan = plan_for(self.skeleton, settle(self.recipe, allocation), self.probes, self.threads)

    def _seal(self, state: RunState, fresh: dict[str, str]) -> None:
        """Hash the streams that the rest of the run needs, these in their roles; then record everything in one step."""
        streams = {**state.streams, **fresh}
        digests = {name: sha256_file(self.directory.path / name) for name in set(streams.values())}
        self.directory.seal(
            state, streams=streams, stream_sha256={role: digests[name] for role, name in streams.items()}
        )

    def _tune(self, state: RunState, calls: list[dict[str, Any]], workers: Workers) -> None:
        """Tune the solved model, then pass the quantized stream through it once more and write its shards."""
        recipe = self.recipe.tune
        assert recipe is not None
        tuner = Tuner(
            self.source,
            self.plan,
            self.directory.path,
            self._stream(state, "entry"),
            self._stream(state, "full"),
            self.starts,
            calls,
            workers,
            self.reporter.advance,
        )
        if not tuner.apart:
            self.reporter.note(
                f"{self.calibration.name} is short for {len(self.starts)} segments of {self.plan.length} tokens: those"
                " that judge the tuning overlap those that it learns from; more text judges better"
            )
        intervals = -(-recipe.steps // recipe.interval)
        progress = Progress(**state.tuning) if state.tuning else None
        self.reporter.begin_tuning(intervals, len(progress.losses) - 1 if progress else 0)
        while progress is None or not progress.finished(recipe.steps, recipe.patience):
            progress = tuner.start() if progress is None else tuner.go_on(progress)
            self.directory.seal(state, tuning=progress.to_dict())
            self.reporter.interval_done(len(progress.losses) - 1, intervals, [loss for _, loss in progress.losses])
        if not state.rewritten:
            state.streams["quantized"] = state.streams["entry"]
        for index in range(state.rewritten, len(self.skeleton.blocks)):
            tuned = tuner.best(progress, index)
            self._write_shard(state, index + 1, tuned.shard(), tuned=True)
            target = Stream.create(self.directory.path / f"stream-{index + 1}-tuned.f32", self._shape())
            job = self._job(index, tuned.packed(), calls[index], workers)
            job.advance = lambda step, share: self.reporter.advance(share / len(self.skeleton.blocks))
            propagate(job, self._stream(state, "quantized"), target, None)
            target.finish()
            state.rewritten = index + 1
            self._seal(state, {"quantized": target.path.name})

    def _summary(self, state: RunState) -> dict[str, Any]:
        """How the tuning went and what was allocated, for the manifest; empty where there was neither."""
        tuning = {"tuning": Progress(**state.tuning).summary()} if state.tuning else {}
        return {**tuning, **({"allocation": state.allocation} if state.allocation else {})}

    def _block_tensors(self, job: BlockJob, modules: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
        """Everything of shard `job.index + 1`: packed linears, and what stays as it was, in its stored dtype."""
        shapes = self.plan.shards[job.index + 1]
        prefix = job.name
        packed = {
            f"{prefix}.{name}.{part}": tensor
            for name, module in modules.items()
            for part, tensor in module.state_dict().items()
        }
        kept = [name for name in shapes if name in self.plan.kept]
        biases = [name for name in shapes if name.endswith(".bias") and name not in self.plan.kept]
        packed.update(self.source.kept(job.index, [*kept, *biases], job.block))
        for name in packed:
            if name.endswith(".weight") and name not in self.plan.kept:
                packed[name] = torch.empty(0, dtype=shapes[name][0])
        return packed

    def _write_shard(self, state: RunState, index: int, tensors: dict[str, Tensor], tuned: bool = False) -> None:
        """Write shard `index`, held to the plan: same tensors, same shapes, same size. That of a block which is to be
        tuned lies beside the artifact until then."""
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if shapes != self.plan.shards[index]:
            raise RunError(f"shard {index} is not what the plan says; this is a defect of bitwright, please report it")
        if self.recipe.tune is not None and index > 0 and not tuned:
            name = solved_name(index - 1)
            state.solved[name] = write_shard(self.directory.path / name, tensors).sha256
            return
        name = self.plan.shard_names()[index]
        state.shards[name] = asdict(write_shard(self.directory.artifact / name, tensors))

    def _search(self, state: RunState, calls: list[dict[str, Any]], workers: Workers) -> Ratios:
        """Clip ratios of everything where they are searched, nothing else; and the quantized stream as it is with
        them, or with those of the recipe where nothing was quantized beside the weights yet."""
        if not self.searching.deferred:
            return {}
        stage = SearchStage(
            PackedBlocks(self.skeleton, self.plan, self.directory.artifact, calls, workers),
            self.searching,
            lambda part: with_outer_quantized(self.skeleton, self.source.outer(part), self.plan.outer),
            self.directory.path,
            state.search,
            self.reporter.searching if self.searching.asked else lambda *_: None,
            lambda: self.directory.save(state),
        )
        found = stage.ratios() if self.searching.asked else {}
        ratios = found or asked_ratios(self.skeleton, self.recipe)
        if state.streams["quantized"] != FINAL:
            stage.apply(ratios, self.windows, self.directory.path / FINAL)
            self._seal(state, {"quantized": FINAL})
        return found

    def _write_log(self, state: RunState) -> None:
        entries = [*state.log, *({name: part} for name, part in self._summary(state).items())]
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_text(self.log_file, lines)
