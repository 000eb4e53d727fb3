"""A randomly initialised model of TinyLlama's shape (1.1B parameters, bf16).

    python bench/random_model.py OUT --tokenizer DIR

For measuring memory and time of `bitwright quantize`; its words mean nothing. The tokenizer is copied from DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    files = sorted({_file(name) for name in shapes})
    for file in files:
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
            for name, shape in shapes.items()
            if _file(name) == file
        }
        save_file(tensors, arguments.output / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (arguments.output / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(arguments.output)
    for path in arguments.tokenizer.glob("*token*"):
        shutil.copyfile(path, arguments.output / path.name)


def _file(name: str) -> str:
    """Six layers a file, the rest in one of its own."""
    part = name.split(".")
    return f"layers-{int(part[2]) // 6}.safetensors" if part[1] == "layers" else "outer.safetensors"


if __name__ == "__main__":
    main()
