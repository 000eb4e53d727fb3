"""The model without its weights: decoder blocks, sites and linears found by structure, one block filled at a time.

The whole model is built on the meta device from its config. Blocks are the one list of modules as long as the config
says; what the model passes to each block (masks, positions, rotary tables) is recorded by running the model once with
the blocks replaced by recorders; the linears that receive the very same input tensor are one site.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.errors import ModelError
from bitwright.models.checkpoint import Checkpoint

# Names by which the four sites of the usual decoder block are known; others are named after their linears.
SITE_NAMES = {
    ("q_proj", "k_proj", "v_proj"): "attn_in",
    ("qkv_proj",): "attn_in",
    ("o_proj",): "attn_out",
    ("gate_proj", "up_proj"): "mlp_in",
    ("gate_up_proj",): "mlp_in",
    ("down_proj",): "mlp_out",
}


@dataclass(frozen=True)
class LinearInfo:
    """One nn.Linear of a block: its name inside the block, its shape, whether it has a bias."""

    name: str
    rows: int
    columns: int
    bias: bool


@dataclass(frozen=True)
class SiteInfo:
    """Linears that share one input, in the order in which the block calls them; the first one is the leader."""

    name: str
    linears: tuple[LinearInfo, ...]

    @property
    def columns(self) -> int:
        return self.linears[0].columns

    @property
    def leader(self) -> LinearInfo:
        return self.linears[0]


class Skeleton:
    """The meta model of a checkpoint, its decoder blocks and their sites. Raises ModelError when it does not fit."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        if "quantization_config" in checkpoint.config:
            method = checkpoint.config["quantization_config"].get("quant_method", "unknown")
            raise ModelError(
                f"{checkpoint.directory} is already quantized (quant_method {method}); give the original model directory"
            )
        self.config = self._load_config()
        self.model = self._build()
        self.prefix, blocks = self._find_blocks()
        self.blocks: list[nn.Module] = list(blocks)
        self._calls: list[tuple[Tensor, dict[str, Any]]] | None = None
        self._sites: dict[int, tuple[SiteInfo, ...]] = {}
        self._check_names()

    def _load_config(self) -> Any:
        try:
            return AutoConfig.from_pretrained(self.checkpoint.directory, local_files_only=True)
        except Exception as problem:
            kind = self.checkpoint.config.get("model_type", "missing")
            raise ModelError(
                f"the config of {self.checkpoint.directory} (model_type {kind!r}) is not one that transformers can read:"
                f" {_first_line(problem)}"
            ) from None

    def _build(self) -> nn.Module:
        if getattr(self.config, "is_encoder_decoder", False):
            raise ModelError(f"{self.config.model_type} is an encoder-decoder; only decoder language models are supported")
        try:
            # Buffers stay real: rotary tables are computed when the module is built.
            with init_empty_weights(include_buffers=False):
                return AutoModelForCausalLM.from_config(self.config).eval()
        except Exception as problem:
            raise ModelError(
                f"transformers cannot build a causal language model of type {self.config.model_type!r} from"
                f" {self.checkpoint.directory}/config.json: {_first_line(problem)}"
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
                f"{type(self.model).__name__} is not supported: expected one list of {depth} decoder blocks,"
                f" found {len(found)}"
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
                f" {type(self.model).__name__}, first {missing[0]}; the checkpoint is incomplete or of another architecture"
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

    def tied_names(self) -> set[str]:
        """State dict names that a checkpoint may leave out because they share another tensor."""
        if not getattr(self.config.get_text_config(decoder=True), "tie_word_embeddings", False):
            return set()
        head = self.model.get_output_embeddings()
        return {f"{name}.weight" for name, module in self.model.named_modules() if head is not None and module is head}

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

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

    def outer_tensor_names(self) -> list[str]:
        """State dict names outside the blocks that the checkpoint holds: embeddings, final norm, head."""
        inside = f"{self.prefix}."
        return [name for name in self.model.state_dict() if not name.startswith(inside) and name in self.checkpoint.tensors]

    def sites(self, index: int) -> tuple[SiteInfo, ...]:
        """Sites of block `index` in the order in which it uses them."""
        if index not in self._sites:
            self._sites[index] = find_sites(self, index)
        return self._sites[index]

    def calls(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Inputs that each block gets from the model for a short dummy sequence; the weights are zeros."""
        if self._calls is None:
            width = self.model.get_input_embeddings().embedding_dim  # type: ignore[union-attr]
            with _materialized(self, {}):
                self._calls = record_calls(self, inputs_embeds=torch.zeros(1, 4, width))
        return self._calls


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0]


class _Stop(Exception):
    """Raised by the last recorder: the rest of the model is not needed."""


class _Recorder(nn.Module):
    """Stands in for a block, keeps what it is called with, and returns its input."""

    def __init__(self, block: nn.Module, calls: list[tuple[Tensor, dict[str, Any]]], last: bool) -> None:
        super().__init__()
        self._calls, self._last = calls, last
        # Models read attributes of their blocks, such as attention_type, to choose a mask.
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise ModelError("the model passes positional arguments to its decoder blocks; this architecture is not supported")
        self._calls.append((hidden_states, kwargs))
        if self._last:
            raise _Stop
        return hidden_states


class _materialized:
    """Parameters outside the blocks for the time of a with: given values, else zeros that no page of memory backs."""

    def __init__(self, skeleton: Skeleton, values: dict[str, Tensor]) -> None:
        self.skeleton, self.values = skeleton, values
        self.saved: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        inside = f"{self.skeleton.prefix}."
        shared: dict[int, nn.Parameter] = {}
        tied = self.skeleton.tied_names()
        embedding = self.skeleton.model.get_input_embeddings().weight  # type: ignore[union-attr]
        for name, parameter in list(self.skeleton.model.named_parameters(remove_duplicate=False)):
            if name.startswith(inside) or not parameter.is_meta:
                continue
            path, _, leaf = name.rpartition(".")
            module = self.skeleton.model.get_submodule(path)
            self.saved.append((module, leaf, parameter))
            key = id(embedding) if name in tied and name not in self.values else id(parameter)
            if key not in shared:
                value = self.values.get(name)
                shared[key] = nn.Parameter(torch.zeros(parameter.shape) if value is None else value, requires_grad=False)
            module._parameters[leaf] = shared[key]

    def __exit__(self, *_: object) -> None:
        for module, leaf, parameter in self.saved:
            module._parameters[leaf] = parameter


def record_calls(skeleton: Skeleton, **inputs: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """Run the model's own forward up to its blocks and return (hidden states, keyword arguments) for each block."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    container = skeleton.model.get_submodule(skeleton.prefix)
    last = len(skeleton.blocks) - 1
    try:
        for index, block in enumerate(skeleton.blocks):
            container[index] = _Recorder(block, calls, index == last)  # type: ignore[operator, index]
        with torch.inference_mode():
            skeleton.model(**inputs, use_cache=False)
    except _Stop:
        pass
    finally:
        for index, block in enumerate(skeleton.blocks):
            container[index] = block  # type: ignore[operator, index]
    if len(calls) != len(skeleton.blocks):
        raise ModelError(f"{type(skeleton.model).__name__} is not supported: it did not call each of its decoder blocks once")
    return calls


def embed(skeleton: Skeleton, values: dict[str, Tensor], input_ids: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """As record_calls, for real tokens int64 [1, length] and the real values of the parameters outside the blocks."""
    with _materialized(skeleton, values):
        return record_calls(skeleton, input_ids=input_ids)


class _Feed(nn.Module):
    """Stands in for a block and returns the hidden states that this thread has laid out."""

    def __init__(self, local: threading.local, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_local"], self.__dict__["_block"] = local, block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.__dict__["_local"].hidden


@contextmanager
def head(skeleton: Skeleton, values: dict[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """The part of the model after its blocks: a function from hidden states [1, length, width] to logits.

    The model's own forward runs, with blocks that hand on the given states, so whatever stands between the last block
    and the logits is what the architecture says. The function may be called by several threads.
    """
    local = threading.local()
    container = skeleton.model.get_submodule(skeleton.prefix)

    def logits(hidden: Tensor) -> Tensor:
        local.hidden = hidden
        return skeleton.model(inputs_embeds=hidden, use_cache=False).logits

    with _materialized(skeleton, values):
        for index, block in enumerate(skeleton.blocks):
            container[index] = _Feed(local, block)  # type: ignore[operator, index]
        try:
            yield logits
        finally:
            for index, block in enumerate(skeleton.blocks):
                container[index] = block  # type: ignore[operator, index]


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Hidden states after `block`; blocks of some models return them in a tuple."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def find_sites(skeleton: Skeleton, index: int) -> tuple[SiteInfo, ...]:
    """Run block `index` on the meta device and group its linears by the identity of their input.

    Raises ModelError when the block holds weight matrices outside nn.Linear or a linear that is never called: a
    quantizer that left them as they are would be silent about it.
    """
    block = skeleton.blocks[index]
    where = f"{type(skeleton.model).__name__} block {skeleton.block_name(index)}"
    linears = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    covered = {f"{name}.weight" for name in linears}
    for name, parameter in block.named_parameters():
        if parameter.dim() >= 2 and name not in covered:
            raise ModelError(f"{where} is not supported: {name} {list(parameter.shape)} is a weight outside torch.nn.Linear")
    order: list[tuple[int, str]] = []
    keep: list[Tensor] = []  # inputs stay alive, so that an identity is not used twice

    def hook(name: str) -> Any:
        def called(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            order.append((id(args[0]), name))
            keep.append(args[0])

        return called

    hidden, kwargs = skeleton.calls()[index]
    probe = copy.deepcopy(block).to("meta")
    for name in linears:
        probe.get_submodule(name).register_forward_pre_hook(hook(name))
    try:
        with torch.inference_mode():
            run_block(probe, hidden.to("meta"), _to_meta(kwargs))
    except Exception as problem:
        raise ModelError(f"{where} is not supported: it does not run on its own: {_first_line(problem)}") from None
    called_once = [name for _, name in order]
    for name in linears:
        if called_once.count(name) != 1:
            raise ModelError(f"{where} is not supported: linear {name} is called {called_once.count(name)} times in a forward pass")
    groups: dict[int, list[LinearInfo]] = {}
    for identity, name in order:
        module = linears[name]
        groups.setdefault(identity, []).append(
            LinearInfo(name, module.out_features, module.in_features, module.bias is not None)
        )
    return tuple(SiteInfo(_site_name(members), tuple(members)) for members in groups.values())


def _site_name(members: list[LinearInfo]) -> str:
    leaves = tuple(member.name.rpartition(".")[2] for member in members)
    return SITE_NAMES.get(leaves, "_".join(leaves))


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(item) for item in value)
    return value
