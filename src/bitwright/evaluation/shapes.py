"""Well-known model shapes, and random packed models of them: how fast a kernel is does not depend on the values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.artifact.layout import LayerSpec, OuterSpec
from bitwright.recipe import Recipe, outlier_count
from bitwright.runtime import QuantizedEmbedding, QuantizedHead, QuantizedLinear
from bitwright.runtime.tiles import Geometry, Views

_LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_QWEN25_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
# transformers' config class and fields; the published configs of the models named.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("LlamaConfig", {**_LLAMA_2_7B, "num_key_value_heads": 32, "vocab_size": 32000}),
    "llama-3-8b": ("LlamaConfig", {**_LLAMA_3_8B, "num_key_value_heads": 8, "vocab_size": 128256}),
    "qwen2.5-7b": ("Qwen2Config", {**_QWEN25_7B, "num_key_value_heads": 4, "vocab_size": 152064}),
}
CONTEXT = 4096


def sites(shape: str) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the four sites of a block, the linears of a site taken together."""
    fields = SHAPES[shape][1]
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    head = hidden // fields["num_attention_heads"]
    return {
        "attn_in": (hidden + 2 * head * fields["num_key_value_heads"], hidden),
        "attn_out": (hidden, hidden),
        "mlp_in": (2 * inner, hidden),
        "mlp_out": (hidden, inner),
    }


def random_tiles(geometry: Geometry, out: Tensor | None = None) -> Tensor:
    """Random packed weights, uint8 [packed bytes], with scales that keep outputs near 1."""
    packed = torch.empty(geometry.packed_bytes(), dtype=torch.uint8) if out is None else out
    packed.random_(256)
    views = Views(packed, geometry)
    scale = 1 / (100 * geometry.columns**0.5)
    views.scales.fill_(scale)
    views.outlier_scales.fill_(scale)
    return packed


def random_model(shape: str, recipe: Recipe, layers: int | None = None) -> Any:
    """A packed model of that shape with random weights, on the lean path; embedding and head as `recipe.outer` says.

    What is kept in 16 bits is bfloat16. `layers` builds fewer blocks than the shape has.
    """
    import transformers

    from bitwright.integrations.lean_forward import use_lean_forward

    name, fields = SHAPES[shape]
    config = getattr(transformers, name)(**fields, max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for index, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        for parent, names in (
            (attention, ("q_proj", "k_proj", "v_proj")),
            (attention, ("o_proj",)),
            (mlp, ("gate_proj", "up_proj")),
            (mlp, ("down_proj",)),
        ):
            _random_site(parent, names, recipe, f"layers.{index}")
    _random_outer(model, recipe)
    for module in model.modules():
        for part, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:
                fresh = torch.empty(tensor.shape, dtype=torch.bfloat16)
                fresh = fresh.fill_(1.0) if tensor.dim() == 1 else fresh.normal_(0, 0.02)
                setattr(module, part, nn.Parameter(fresh, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were left on meta
    assert use_lean_forward(model)
    return model.eval()


def _random_outer(model: Any, recipe: Recipe) -> None:
    rows, columns = model.get_input_embeddings().weight.shape
    dtype = torch.bfloat16
    for bits, parent, leaf, made in (
        (recipe.outer.embedding, model.model, "embed_tokens", QuantizedEmbedding),
        (recipe.outer.head, model, "lm_head", QuantizedHead),
    ):
        if bits == 16:
            continue
        spec = OuterSpec(rows, columns, bits, recipe.outer.group)
        module = made(spec, dtype)
        # Over all codes at once, as bytes; scales that keep rows as large as those of a bfloat16 matrix.
        module.codes.view(torch.uint8).random_(256)
        module.scales.fill_(0.02 * 3 / 2 ** (bits - 1))
        setattr(parent, leaf, module)


def _random_site(parent: nn.Module, names: tuple[str, ...], recipe: Recipe, where: str) -> None:
    linears = [getattr(parent, name) for name in names]
    columns = linears[0].in_features
    outliers = outlier_count(columns, recipe.weights.outliers)
    group = recipe.weights.group_of(columns - outliers)
    leader = f"{where}.{names[0]}"
    geometries = [Geometry(linear.out_features, columns, outliers, group) for linear in linears]
    sizes = [geometry.packed_bytes() for geometry in geometries]
    memory = torch.empty(sum(sizes), dtype=torch.uint8).split(sizes)
    first: QuantizedLinear | None = None
    for name, linear, geometry, part in zip(names, linears, geometries, memory, strict=True):
        bias = linear.bias is not None
        spec = LayerSpec(linear.out_features, columns, 2, group, "free", outliers, bias, leader)
        with torch.device("meta"):
            made = QuantizedLinear(f"{where}.{name}", spec, recipe.activations, torch.bfloat16)
        made.adopt_tiles(random_tiles(geometry, part))
        if first is None:
            first = made
            made.permutation = torch.randperm(columns).to(made.permutation.dtype)
        made.share_permutation(first)
        if bias:
            made.bias = torch.zeros(linear.out_features, dtype=torch.bfloat16)
        made.weight = torch.empty(0, dtype=torch.bfloat16)
        setattr(parent, name, made)
