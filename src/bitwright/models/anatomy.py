"""What a rotation must know of an architecture and cannot find by running it: the table of those that are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bitwright.errors import ModelError
from bitwright.models.frame import Frame
from bitwright.transforms.rotation import BlockNames

# Blocks of RMSNorm, attention, RMSNorm, gated linears, each half added to the stream; a last RMSNorm; a head. Norms of
# queries and keys by head (Qwen3) stand behind their products and are not touched.
LLAMA = BlockNames(
    readers=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    inner=("mlp.gate_proj", "mlp.up_proj"),
    last="mlp.down_proj",
)
QWEN3 = replace(LLAMA, normed=("self_attn.q_proj", "self_attn.k_proj"))
KNOWN = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": QWEN3,
}


@dataclass(frozen=True)
class Anatomy:
    """Names of the modules that a rotation touches, and the sizes that it needs."""

    block: BlockNames
    embedding: str
    norm: str
    head: str
    width: int
    heads: int
    head_dim: int


def anatomy(frame: Frame) -> Anatomy:
    """Raises ModelError for an architecture that is not in the table."""
    if frame.name not in KNOWN:
        raise ModelError(
            f"transform.rotation knows {', '.join(KNOWN)} and not {frame.name}; write transform.rotation = 'none'"
        )
    names = {id(module): name for name, module in frame.model.named_modules()}
    config = frame.config.get_text_config(decoder=True)
    return Anatomy(
        block=KNOWN[frame.name],
        embedding=names[id(frame.embedding)],
        norm=names[id(frame.model.model.norm)],
        head=names[id(frame.model.get_output_embeddings())],
        width=frame.width,
        heads=config.num_attention_heads,
        head_dim=_head_dim(frame.blocks[0]),
    )


def _head_dim(block: Any) -> int:
    return int(block.self_attn.head_dim)
