"""All blocks of a decode step in one native call (csrc/blocks.h), for the models whose sites it knows.

Between two products the caches hold weights and nothing else, so whatever Python does there takes several times what it
takes alone: with eight calls a block, a tenth of a token's time. The numbers are those of the calls one by one
(bitwright.runtime.decoder), to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.native import native
from bitwright.runtime import plane_ops
from bitwright.runtime.kv_cache import QuantizedKVCache, QuantizedKVLayer
from bitwright.runtime.ops import check, cut, share, site_linear_eager
from bitwright.runtime.planes import PlaneGeometry
from bitwright.runtime.tiles import Geometry

if TYPE_CHECKING:
    from bitwright.runtime.decoder import Block, Norm, Site

# Up to so many tokens all blocks are one call. With more, a block is a call of its own: a prompt can be interrupted.
FEW_TOKENS = 16


class NativeBlocks:
    """The native twin of a model's blocks and its last norm, whose tensors it keeps."""

    def __init__(self, blocks: Sequence[Block], final: Norm) -> None:
        module = native()
        assert module is not None
        self._kept: list[Tensor] = []
        self._native = module.Blocks(self._norm(final))
        self.heads = [(block.key_heads, block.head_dim) for block in blocks]
        for block in blocks:
            _, key, value = block.attn_in.parts
            gate, up = block.mlp_in.parts
            self._native.add(
                self._norm(block.input_norm),
                self._norm(block.mlp_norm),
                *(self._norm(norm) for norm in block.head_norms or (None, None)),
                *(self._site(site) for site in (block.attn_in, block.attn_out, block.mlp_in, block.mlp_out)),
                block.query_heads,
                block.key_heads,
                block.head_dim,
                key.start,
                value.start,
                up.start,
                gate.stop,
                block.window,
                block.scale,
            )

    @staticmethod
    def serves(blocks: Sequence[Block]) -> bool:
        """Whether every site is one that the native code knows."""
        return all(
            site.kernel.eager in (site_linear_eager, plane_ops.site_planes_eager)
            and (site.kernel.hadamard is None or _by_powers(site.kernel.hadamard))
            for block in blocks
            for site in (block.attn_in, block.attn_out, block.mlp_in, block.mlp_out)
        )

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Norm | None) -> Any:
        module: Any = native()
        return module.Norm(0, 0.0) if norm is None else module.Norm(self._address(norm.weight), norm.eps)

    def _site(self, site: Site) -> Any:
        module: Any = native()
        kernel = site.kernel
        outliers, group, clip, setting = kernel.rest  # of the planes their balance, of the tiles whether symmetric
        balance = setting if isinstance(setting, str) else None
        made = PlaneGeometry if balance else Geometry
        geometry = made(site.rows, site.columns, outliers, group)
        check(torch.empty((0, site.columns)), site.packed, kernel.order, kernel.bias, geometry)
        return module.Site(
            self._address(site.packed),
            site.rows,
            site.columns,
            outliers,
            group,
            self._address(kernel.order),
            self._address(kernel.bias),
            cut(clip),
            0.0 if balance else share(clip, setting),
            plane_ops.NATIVE.index(balance) if balance else -1,
            kernel.hadamard.size if kernel.hadamard else 0,
            kernel.hadamard.normal if kernel.hadamard else 0,
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: QuantizedKVCache) -> Tensor:
        """x fp32 [tokens, hidden], cos and sin fp32 [tokens, head_dim] -> fp32 [tokens, hidden], normed."""
        tokens, position, places = x.shape[0], cache.get_seq_length(), []
        bits = 0
        for layer, (heads, head_dim) in zip(cache.layers, self.heads, strict=True):
            assert isinstance(layer, QuantizedKVLayer)
            keys, values, _ = layer.reserve(heads, tokens, head_dim)
            places.append((keys.data_ptr(), values.data_ptr(), keys.shape[1], cut(layer.clip)))
            bits = layer.bits
        x, cos, sin = x.clone(), cos.contiguous(), sin.contiguous()
        normed = torch.empty_like(x)
        scratch = torch.empty(self._native.scratch(tokens), dtype=torch.float32)
        step = len(places) if tokens <= FEW_TOKENS else 1
        for first in range(0, len(places), step):
            self._native.run(
                first,
                first + step,
                x.data_ptr(),
                normed.data_ptr(),
                tokens,
                cos.data_ptr(),
                sin.data_ptr(),
                places[first : first + step],
                bits,
                position,
                scratch.data_ptr(),
                torch.get_num_threads(),
            )
        return normed


def _by_powers(hadamard: Any) -> bool:
    """Whether csrc/decoder.h's site_hadamard does it: neighbouring channels, blocks of a power of two."""
    return bool(hadamard.stride == 1 and hadamard.size & (hadamard.size - 1) == 0)
