"""A randomly initialised model in bf16: of TinyLlama's shape (1.1B parameters), or of one that `bitwright bench` knows.

    python bench/random_model.py OUT --tokenizer DIR
    python bench/random_model.py OUT --tokenizer DIR --shape llama-2-7b --layers 2
    python bench/random_model.py OUT --shape llama-2-7b --headers-only

For measuring memory and time of `bitwright quantize`; its words mean nothing. The tokenizer is copied from DIR. With
--headers-only the files have their length but no weights (they take no room where the file system knows sparse files):
enough for `bitwright plan`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file

from bitwright.evaluation.shapes import SHAPES

TINY = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
KNOWN = {"tinyllama": ("LlamaConfig", TINY), **SHAPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--shape", choices=sorted(KNOWN), default="tinyllama")
    parser.add_argument("--layers", type=int, help="so many decoder blocks instead of all")
    parser.add_argument("--headers-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.tokenizer is None and not arguments.headers_only:
        parser.error("--tokenizer is needed, but with --headers-only")
    arguments.output.mkdir(parents=True)
    name, fields = KNOWN[arguments.shape]
    layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    config = getattr(transformers, name)(**fields | layers, dtype="bfloat16", tie_word_embeddings=False)
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for file in sorted({_file(name) for name in shapes}):
        inside = {name: shape for name, shape in shapes.items() if _file(name) == file}
        if arguments.headers_only:
            _write_header(arguments.output / file, inside)
        else:
            tensors = {name: _random(shape, generator) for name, shape in inside.items()}
            save_file(tensors, arguments.output / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(inside, file))
    (arguments.output / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(arguments.output)
    for path in arguments.tokenizer.glob("*token*") if arguments.tokenizer else ():
        shutil.copyfile(path, arguments.output / path.name)


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def _write_header(path: Path, shapes: dict[str, torch.Size]) -> None:
    """A safetensors file of bf16 tensors whose data part is a hole."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _file(name: str) -> str:
    """Six layers a file, the rest in one of its own."""
    part = name.split(".")
    return f"layers-{int(part[2]) // 6}.safetensors" if part[1] == "layers" else "outer.safetensors"


if __name__ == "__main__":
    main()
