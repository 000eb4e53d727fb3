"""Make the golden artifacts beside this file: run by hand, and only when the format gets a new version.

    python tests/golden/make.py

A random model of one block and made-up words; `free` (preset bwa), `uniform` (rtn), `shared` (wgm) and `salient` (billm
with the symmetric inputs of atom). KIND.json holds token ids, the logits after each, and the sha256 of each linear's
dequantized fp32 weights. The ids are chosen so that no 4-bit code stands near a rounding boundary: noise of 1e-6 on
every linear leaves the logits where they are, so another processor's order of summation does, too.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import bitwright
from bitwright.calibration import text_of
from bitwright.integrations.transformers import quantized_cache
from bitwright.runtime import quantized_linears

HERE = Path(__file__).resolve().parent
WORDS = [first + second for first in ("ba", "ti", "lo", "mu", "re", "sha") for second in ("n", "sk", "ra", "lem", "to")]
OPTIONS = {"weights.group": 32, "calibration.sequences": 16, "calibration.length": 32}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "free": ("bwa", {}),
    "uniform": ("rtn", {}),
    "shared": ("wgm", {}),
    "salient": ("billm", {"activations": {"balance": "none", "clip": 0.9, "symmetric": True}, "kv": {}}),
}
TOKENS = 12


def make_model(directory: Path) -> None:
    """Ragged groups: 48 = 32 + 16 and 72 = 32 + 32 + 8 normal channels, beside 16 outliers; biases in attention."""
    torch.manual_seed(64)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if "embed" in name else 0.3
            parameter.copy_((parameter if "norm" in name else 0) + scale * torch.randn(parameter.shape))
            if parameter.dim() == 2 and "embed" not in name:
                parameter[:, torch.randperm(parameter.shape[1])[:2]] *= 6
    model.to(torch.bfloat16).save_pretrained(directory)
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Logits [tokens, vocabulary] through a fresh quantized cache, with relative noise on each linear's output."""

    def disturb(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + noise * torch.randn(output.shape))

    handles = [module.register_forward_hook(disturb) for _, module in quantized_linears(model)]
    try:
        cache = quantized_cache(model, model.config.quantization_config.parsed_recipe())
        return model(ids.unsqueeze(0), past_key_values=cache, use_cache=True).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def steady_ids(model: Any) -> torch.Tensor:
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, len(WORDS) + 2, (TOKENS,), generator=generator)
        plain = logits(model, ids)
        if all(float((logits(model, ids, 1e-6) - plain).abs().max()) < 2e-5 for _ in range(30)):
            return ids
    raise SystemExit("every row of tokens stands near a rounding boundary")


def main() -> None:
    rng = random.Random(0)
    calibration = text_of("made-up words", " ".join(rng.choices(WORDS, k=2000)))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "golden"
        make_model(source)
        for kind in sys.argv[1:] or RECIPES:
            preset, options = RECIPES[kind]
            out = Path(scratch) / kind
            recipe = bitwright.preset(preset).with_options(OPTIONS | options)
            bitwright.quantize(source, out, recipe, calibration, threads=1)
            shutil.rmtree(HERE / kind, ignore_errors=True)
            shutil.copytree(out, HERE / kind)
            model = bitwright.load(out)
            ids = steady_ids(model)
            expected = {
                "ids": ids.tolist(),
                "logits": [[round(value, 7) for value in row] for row in logits(model, ids).tolist()],
                "weights_sha256": {
                    name: hashlib.sha256(module.matrix().dequantize().numpy().tobytes()).hexdigest()
                    for name, module in quantized_linears(model)
                },
            }
            (HERE / f"{kind}.json").write_text(json.dumps(expected) + "\n")
    print(sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()), "bytes")


if __name__ == "__main__":
    main()
