"""Embedding and head in a run: which of them the recipe quantizes, what is stored of them, what they then stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.artifact.layout import OuterSpec
from bitwright.errors import ModelError, RecipeError
from bitwright.models import Skeleton
from bitwright.outer import ROWS_AT_ONCE, OuterMatrix, quantize_outer
from bitwright.recipe import Recipe


def plan_outer(skeleton: Skeleton, recipe: Recipe) -> dict[str, OuterSpec]:
    """Module name -> spec of the embedding and the head, where they are quantized; a tied head has no line of its own.

    Raises RecipeError where a tied pair is asked for in two widths, ModelError where the model's module does more than
    an nn.Embedding or nn.Linear.
    """
    asked = recipe.outer
    if asked.embedding == asked.head == 16:
        return {}
    tied = bool(skeleton.tied_names())
    if tied and asked.embedding != asked.head:
        both = min(asked.embedding, asked.head)
        raise RecipeError(
            f"outer.embedding = {asked.embedding} and outer.head = {asked.head} differ, but the head of"
            f" {skeleton.checkpoint.directory} is tied to its embedding and one stored matrix serves both;"
            f" write outer.embedding={both} outer.head={both}"
        )
    plain: dict[str, tuple[Any, type[nn.Module], int]] = {
        "embedding": (skeleton.embedding, nn.Embedding, asked.embedding),
        "head": (skeleton.model.get_output_embeddings(), nn.Linear, asked.head),
    }
    found = {}
    for part, (module, kind, bits) in plain.items():
        if bits == 16:
            continue
        if type(module) is not kind or getattr(module, "max_norm", None) is not None:
            raise ModelError(
                f"the {part} of {skeleton.name} is a {type(module).__name__}, which does more than nn.{kind.__name__};"
                f" write outer.{part}=16 to keep it as it is"
            )
        if part == "embedding" or not tied:
            rows, columns = skeleton.model.get_parameter(f"{_name_of(skeleton, module)}.weight").shape
            found[_name_of(skeleton, module)] = OuterSpec(rows, columns, bits, asked.group)
    return found


def _name_of(skeleton: Skeleton, module: nn.Module) -> str:
    return next(name for name, other in skeleton.model.named_modules() if other is module)


def kept_outer_names(skeleton: Skeleton, outer: dict[str, OuterSpec]) -> list[str]:
    """Names of the tensors outside the blocks that are stored as they are."""
    gone = {f"{name}.weight" for name in outer} | (skeleton.tied_names() if outer else set())
    return [name for name in skeleton.outer_tensor_names() if name not in gone]


def outer_tensors(skeleton: Skeleton, outer: dict[str, OuterSpec]) -> dict[str, Tensor]:
    """All tensors of shard 0. Raises ModelError where a matrix cannot be quantized."""
    tensors = skeleton.checkpoint.load(kept_outer_names(skeleton, outer), dtype=None)
    for name, spec in outer.items():
        weight = _load(skeleton, f"{name}.weight", None)
        if name == _name_of(skeleton, skeleton.embedding):
            _check_copy(skeleton, weight)
        for part, tensor in _quantized(name, weight, spec).tensors().items():
            tensors[f"{name}.{part}"] = tensor
        tensors[f"{name}.weight"] = torch.empty(0, dtype=weight.dtype)
    return tensors


def with_outer_quantized(
    skeleton: Skeleton, values: dict[str, Tensor], outer: dict[str, OuterSpec]
) -> dict[str, Tensor]:
    """fp32 parameters outside the blocks by state dict name, the quantized matrices replaced by what they stand for."""
    found = dict(values)
    for name, spec in outer.items():
        weight = found.pop(f"{name}.weight", None)
        if weight is not None:
            made = torch.empty_like(weight)
            for source, target in zip(weight.split(ROWS_AT_ONCE), made.split(ROWS_AT_ONCE), strict=True):
                target.copy_(_quantized(name, source, spec).dequantize())
            found[f"{name}.weight"] = made
            # A checkpoint may hold a copy for the tied head; without it the head takes the embedding.
            for copy in skeleton.tied_names():
                found.pop(copy, None)
    return found


def _load(skeleton: Skeleton, name: str, dtype: torch.dtype | None) -> Tensor:
    return skeleton.checkpoint.load([name], dtype=dtype)[name]


def _quantized(name: str, weight: Tensor, spec: OuterSpec) -> OuterMatrix:
    try:
        return quantize_outer(weight, spec.bits, spec.group)
    except ValueError as problem:
        raise ModelError(f"tensor {name}.weight cannot be quantized to {spec.bits} bits: {problem}") from None


def _check_copy(skeleton: Skeleton, embedding: Tensor) -> None:
    """A checkpoint may hold the tied head as well; it must be the embedding, which alone is stored."""
    for name in sorted(skeleton.tied_names() & set(skeleton.checkpoint.tensors)):
        if not torch.equal(_load(skeleton, name, None), embedding):
            raise ModelError(
                f"config.json of {skeleton.checkpoint.directory} ties the head to the embedding, but {name} holds other"
                " numbers; set tie_word_embeddings to false there, or write outer.embedding=16 outer.head=16"
            )
