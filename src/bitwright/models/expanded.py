"""A checkpoint seen as that of the same model with more channels (transforms/expansion.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.models.anatomy import Anatomy, anatomy
from bitwright.models.checkpoint import READABLE_DTYPES, Checkpoint
from bitwright.models.skeleton import Skeleton
from bitwright.transforms.expansion import Expansion, Role, expand, expanded_shape
from bitwright.transforms.hadamard import constructible


class ExpandedCheckpoint(Checkpoint):
    """`original` with shapes, values and config of the expanded model; its files are those of the original."""

    def __init__(self, original: Checkpoint, by: Expansion, roles: dict[str, Role], changes: dict[str, Any]) -> None:
        self.original, self.by, self.roles, self.changes = original, by, roles, changes
        self.directory = original.directory
        self.config = {**original.config, **changes}
        self.tensors = {}
        for name, info in original.tensors.items():
            try:
                shape = expanded_shape(info.shape, roles.get(name, Role()), by)
            except ValueError as problem:
                raise ModelError(
                    f"tensor {name} in {self.directory / info.file} cannot be expanded: {problem}"
                ) from None
            size = math.prod(shape) * READABLE_DTYPES.get(info.dtype, 0)
            self.tensors[name] = replace(info, shape=shape, bytes=size)

    def load(self, names: list[str], dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
        values = self.original.load(names, dtype)
        return {name: expand(value, self.roles.get(name, Role()), self.by) for name, value in values.items()}

    def elements(self, name: str) -> int:
        return self.original.elements(name)


def expanded(skeleton: Skeleton, kind: str) -> Skeleton:
    """The model with the least sizes that `kind` asks for (recipe, transform.expansion); itself where it has them.

    Raises ModelError for an architecture that models.anatomy does not know, or that has no such sizes.
    """
    known = anatomy(skeleton)
    config = skeleton.config.get_text_config(decoder=True)
    inner = skeleton.blocks[0].get_submodule(known.block.last).in_features
    assert isinstance(inner, int)
    wider = next(size for size in _sizes(inner, kind))
    for wide in _sizes(known.width, kind):
        by = Expansion(known.width, wide, inner, wider)
        if (wide, wider) == (known.width, inner):
            return skeleton
        changes = {
            "hidden_size": wide,
            "intermediate_size": wider,
            "head_dim": known.head_dim,
            "rms_norm_eps": config.rms_norm_eps * by.share,
        }
        if _accepted(skeleton.config, changes):
            return Skeleton(ExpandedCheckpoint(skeleton.checkpoint, by, _roles(skeleton, known), changes))
    other = "hadamard" if kind == "power" else "none"
    raise ModelError(
        f"transformers takes no {skeleton.name} of {known.heads} heads with a width near {known.width} as"
        f" transform.expansion = '{kind}' wants it; write transform.expansion = '{other}'"
    )


def _sizes(size: int, kind: str) -> Iterator[int]:
    """Candidates from `size` on, the least first; lazily, as to look at a large one takes seconds."""
    if kind == "power":
        first = 1 << (size - 1).bit_length()
        yield from (first, 2 * first)
    else:
        yield from (n for n in range(size, 4 * size + 4) if constructible(n))


def _accepted(config: Any, changes: dict[str, Any]) -> bool:
    """Whether transformers builds such a config: some want widths that are multiples of the heads."""
    try:
        type(config).from_dict({**config.to_dict(), **changes})
    except Exception:  # of several libraries, by version
        return False
    return True


def _roles(skeleton: Skeleton, known: Anatomy) -> dict[str, Role]:
    """What happens to which tensor of the checkpoint, by name; the others stay."""
    roles = {
        f"{known.embedding}.weight": Role(stream=1),
        f"{known.head}.weight": Role(stream=1),
        f"{known.norm}.weight": Role(stream=0, gain=True),
    }
    for index in range(len(skeleton.blocks)):
        prefix, names = skeleton.block_name(index), known.block
        for norm, linears in names.readers:
            roles[f"{prefix}.{norm}.weight"] = Role(stream=0, gain=True)
            for linear in linears:
                normed, inner = linear in names.normed, 0 if linear in names.inner else None
                roles[f"{prefix}.{linear}.weight"] = Role(stream=1, inner=inner, gain=normed)
                roles[f"{prefix}.{linear}.bias"] = Role(inner=inner, gain=normed)
        for linear in names.writers:
            roles[f"{prefix}.{linear}.weight"] = Role(stream=0, inner=1 if linear == names.last else None)
            roles[f"{prefix}.{linear}.bias"] = Role(stream=0)
    return roles
