from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bitwright.models import ENTRY
from bitwright.models.writers import find_writers

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
SEQUENTIAL = {"self_attn.o_proj": ENTRY, "mlp.down_proj": "post_attention_layernorm"}


def block_of(family: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """The one block of a small random model, and what it is called with."""
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    (blocks,) = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 1)
    calls: list[tuple[Any, dict[str, Any]]] = []
    blocks[0].register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=torch.arange(5)[None], use_cache=False)
    ((args, kwargs),) = calls
    return blocks[0], args[0], kwargs


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Llama", SEQUENTIAL),
        ("Mistral", SEQUENTIAL),
        ("Qwen2", SEQUENTIAL),
        ("Qwen3", SEQUENTIAL),
        # Side by side: the MLP's output is added to a stream that no module receives.
        ("Cohere", {"self_attn.o_proj": ENTRY}),
        # Normed, scaled, or added to each other first: the output is not what is added to the stream.
        ("Gemma2", {}),
        ("Granite", {}),
        ("Phi", {}),
    ],
)
def test_writers_of_families(family: str, expected: dict[str, str]) -> None:
    block, hidden, kwargs = block_of(family)
    assert find_writers(block, hidden, kwargs) == expected


def test_the_stream_is_what_the_receiver_sees() -> None:
    """On real numbers: the writer's output, added to what it is said to be added to, is what comes next."""
    block, hidden, kwargs = block_of("Llama")
    writers = find_writers(block, hidden, kwargs)
    seen: dict[str, torch.Tensor] = {ENTRY: hidden}
    outputs: dict[str, torch.Tensor] = {}
    for name, module in block.named_modules():
        if name:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}) if args else None)
            module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    with torch.inference_mode():
        result = block(hidden, **kwargs)
    streams = [seen[receiver] + outputs[writer] for writer, receiver in writers.items()]
    assert torch.equal(streams[0], seen["post_attention_layernorm"])
    assert torch.equal(streams[1], result[0] if isinstance(result, tuple) else result)
