"""A GGUF file of Llama-2-7B's shape with random quantized blocks, for measuring the speed of other engines.

    pip install gguf
    python bench/peers/random_gguf.py OUT.gguf [--mix Q2_K] [--layers 32]

How fast these formats run does not depend on the values, as long as they are finite and neither vanish nor explode:
bytes are random, and each type's block scales are a constant that gives weights of about 0.02. A mix says what
llama-quantize, asked for that type and without an importance matrix, makes of each tensor of a model of this shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY, CONTEXT = 4096, 11008, 32, 32, 32000, 4096

# Where the fp16 scales of a block lie, in bytes, and what they are set to. "min" scales are subtracted: theirs are
# such that the mean weight is near 0.
SCALES: dict[Type, dict[int, float]] = {
    Type.TQ1_0: {52: 0.02},
    Type.TQ2_0: {64: 0.02},
    Type.Q2_K: {80: 0.0015, 82: 0.00225},
    Type.Q3_K: {108: 0.0005},
    Type.Q4_K: {0: 0.0001, 2: 0.00075},
    Type.Q6_K: {208: 0.000015},
}


@dataclass(frozen=True)
class Mix:
    """The type of the linears of a block, the exceptions among them by name, and what lies outside the blocks."""

    linears: Type
    exceptions: dict[str, Type]
    embedding: Type
    head: Type = Type.Q6_K

    def of(self, name: str, layer: int) -> Type:
        # Q2_K_S has more bits in the first eighth of the layers alone.
        if self is MIXES["Q2_K_S"] and layer >= LAYERS // 8:
            return self.linears
        return self.exceptions.get(name, self.linears)


MIXES = {
    "Q2_K": Mix(Type.Q2_K, dict.fromkeys(("attn_v", "attn_output", "ffn_down"), Type.Q3_K), Type.Q2_K),
    "Q2_K_S": Mix(Type.Q2_K, {"ffn_down": Type.Q4_K}, Type.Q2_K),
    "TQ2_0": Mix(Type.TQ2_0, {}, Type.Q4_K),
    "TQ1_0": Mix(Type.TQ1_0, {}, Type.Q4_K),
}


def tensors(mix: Mix, layers: int) -> Iterator[tuple[str, int, int, Type]]:
    """(name, rows, columns, type) of every tensor in the order of the file; rows 0 for a vector."""
    yield "token_embd.weight", VOCABULARY, HIDDEN, mix.embedding
    for layer in range(layers):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN, HIDDEN),
            ("attn_v", HIDDEN, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns, mix.of(name, layer)
        yield f"blk.{layer}.attn_norm.weight", 0, HIDDEN, Type.F32
        yield f"blk.{layer}.ffn_norm.weight", 0, HIDDEN, Type.F32
    yield "output_norm.weight", 0, HIDDEN, Type.F32
    yield "output.weight", VOCABULARY, HIDDEN, mix.head


def blocks(rows: int, columns: int, kind: Type, generator: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random blocks with finite scales."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    made = generator.integers(0, 256, (rows * columns // size, length), dtype=np.uint8)
    for at, scale in SCALES[kind].items():
        made[:, at : at + 2] = np.array([scale], dtype="<f2").view(np.uint8)
    return made.reshape(rows, -1)


def write(path: Path, mix: str, layers: int) -> None:
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {mix}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")  # the benchmark feeds token numbers
    listed = list(tensors(MIXES[mix], layers))
    for name, rows, columns, kind in listed:
        if rows:
            size, length = gguf.GGML_QUANT_SIZES[kind]
            width = columns // size * length
            writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, kind)
        else:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), 4 * columns, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, rows, columns, kind in listed:
        made = blocks(rows, columns, kind, generator) if rows else np.ones(columns, dtype=np.float32)
        writer.write_tensor_data(made)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--mix", choices=MIXES, default="Q2_K")
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    write(arguments.output, arguments.mix, arguments.layers)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
