"""What a run needs of the machine: memory and disk, estimated from above."""

from __future__ import annotations

import shutil
from pathlib import Path

from bitwright.artifact.layout import Shape
from bitwright.artifact.shards import file_bytes
from bitwright.calibration import wave_sequences
from bitwright.codebook import group_count
from bitwright.errors import RunError
from bitwright.models import Skeleton
from bitwright.pipeline.layers import LayerPlan
from bitwright.recipe import Recipe
from bitwright.solvers.wgm import working_bytes

# Python, torch and transformers as they are once imported, and what the allocator keeps of freed memory; measured.
BASE_MEMORY = 460 << 20
SLACK = 1.9


def measured_sequences(recipe: Recipe, length: int) -> int:
    """Calibration sequences that `recipe.allocate` is measured on."""
    assert recipe.allocate is not None
    return max(1, min(recipe.allocate.tokens // length, recipe.calibration.sequences))


def peak_memory(skeleton: Skeleton, layers: list[LayerPlan], recipe: Recipe, length: int, threads: int) -> int:
    """An upper estimate in bytes of the run's resident memory: the larger of its phases, plus the libraries.

    Outside the blocks: embeddings or head in fp32, logits. Statistics: one block in fp32, its Hessians and one wave of
    site inputs. Solving: the block, its Hessians and factors, and the work of `threads` solvers. Tuning: one block,
    what its forward passes leave for the gradient, gradients of `threads` sequences, values and moments, beside
    what stands behind the blocks. Allocation: one block, what passing it back leaves, and its inputs in all sequences.
    """
    tensors = skeleton.checkpoint.tensors
    before, after = (
        sum(4 * tensors[name].elements for name in skeleton.outer_tensor_names(part)) for part in ("before", "after")
    )
    if recipe.outer.embedding < 16 or recipe.outer.head < 16:
        before, after = 2 * before, 2 * after  # the matrix and what its integers stand for
    vocabulary = int(getattr(skeleton.config.get_text_config(decoder=True), "vocab_size", 0))
    logits = 3 * threads if recipe.tune is None else 8 * threads
    alive = min(threads, measured_sequences(recipe, length)) if recipe.allocate is not None else 0
    outside = max(before, after + max(logits, 8 * alive) * 4 * length * vocabulary)
    worst = 0
    for block in range(len(skeleton.blocks)):
        own = [layer for layer in layers if layer.block == block]
        weights = 4 * sum(layer.spec.weights for layer in own)
        columns = [site.columns for site in skeleton.sites(block)]
        hessians = sum(4 * c * c for c in columns)
        wave = 4 * length * wave_sequences(length) * sum(columns)
        forward = threads * 4 * length * 6 * max(max(layer.spec.rows, layer.spec.columns) for layer in own)
        factors = hessians + sum(sorted(4 * c * c for c in columns)[-threads:]) * 3
        groupings = sum(sorted(_grouping_bytes(layer) for layer in own)[-threads:])
        worst = max(worst, weights + hessians + wave + forward, 2 * weights + hessians + factors + groupings)
        passing = 4 * length * 6 * sum(layer.spec.rows + layer.spec.columns for layer in own)
        if recipe.allocate is not None:
            tokens = length * measured_sequences(recipe, length)
            judged = recipe.allocate.rows * len(own) + sum(layer.spec.columns for layer in own)
            seen = 4 * tokens * (sum(columns) + 4 * max(columns)) + 4 * (tokens - tokens // 2) * judged
            worst = max(worst, weights + hessians + max(alive * passing + seen, seen + 3 * 4 * max(columns) ** 2))
        if recipe.tune is not None:
            values = sum(_tuned_bytes(layer, recipe) for layer in own)
            gradients = threads * weights + (recipe.tune.batch + 1) * values
            worst = max(worst, 2 * weights + threads * passing + gradients + 3 * values + outside)
    if recipe.search.method != "none":
        worst += after  # what stands behind the blocks is at hand while each of them is searched
    return BASE_MEMORY + int(SLACK * max(worst, outside))


def _grouping_bytes(layer: LayerPlan) -> int:
    """What a solver of WGM takes for its groups of the whole matrix; nothing with other methods."""
    spec = layer.spec
    return working_bytes(spec.rows, spec.columns, layer.recipe) if layer.recipe.method == "wgm" else 0


def _tuned_bytes(layer: LayerPlan, recipe: Recipe) -> int:
    """fp32 bytes of what is tuned in a linear: levels or scales, int8 columns, and weights where codes may change."""
    spec = layer.spec
    groups = group_count(spec.columns - spec.outliers, spec.group)
    levels = groups * (2**spec.bits if spec.kind == "free" else 1)
    codes = groups * spec.group if recipe.tune is not None and recipe.tune.codes else 0
    return 4 * spec.rows * (levels + spec.outliers + codes)


def work_disk(
    skeleton: Skeleton,
    shards: list[dict[str, Shape]],
    layers: list[LayerPlan],
    recipe: Recipe,
    sequences: int,
    length: int,
    bound: int,
) -> int:
    """Bytes that the run's directory needs at most: the artifact, whose linears take up to `bound`, and two streams
    before and after a block. For a tuning the solved shards beside it, the stream before the first block, one of a
    step, and values with both moments as they are, as they were sealed last, and when they were best. For an
    allocation the inputs of all blocks, and gradients before and behind one."""
    stream = 4 * length * skeleton.width
    more = max(0, bound - sum(layer.bytes for layer in layers))
    total = sum(file_bytes(shard) for shard in shards) + more + 4 * sequences * stream
    if recipe.allocate is not None:
        total += (len(skeleton.blocks) + 3) * measured_sequences(recipe, length) * stream
    if recipe.tune is not None:
        step = recipe.tune.batch * (len(skeleton.blocks) + 1)
        total += sum(file_bytes(shard) for shard in shards[1:]) + more + (2 * sequences + step) * stream
        total += 4 * 3 * sum(_tuned_bytes(layer, recipe) for layer in layers)
    return total


def check_disk(needed: int, directory: Path) -> None:
    """Refuse to start what the disk cannot hold. Raises RunError."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"{directory} has {free / 1e9:.2f} GB free and the run needs {needed / 1e9:.2f} GB;"
            " free some space or give an output on another disk"
        )
