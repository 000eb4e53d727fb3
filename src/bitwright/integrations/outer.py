"""A quantized embedding and head in a model of transformers: put in their places, tied, dequantized, not resized."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from bitwright.artifact.layout import OuterSpec
from bitwright.errors import ArtifactError
from bitwright.runtime.outer import QuantizedEmbedding, QuantizedHead, quantized_outers


def place_outer(model: Any, specs: dict[str, OuterSpec], dtype: torch.dtype) -> None:
    """Exchange the modules that `specs` names, and a head that is tied to them. Raises ArtifactError."""
    if not specs:
        return
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    if unknown := sorted(specs.keys() - {names.get(id(embedding)), names.get(id(head))}):
        raise ArtifactError(
            f"the artifact quantizes {unknown[0]} as embedding or head, which it is not in {type(model).__name__};"
            " it was made from another model, or config.json is damaged"
        )
    made: QuantizedEmbedding | None = None
    if (spec := specs.get(names[id(embedding)])) is not None:
        _check(names[id(embedding)], embedding, nn.Embedding, spec)
        with torch.device("meta"):
            made = QuantizedEmbedding(spec, dtype, embedding.padding_idx)
        model.set_submodule(names[id(embedding)], made)
    shared = made if tied else None
    if (spec := shared.spec if shared else specs.get(names.get(id(head), ""))) is not None:
        _check(names[id(head)], head, nn.Linear, spec)
        with torch.device("meta"):
            model.set_submodule(names[id(head)], QuantizedHead(spec, dtype, head.bias is not None, shared))
    if shared is not None:
        # transformers ties parameters; ours share their matrix, and connect_outer their sentinel.
        model.all_tied_weights_keys.pop(f"{names[id(head)]}.weight", None)
    model.resize_token_embeddings = MethodType(_refuse_to_resize, model)


def connect_outer(model: nn.Module) -> None:
    """After loading: a tied head speaks of the dtype and device of its embedding."""
    for _, outer in quantized_outers(model):
        outer.weight = outer._source[0].weight


def _check(name: str, module: nn.Module, kind: type[nn.Module], spec: OuterSpec) -> None:
    shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
    if type(module) is not kind or shape != (spec.rows, spec.columns):
        raise ArtifactError(
            f"layer {name} is a {type(module).__name__} of {' x '.join(map(str, shape))} in the model and"
            f" {spec.rows} x {spec.columns} in quantization_config; config.json is damaged"
        )


def _refuse_to_resize(self: Any, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
    """transformers would say that our module is no nn.Embedding, and not what to do."""
    embedding = self.get_input_embeddings()
    rows = int(embedding.num_embeddings)
    if new_num_tokens is None or new_num_tokens == rows:
        return embedding
    raise ArtifactError(
        f"an artifact with a quantized embedding or head keeps its {rows} tokens; resize the original model and"
        " quantize that, or quantize with outer.embedding=16 outer.head=16"
    )


def dequantize_outer(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Plain nn.Embedding and nn.Linear in their places; a tied head gets the embedding's parameter."""
    weights: dict[int, nn.Parameter] = {}
    for name, outer in list(quantized_outers(model)):
        source = id(outer._source[0])
        if source not in weights:
            dense = outer.matrix().dequantize()
            weights[source] = nn.Parameter(dense.to(dtype or dense.dtype), requires_grad=False)
        spec = outer.spec
        plain: nn.Module
        with torch.device("meta"):
            if isinstance(outer, QuantizedHead):
                plain = nn.Linear(spec.columns, spec.rows, bias=outer.bias is not None)
            else:
                plain = nn.Embedding(spec.rows, spec.columns, getattr(outer, "padding_idx", None))
        plain.weight = weights[source]
        if isinstance(outer, QuantizedHead) and outer.bias is not None:
            plain.bias = nn.Parameter(outer.bias.to(weights[source].dtype), requires_grad=False)
        model.set_submodule(name, plain)
    model.__dict__.pop("resize_token_embeddings", None)
