"""The weights that a run starts from: those of the checkpoint, or the same model in a rotated basis.

The rest of the pipeline does not know which. A rotated model is made block by block as the weights are read; numbers
that an artifact keeps as they are (embeddings, norms, head, biases) are rounded to their stored dtype before anything
is computed with them, so that the streams of a run are those of the artifact.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.artifact.layout import Shape
from bitwright.artifact.shards import TORCH_DTYPES
from bitwright.models import SiteInfo, Skeleton
from bitwright.models.anatomy import anatomy
from bitwright.models.expanded import ExpandedCheckpoint, expanded
from bitwright.recipe import Recipe
from bitwright.transforms.hadamard import constructible, largest_block
from bitwright.transforms.rotation import Rotation


def expand_for(skeleton: Skeleton, recipe: Recipe) -> Skeleton:
    """The model with as many channels as the recipe asks for. Raises ModelError as models.expanded does."""
    kind = recipe.transform.expansion
    return skeleton if kind == "none" else expanded(skeleton, kind)


Part = Literal["all", "before", "after"]


class Source:
    """Reads a checkpoint under a recipe. Raises ModelError where a rotation does not know the architecture."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe) -> None:
        self.skeleton, self.checkpoint = skeleton, skeleton.checkpoint
        self.rotates = recipe.transform.rotation != "none"
        if self.rotates:
            self.anatomy = anatomy(skeleton)
            self.rotation = Rotation(self.anatomy.width, self.anatomy.head_dim, recipe.transform.seed)
            self._embedding = f"{self.anatomy.embedding}.weight"
            self._norm, self._head = f"{self.anatomy.norm}.weight", f"{self.anatomy.head}.weight"

    @property
    def unties(self) -> bool:
        """Whether the head becomes a tensor of its own: the last norm is fused into it, and not into the embedding."""
        return self.rotates and self._head not in self.checkpoint.tensors

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor; of a head that was tied, the embedding's."""
        if self.rotates and name == self._head and self.unties:
            name = self._embedding
        return TORCH_DTYPES[self.checkpoint.info(name).dtype]

    def outer_shapes(self) -> dict[str, Shape]:
        """What shard 0 holds, by name."""
        names = self.skeleton.outer_tensor_names()
        shapes = {name: (self.dtype(name), self.checkpoint.info(name).shape) for name in names}
        if self.unties:
            shapes[self._head] = shapes[self._embedding]
        return shapes

    def outer(self, part: Part = "all", stored: bool = False) -> dict[str, Tensor]:
        """Tensors outside the blocks as Skeleton.outer_tensor_names names them, in fp32 or in their stored dtype."""
        names = self.skeleton.outer_tensor_names(part)
        if not self.rotates:
            return self.checkpoint.load(names, dtype=None if stored else torch.float32)
        values = self.checkpoint.load(sorted({*names, self._norm}))
        gamma = values.pop(self._norm)
        if part != "before":
            head = values[self._embedding] if self.unties else values[self._head]
            values[self._head] = self.rotation.head(head, gamma)
        if part == "after" and self.unties:
            del values[self._embedding]
        if self._embedding in values:
            values[self._embedding] = self.rotation.embedding(values[self._embedding])
        if self._norm in names:
            values[self._norm] = torch.ones_like(gamma)
        rounded = {name: value.to(self.dtype(name)) for name, value in values.items()}
        return rounded if stored else {name: value.float() for name, value in rounded.items()}

    def block(self, index: int) -> nn.Module:
        """Block `index` with its weights in fp32."""
        block = self.skeleton.fill_block(index)
        if self.rotates:
            prefix = self.skeleton.block_name(index)
            state = self.rotation.block(block.state_dict(), self.anatomy.block)
            rounded = {n: t.to(self.dtype(f"{prefix}.{n}")).float() if t.dim() == 1 else t for n, t in state.items()}
            block.load_state_dict(rounded, assign=True)
            block.requires_grad_(False)
        return block

    def kept(self, index: int, names: list[str], block: nn.Module) -> dict[str, Tensor]:
        """Tensors `names` of block `index`, filled by `block`, that an artifact keeps, in their stored dtype."""
        if not self.rotates:
            return self.checkpoint.load(names, dtype=None)
        prefix = f"{self.skeleton.block_name(index)}."
        return {name: _find(block, name.removeprefix(prefix)).to(self.dtype(name)) for name in names}

    def hadamard(self, site: SiteInfo) -> tuple[int, int]:
        """(size, stride) of what a rotation does online at a site; size 0: nothing."""
        if not self.rotates:
            return 0, 1
        known, leader = self.anatomy, site.leader
        size, stride = 0, 1
        if leader.name == known.block.output:
            size, stride = largest_block(known.heads), known.head_dim
        elif leader.name in known.block.writers:
            size = largest_block(site.columns)
        return (size, stride) if size > 1 else (0, 1)

    def notes(self) -> list[str]:
        """What a rotation does beyond the usual, in sentences for the plan."""
        if not self.rotates:
            return []
        known, notes = self.anatomy, list[str]()
        if isinstance(self.checkpoint, ExpandedCheckpoint):
            by = self.checkpoint.by
            more = sum(i.elements - self.checkpoint.elements(name) for name, i in self.checkpoint.tensors.items())
            sizes = (("width", by.width, by.wide), ("intermediate size", by.inner, by.wider))
            grown = " and ".join(f"the {what} from {old} to {new}" for what, old, new in sizes if old != new)
            notes.append(f"zeros expand {grown}: {more:,} weights more, stored and counted as bits of the others")
        if self.unties:
            dtype, shape = self.outer_shapes()[self._head]
            notes.append(
                f"the output head is untied from the embedding ({shape[0] * shape[1] * dtype.itemsize:,} bytes more):"
                " the last norm is fused into it alone"
            )
        inner = max(site.columns for site in self.skeleton.sites(0) if site.leader.name in known.block.writers)
        for what, size in (
            ("width", known.width),
            ("head_dim", known.head_dim),
            ("heads", known.heads),
            ("mlp", inner),
        ):
            if not constructible(size):
                notes.append(f"no Hadamard matrix of size {size} ({what}): blocks of {largest_block(size)} are rotated")
        return notes


def _find(block: nn.Module, name: str) -> Tensor:
    """A parameter of a block by its name, of a linear that is quantized by now, too."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(block.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor)
    return tensor.detach()
