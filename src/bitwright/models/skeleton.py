"""The model without its weights: decoder blocks, sites and linears found by structure, one block filled at a time.

The whole model is built on the meta device from its config. Blocks are the one list of modules as long as the config
says; what the model passes to each block (masks, positions, rotary tables) is recorded by running the model once with
the blocks replaced by recorders; the linears that receive the very same input tensor are one site.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.errors import ModelError
from bitwright.models.checkpoint import Checkpoint
from bitwright.models.frame import Frame
from bitwright.models.names import model_names
from bitwright.models.passes import Call, first_line, materialized, record_calls
from bitwright.models.sites import SiteInfo, find_linears, find_sites
from bitwright.models.writers import find_writers


class Skeleton(Frame):
    """The meta model of a checkpoint, its decoder blocks and their sites. Raises ModelError when it does not fit."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        if (quantization := checkpoint.config.get("quantization_config")) is not None:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise ModelError(
                f"{checkpoint.directory} is already quantized (quant_method {method}); give the original model"
            )
        self.config = self._load_config()
        self.model = self._build()
        prefix, blocks = self._find_blocks()
        super().__init__(self.model, self.config, prefix, list(blocks))
        self._calls: list[Call] | None = None
        self._sites: dict[int, tuple[SiteInfo, ...]] = {}
        # First: an architecture that is not supported often has other names in its files, too.
        for index in range(len(self.blocks)):
            find_linears(self, index)
        checkpoint.rename(model_names(self.model, checkpoint.tensors))
        self._check_names()

    def _load_config(self) -> Any:
        try:
            config = AutoConfig.from_pretrained(self.checkpoint.directory, local_files_only=True)
        except Exception as problem:
            kind = self.checkpoint.config.get("model_type", "missing")
            raise ModelError(
                f"transformers cannot read the config of {self.checkpoint.directory} (model_type {kind!r}):"
                f" {first_line(problem)}"
            ) from None
        for key, value in self.checkpoint.changes.items():
            setattr(config, key, value)
        return config

    def _build(self) -> Any:
        if getattr(self.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{self.config.model_type} is an encoder-decoder; only decoder language models are supported"
            )
        try:
            # Buffers stay real: rotary tables are computed when the module is built.
            with init_empty_weights(include_buffers=False):
                return AutoModelForCausalLM.from_config(self.config).eval()
        except Exception as problem:
            raise ModelError(
                f"transformers cannot build a causal language model of type {self.config.model_type!r} from"
                f" {self.checkpoint.directory}/config.json: {first_line(problem)}"
            ) from None

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        depth = getattr(self.config.get_text_config(decoder=True), "num_hidden_layers", None)
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        ]
        if len(found) != 1:
            raise ModelError(
                f"{self.name} is not supported: expected one list of {depth} decoder blocks, found {len(found)}"
            )
        return found[0]

    def _check_names(self) -> None:
        expected = set(self.model.state_dict().keys())
        present = set(self.checkpoint.tensors)
        tied = self.tied_names()
        missing = sorted(expected - present - tied)
        if missing:
            raise ModelError(
                f"{self.checkpoint.directory} lacks {len(missing)} of the {len(expected)} tensors of"
                f" {self.name}, first {missing[0]};"
                " the checkpoint is incomplete or of another architecture"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for name in sorted(expected & present):
            info = self.checkpoint.tensors[name]
            if info.shape != shapes[name]:
                raise ModelError(
                    f"tensor {name} in {self.checkpoint.directory / info.file} has shape {list(info.shape)};"
                    f" config.json asks for {list(shapes[name])}"
                )
        self.checkpoint.check_dtypes(sorted(expected & present))
        self.ignored = sorted(present - expected)

    def block_tensor_names(self, index: int) -> list[str]:
        """Names inside block `index` of everything that its state dict holds."""
        return list(self.blocks[index].state_dict().keys())

    def fill_block(self, index: int) -> nn.Module:
        """A copy of block `index` with its weights in fp32; the skeleton itself stays empty."""
        block = copy.deepcopy(self.blocks[index])
        prefix = self.block_name(index)
        names = self.block_tensor_names(index)
        values = self.checkpoint.load([f"{prefix}.{name}" for name in names])
        block.load_state_dict({name: values[f"{prefix}.{name}"] for name in names}, assign=True)
        return block.eval().requires_grad_(False)

    def outer_tensor_names(self, part: Literal["all", "before", "after"] = "all") -> list[str]:
        """State dict names outside the blocks that the checkpoint holds: embeddings, final norm, head.

        `before` leaves out the head, `after` the input embedding where the head has a matrix of its own: what is
        needed to enter the blocks and to leave them.
        """
        inside = f"{self.prefix}."
        held = self.checkpoint.tensors
        names = [name for name in self.model.state_dict() if not name.startswith(inside) and name in held]
        modules = dict(self.model.named_modules())
        heads = [name for name in names if modules[name.rpartition(".")[0]] is self.model.get_output_embeddings()]
        inputs = [name for name in names if modules[name.rpartition(".")[0]] is self.embedding]
        if part == "before":
            return [name for name in names if name not in heads]
        if part == "after" and heads:
            return [name for name in names if name not in inputs]
        return names

    def sites(self, index: int) -> tuple[SiteInfo, ...]:
        """Sites of block `index` in the order in which it uses them."""
        if index not in self._sites:
            self._sites[index] = find_sites(self, index, *self.calls()[index])
        return self._sites[index]

    def writers(self, index: int) -> dict[str, str]:
        """Linears of block `index` that write to the residual stream, and where it passes (`find_writers`)."""
        return find_writers(self.blocks[index], *self.calls()[index])

    def calls(self) -> list[Call]:
        """Inputs that each block gets from the model for a short dummy sequence; the weights are zeros."""
        if self._calls is None:
            with materialized(self, {}):
                self._calls = record_calls(self, inputs_embeds=torch.zeros(1, 4, self.width))
        return self._calls
