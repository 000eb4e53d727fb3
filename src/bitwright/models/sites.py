"""Sites of a block, found by running it: the linears that receive the very same input tensor are one site."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import ModelError
from bitwright.models.frame import Frame
from bitwright.models.passes import first_line, run_block, to_meta

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


def find_linears(frame: Frame, index: int) -> dict[str, nn.Linear]:
    """The linears of block `index` by name. Raises ModelError where the block has weight matrices outside of them."""
    block = frame.blocks[index]
    linears = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    covered = {f"{name}.weight" for name in linears}
    for name, parameter in block.named_parameters():
        if parameter.dim() >= 2 and name not in covered:
            raise ModelError(
                f"{frame.name} block {frame.block_name(index)} is not supported:"
                f" {name} {list(parameter.shape)} is a weight outside torch.nn.Linear"
            )
    return linears


def find_sites(frame: Frame, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[SiteInfo, ...]:
    """Run block `index` on the meta device and group its linears by the identity of their input.

    Raises ModelError when the block holds weight matrices outside nn.Linear or a linear that is never called: a
    quantizer that left them as they are would be silent about it.
    """
    block = frame.blocks[index]
    where = f"{frame.name} block {frame.block_name(index)}"
    linears = find_linears(frame, index)
    order: list[tuple[int, str]] = []
    keep: list[Tensor] = []  # inputs stay alive, so that an identity is not used twice

    def hook(name: str) -> Any:
        def called(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            order.append((id(args[0]), name))
            keep.append(args[0])

        return called

    probe = copy.deepcopy(block).to("meta")
    for name in linears:
        probe.get_submodule(name).register_forward_pre_hook(hook(name))
    try:
        with torch.inference_mode():
            run_block(probe, hidden.to("meta"), to_meta(kwargs))
    except Exception as problem:
        raise ModelError(f"{where} is not supported: it does not run on its own: {first_line(problem)}") from None
    called_once = [name for _, name in order]
    for name in linears:
        if called_once.count(name) != 1:
            raise ModelError(
                f"{where} is not supported: linear {name} is called {called_once.count(name)} times in a forward pass"
            )
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
