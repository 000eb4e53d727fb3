"""A recipe resolved against one model: every layer, its exact bytes and bits, and what the run will need.

Made from config.json and the headers of the weight files alone. What `quantize` writes is held to it, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.artifact.layout import OuterSpec, Shape, bits_word, outer_shapes, shard_name
from bitwright.artifact.shards import TORCH_DTYPES, file_bytes, shape_bytes
from bitwright.errors import ModelError, RecipeError
from bitwright.models import Checkpoint, Skeleton, context_length
from bitwright.pipeline.layers import LayerPlan, allotted_bytes, candidate_layers, layers_of_block
from bitwright.pipeline.needs import peak_memory, work_disk
from bitwright.pipeline.outer import kept_outer_names, plan_outer
from bitwright.pipeline.source import Source, expand_for
from bitwright.pipeline.targets import search_notes
from bitwright.recipe import Recipe
from bitwright.workers import default_threads

# Below, what inputs have in common is learnt by heart: with 128 tokens for 512 inputs preset `bitwright` loses more
# than `bwa`, which asks less of them (0.25 against 0.18 on the demo model).
TOKENS_A_CHANNEL = 8


@dataclass(frozen=True)
class Plan:
    """The whole model under one recipe.

    bound  bytes that the linears may take in the end: `linear_bytes`, or what `allocate.target` says
    """

    model: str
    architecture: str
    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    kept: dict[str, Shape]
    shards: tuple[dict[str, Shape], ...]
    original_bytes: int
    parameters: int
    length: int
    context: int
    peak_memory: int
    work_disk: int
    ignored: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    bound: int = 0
    unties: bool = False
    outer: dict[str, OuterSpec] = field(default_factory=dict)

    @property
    def linear_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def linear_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def linear_bits(self) -> float:
        """Honest bits a weight of the quantized linears."""
        return self.linear_bytes * 8 / self.linear_weights

    def outer_bytes(self, name: str) -> int:
        """Codes and scales of a quantized embedding or head."""
        return sum(shape_bytes(self.shards[0][f"{name}.{part}"]) for part in ("codes", "scales"))

    def outer_bits(self, name: str) -> float:
        """Honest bits a weight of a quantized embedding or head."""
        return self.outer_bytes(name) * 8 / self.outer[name].weights

    @property
    def weight_bits(self) -> str:
        """Bits of the codes: `2`, or `2 to 3`."""
        return bits_word(layer.spec.bits for layer in self.layers)

    @property
    def claimed_bits(self) -> float | None:
        """Bits a weight as the method's authors count them, where that is less than what must be stored; else None.

        WGM (v1, withdrawn) counts one bit for the sign and 16 for each of the groups, not the group of each weight.
        """
        if self.recipe.weights.method != "wgm":
            return None
        table = 16 * 2 ** (self.recipe.weights.bits - 1)
        return sum(layer.weights + table for layer in self.layers) / self.linear_weights

    def claimed_after(self, layers: list[dict[str, Any]]) -> float | None:
        """As `claimed_bits`, from the log of a finished run.

        BiLLM counts one bit for the sign, two in salient columns; how many there are is found on the way.
        """
        if self.recipe.weights.method != "billm":
            return self.claimed_bits
        signs = sum(entry["shape"][0] * (entry["shape"][1] + entry["salient"]) for entry in layers)
        outliers = sum(7 * entry["shape"][0] * entry["outliers"] for entry in layers)
        return (signs + outliers) / self.linear_weights

    @property
    def tensor_bytes(self) -> int:
        """All tensors of the artifact, embeddings and head included."""
        return sum(shape_bytes(shape) for shard in self.shards for shape in shard.values())

    @property
    def shard_bytes(self) -> list[int]:
        return [file_bytes(shard) for shard in self.shards]

    @property
    def total_bytes(self) -> int:
        """Size of all weight files together, headers included."""
        return sum(self.shard_bytes)

    @property
    def total_bound(self) -> int:
        """`total_bytes` with linears that take up to `bound`; headers may differ by a few bytes then."""
        return self.total_bytes - self.linear_bytes + self.bound

    @property
    def model_bits(self) -> float:
        """Bits a parameter of the whole model, headers included."""
        return self.total_bytes * 8 / self.parameters

    def shard_names(self) -> list[str]:
        return [shard_name(index, len(self.shards)) for index in range(len(self.shards))]

    def sizes(self) -> dict[str, Any]:
        """Parameters of the original and what they take here, for the manifest."""
        outer = {
            name: {"parameters": spec.weights, "bytes": self.outer_bytes(name)} for name, spec in self.outer.items()
        }
        parameters = self.linear_weights + sum(entry["parameters"] for entry in outer.values())
        taken = self.linear_bytes + sum(entry["bytes"] for entry in outer.values())
        return {
            "linears": {"parameters": self.linear_weights, "bytes": self.linear_bytes},
            "outer": outer,
            "kept": {"parameters": self.parameters - parameters, "bytes": self.tensor_bytes - taken},
            "model": {"parameters": self.parameters, "bytes": self.total_bytes},
            "original": {"bytes": self.original_bytes},
            "unties": self.unties,
        }

    def layers_of(self, block: int) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.block == block]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "recipe": self.recipe.to_dict(),
            "layers": [
                {
                    "name": layer.name,
                    "site": layer.site,
                    "shape": [layer.spec.rows, layer.spec.columns],
                    "outliers": layer.spec.outliers,
                    "bytes": layer.bytes,
                    "bits": layer.bits_per_weight,
                }
                for layer in self.layers
            ],
            "outer": {
                name: {**spec.to_dict(), "bytes": self.outer_bytes(name), "bits_per_weight": self.outer_bits(name)}
                for name, spec in self.outer.items()
            },
            "kept": {name: shape_bytes(shape) for name, shape in self.kept.items()},
            "ignored": list(self.ignored),
            "notes": list(self.notes),
            "shards": dict(zip(self.shard_names(), self.shard_bytes, strict=True)),
            "linear_weights": self.linear_weights,
            "linear_bytes": self.linear_bytes,
            "linear_bits": self.linear_bits,
            "bound": self.bound,
            "claimed_bits": self.claimed_bits,
            "parameters": self.parameters,
            "total_bytes": self.total_bytes,
            "total_bound": self.total_bound,
            "model_bits": self.model_bits,
            "original_bytes": self.original_bytes,
            "calibration_length": self.length,
            "peak_memory": self.peak_memory,
            "work_disk": self.work_disk,
        }


def plan(model: str | Path, recipe: Recipe, probes: int = 0, threads: int | None = None) -> Plan:
    """Resolve `recipe` against the model directory. Raises ModelError or RecipeError; reads no weights."""
    return plan_for(Skeleton(Checkpoint(model)), recipe, probes, threads)


def plan_for(skeleton: Skeleton, recipe: Recipe, probes: int = 0, threads: int | None = None) -> Plan:
    """As `plan`, for a skeleton at hand. `probes` sequences are carried along for measuring only."""
    skeleton = expand_for(skeleton, recipe)
    checkpoint = skeleton.checkpoint
    context = context_length(skeleton.config) or 2048
    length = min(2048, context) if recipe.calibration.length == "auto" else recipe.calibration.length
    if length > context:
        raise RecipeError(
            f"calibration.length = {length} is longer than the model's context of {context}; write {context} or less"
        )
    layers: list[LayerPlan] = []
    outer = plan_outer(skeleton, recipe)
    kept: dict[str, Shape] = {}
    source = Source(skeleton, recipe)
    if outer:  # the recipe allows no rotation beside it
        kept.update({name: _stored(checkpoint, name) for name in kept_outer_names(skeleton, outer)})
    else:
        kept.update(source.outer_shapes())
    shards: list[dict[str, Shape]] = [dict(kept)]
    for name, wanted in outer.items():
        shards[0].update(outer_shapes(name, wanted, _stored(checkpoint, f"{name}.weight")[0]))
    for block in range(len(skeleton.blocks)):
        own = layers_of_block(skeleton, recipe, source, block)
        layers.extend(own)
        prefix = skeleton.block_name(block)
        replaced = {f"{layer.name}.{part}" for layer in own for part in ("weight", "bias")}
        rest = {
            f"{prefix}.{name}": _stored(checkpoint, f"{prefix}.{name}")
            for name in skeleton.block_tensor_names(block)
            if f"{prefix}.{name}" not in replaced
        }
        kept.update(rest)
        shards.append({**rest, **{name: shape for layer in own for name, shape in layer.shapes.items()}})
    if not layers:
        raise ModelError(f"{checkpoint.directory} has no linear layers in decoder blocks: there is nothing to quantize")
    bound = sum(layer.bytes for layer in layers)
    if recipe.allocate is not None:
        bound = allotted_bytes(recipe, layers, candidate_layers(skeleton, recipe, source))
    names = set(skeleton.model.state_dict()) & set(checkpoint.tensors)
    sequences = recipe.calibration.sequences + probes
    return Plan(
        model=checkpoint.directory.resolve().name,
        architecture=skeleton.name,
        recipe=recipe,
        layers=tuple(layers),
        kept=kept,
        shards=tuple(shards),
        original_bytes=sum((checkpoint.directory / file).stat().st_size for file in checkpoint.files),
        parameters=sum(checkpoint.elements(name) for name in names),
        length=length,
        context=context,
        peak_memory=peak_memory(skeleton, layers, recipe, length, threads or default_threads()),
        work_disk=work_disk(skeleton, shards, layers, recipe, sequences, length, bound),
        ignored=tuple(skeleton.ignored),
        notes=(
            *source.notes(),
            *_allocation_notes(layers, recipe, bound),
            *search_notes(skeleton, recipe),
            *_calibration_notes(layers, recipe, length),
        ),
        bound=bound,
        unties=source.unties,
        outer=outer,
    )


def _calibration_notes(layers: list[LayerPlan], recipe: Recipe, length: int) -> list[str]:
    """Says so where there is too little text for what is computed from it."""
    tokens, widest = recipe.calibration.sequences * length, max(layer.spec.columns for layer in layers)
    if recipe.weights.feedback == "none" or tokens >= TOKENS_A_CHANNEL * widest:
        return []
    return [
        f"{tokens:,} tokens of calibration are few for layers of {widest:,} inputs: weights are fitted to that text"
        f" more than to the model; write calibration.sequences = {-(-TOKENS_A_CHANNEL * widest // length)} or more"
    ]


def _allocation_notes(layers: list[LayerPlan], recipe: Recipe, bound: int) -> list[str]:
    """Says what is still to be chosen. Raises RecipeError where `sites` names linears that are not there."""
    names = [layer.name for layer in layers]
    for pattern in recipe.sites:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"sites '{pattern}' fits none of the {len(names)} linears of the model; their names are like {names[0]}"
            )
    if recipe.allocate is None:
        return []
    bits = bound * 8 / sum(layer.weights for layer in layers)
    return [
        "bits, groups and int8 channels of each site are chosen by what the loss feels of them (allocate): linears take"
        f" at most {bits:.4f} bits a weight in all, {bound:,} bytes"
    ]


def _stored(checkpoint: Checkpoint, name: str) -> Shape:
    info = checkpoint.info(name)
    return TORCH_DTYPES[info.dtype], info.shape
