"""QuaRot (NeurIPS 2024, section 4): a model in a rotated basis that computes the same.

Every hidden state h becomes h Q, Q a randomized Hadamard of the width. Embeddings are stored as E Q, what reads the
stream as W Q (after its norm is fused, norm_fusion.py), what writes to it as Q^T W, the head as W diag(gamma) Q. Inside
a head, values become v H and the output projection undoes it: attention mixes tokens, not channels, so this costs
nothing at run time, and the cache holds rotated values. What must be done online (across heads, before the last
product) is a site's transform (site.py).

Pure functions on tensors, a block at a time: nothing here needs the whole model. Each keeps the dtype that it is given;
fp32 is exact enough (logits move by about 1e-6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bitwright.transforms.hadamard import RandomHadamard, largest_block, transform
from bitwright.transforms.norm_fusion import fuse_norm


@dataclass(frozen=True)
class BlockNames:
    """Modules of a decoder block that a rotation touches, by their names in the block.

    readers  (norm, linears that read it)
    writers  linears whose outputs are added to the residual stream
    value    linear that makes the values, `kv heads * head_dim` rows
    output   linear that reads the mixed values, `heads * head_dim` columns
    inner    linears that make the inputs of `last`, the last product of a block
    normed   linears whose outputs are normed head by head
    """

    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    value: str
    output: str
    inner: tuple[str, ...]
    last: str
    normed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rotation:
    """The basis: Q for a residual stream of `width` channels, from `seed`, and H for heads of `head_dim`.

    Where a size has no Hadamard matrix, the largest blocks that divide it are turned: still exact, less mixing.
    """

    width: int
    head_dim: int
    seed: int

    @property
    def stream(self) -> RandomHadamard:
        """Q."""
        return RandomHadamard(self.width, largest_block(self.width), self.seed)

    @property
    def head_block(self) -> int:
        return largest_block(self.head_dim)

    def block(self, state: dict[str, Tensor], names: BlockNames) -> dict[str, Tensor]:
        """The tensors of one block, by name, in the rotated basis. Those that nothing happens to are the same ones."""
        for norm, linears in names.readers:
            state = fuse_norm(state, norm, linears)
        state = dict(state)
        for _, linears in names.readers:
            for linear in linears:
                state[f"{linear}.weight"] = self.stream.apply(state[f"{linear}.weight"])
        state[f"{names.output}.weight"] = transform(state[f"{names.output}.weight"], self.head_block)
        _outputs(state, names.value, lambda y: transform(y, self.head_block))
        for linear in names.writers:
            _outputs(state, linear, self.stream.apply)
        return state

    def embedding(self, weight: Tensor) -> Tensor:
        """[vocabulary, width] -> E Q."""
        return self.stream.apply(weight)

    def head(self, weight: Tensor, gamma: Tensor) -> Tensor:
        """[vocabulary, width] and the weights [width] of the last norm -> W diag(gamma) Q.

        Not what `embedding` makes of the same matrix unless gamma is one: a tied head has to be stored of its own.
        """
        return self.stream.apply(weight * gamma)


def _outputs(state: dict[str, Tensor], linear: str, turn: Callable[[Tensor], Tensor]) -> None:
    """Let `linear` give turn(y) for y, in its weights and its bias."""
    state[f"{linear}.weight"] = turn(state[f"{linear}.weight"].T).T.contiguous()
    bias = f"{linear}.bias"
    if bias in state:
        state[bias] = turn(state[bias])
