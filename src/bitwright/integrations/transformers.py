"""`from_pretrained` for artifacts: bitwright as a quantization method of transformers.

Importing this module registers the method. `import bitwright` arranges for that as soon as transformers'
model code is imported, so that it costs nothing before.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitwright.artifact.layout import (
    QUANT_METHOD,
    LayerSpec,
    OuterSpec,
    cache_clips,
    check_version,
)
from bitwright.errors import ArtifactError
from bitwright.integrations.checks import check_files, check_values
from bitwright.integrations.lean_forward import leave_lean_forward, use_lean_forward
from bitwright.integrations.outer import connect_outer, dequantize_outer, place_outer
from bitwright.recipe import Recipe
from bitwright.runtime import QuantizedKVCache, QuantizedLinear, pack_sites, quantized_linears
from bitwright.runtime.tiles import STORED

SMALL = 1 << 20  # bytes: norms, permutations, biases


class BitwrightConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact; unknown keys are kept, so that newer artifacts re-save unchanged."""

    def __init__(
        self, format_version: int = 1, recipe: dict | None = None, layers: dict | None = None, **rest: Any
    ) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.format_version = format_version
        self.recipe = recipe or {}
        self.layers = layers or {}
        for key, value in rest.items():
            if key != "quant_method":
                setattr(self, key, value)

    def parsed_recipe(self) -> Recipe:
        return Recipe.from_dict(self.recipe, "quantization_config.recipe")


class BitwrightQuantizer(HfQuantizer):
    """Puts QuantizedLinear in the place of the linears that the config names, before the weights are loaded."""

    requires_calibration = True

    def __init__(self, quantization_config: BitwrightConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        check_version(quantization_config.to_dict())
        self.recipe = quantization_config.parsed_recipe()
        layers = quantization_config.layers
        if not isinstance(layers, dict) or not layers:
            raise ArtifactError("quantization_config names no layers; the artifact is damaged")
        self.specs = {name: LayerSpec.from_dict(name, data) for name, data in layers.items()}
        outer = getattr(quantization_config, "outer", {})
        if not isinstance(outer, dict):
            raise ArtifactError(f"quantization_config.outer is {outer!r}; the artifact is damaged")
        self.outer = {name: OuterSpec.from_dict(name, data) for name, data in outer.items()}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        refuse_bare(model, self.specs)
        dtype = kwargs.get("dtype") or getattr(model, "dtype", None) or torch.get_default_dtype()
        place_outer(model, self.outer, dtype)
        check_files(kwargs.get("checkpoint_files") or [], self.specs, self.outer)
        for name, spec in self.specs.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                raise ArtifactError(
                    f"the artifact quantizes {name}, which {type(model).__name__} does not have;"
                    " it was made from another model"
                ) from None
            if not isinstance(linear, nn.Linear):
                raise ArtifactError(
                    f"the artifact quantizes {name}, which is a {type(linear).__name__} and no linear layer in"
                    f" {type(model).__name__}; config.json is damaged"
                )
            if (linear.out_features, linear.in_features) != (spec.rows, spec.columns):
                raise ArtifactError(
                    f"layer {name} is {linear.out_features} x {linear.in_features} in the model"
                    f" and {spec.rows} x {spec.columns} in quantization_config; config.json is damaged"
                )
            with torch.device("meta"):
                model.set_submodule(name, QuantizedLinear(name, spec, self.recipe.activations, dtype))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        connect(model, self.specs)
        connect_outer(model)
        check_values(model)
        leave_files(model)
        pack_sites(model)
        if self.recipe.kv is not None:
            quantized_cache(model, self.recipe)  # here, not at the first token, is where a damaged one is told of
            use_quantized_cache(model, self.recipe)
            use_lean_forward(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Plain nn.Linear layers with the dequantized weights; activations and cache are no longer quantized."""
        leave_lean_forward(model)
        for name, linear in list(quantized_linears(model)):
            weights = linear.dequantize()
            plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            plain.weight = nn.Parameter(weights.to(dtype or weights.dtype), requires_grad=False)
            if linear.bias is not None:
                plain.bias = nn.Parameter(linear.bias.to(plain.weight.dtype), requires_grad=False)
            model.set_submodule(name, plain)
        dequantize_outer(model, dtype)
        model.__dict__.pop("_prepare_cache_for_generation", None)
        return model


def refuse_bare(model: nn.Module, specs: dict[str, LayerSpec]) -> None:
    """Refuse a model without its head, by what it is: its modules have other names than the artifact's."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    if any(name in modules or name.removeprefix(prefix) not in modules for name in specs):
        return
    raise ArtifactError(
        f"the artifact is of a language model with its head, and {type(model).__name__} has none; load it with"
        f" AutoModelForCausalLM.from_pretrained, and take .{prefix[:-1]} of that for hidden states"
    )


def leave_files(model: nn.Module) -> None:
    """Copy what stays small out of the weight files.

    Loaded tensors are views of mapped files, and a file stays mapped, with every page that was read, as long as one of
    them lives. After this, packing lets go of a block's file with the last of its codes. Embeddings and a head stay
    views: the system reads the rows that are used, and may drop them again.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.device.type == "cpu" and parameter.nbytes <= SMALL:
                parameter.data = parameter.data.clone()
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "cpu" and buffer.nbytes <= SMALL and name not in STORED:
                setattr(module, name, buffer.clone())


def connect(model: nn.Module, specs: dict[str, LayerSpec]) -> None:
    """Let the linears of each site share their leader's permutation."""
    for name, linear in quantized_linears(model):
        leader = specs[name].permutation
        if leader is not None and leader != name:
            holder = model.get_submodule(leader)
            assert isinstance(holder, QuantizedLinear)
            linear.share_permutation(holder)


def quantized_cache(model: Any, recipe: Recipe) -> QuantizedKVCache | None:
    """A fresh cache for one forward pass or conversation, or None where the recipe keeps 16 bits."""
    if recipe.kv is None:
        return None
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    described = getattr(model.config, "quantization_config", None)
    cache = getattr(described, "cache", None) if isinstance(described, BitwrightConfig) else None
    return QuantizedKVCache(layers, recipe.kv, cache_clips({"cache": cache}, layers))


def use_quantized_cache(model: nn.Module, recipe: Recipe) -> None:
    """Make the recipe's cache the default of `generate`; a cache or cache_implementation of the caller's wins."""
    original = getattr(model, "_prepare_cache_for_generation", None)
    if original is None:
        return

    def prepare(
        self: nn.Module, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        asked = generation_config.cache_implementation not in (None, "dynamic") or generation_config.use_cache is False
        if model_kwargs.get("past_key_values") is None and not asked:
            model_kwargs["past_key_values"] = quantized_cache(self, recipe)
            generation_config.cache_implementation = None
        return original(generation_config, model_kwargs, *args, **kwargs)

    model._prepare_cache_for_generation = MethodType(prepare, model)  # type: ignore[assignment]


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe of a loaded artifact, None for any other model."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config.parsed_recipe() if isinstance(config, BitwrightConfig) else None


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(BitwrightConfig)
    register_quantizer(QUANT_METHOD)(BitwrightQuantizer)
