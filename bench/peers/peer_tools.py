"""One function a tool: a model directory and calibration segments in, dequantized linears and their bits out.

Each runs in the environment of its tool and goes through the tool's public API alone. A setting is a dict of options
of that tool. Calculation is in float32 where the tool lets it be, so that nothing is lost but by its quantization.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gptq_layout import PARTS, dequantize_gptq, stored_bits
from safetensors import safe_open
from torch import Tensor

BITS = 2
Setting = dict[str, Any]


@dataclass
class Linear:
    """fp32 [outputs, inputs] and the bits that the tool stores for it."""

    weight: Tensor
    bits: int


# The first of a tool is what its documentation starts with; the others are what it offers for better quality.
SETTINGS: dict[str, dict[str, Setting]] = {
    "hqq": {
        "default (axis 1)": {"axis": 1},
        "axis 0": {"axis": 0},
    },
    "gptqmodel": {
        "default (symmetric)": {},
        "zero points": {"sym": False},
        "zero points, mse": {"sym": False, "mse": 2.4},
        "zero points, mse, desc_act": {"sym": False, "mse": 2.4, "desc_act": True},
        "zero points, mse, GPTAQ": {"sym": False, "mse": 2.4, "gptaq": 0.25},
    },
    "auto-round": {
        "light (50 steps)": {"iters": 50, "lr": 5e-3},
        "default (200 steps, symmetric)": {},
        "zero points": {"sym": False},
        "algorithm extension": {"enable_alg_ext": True},
        "zero points, best (1000 steps)": {"sym": False, "iters": 1000},
    },
}


def version(tool: str) -> str:
    from importlib.metadata import version as installed

    return installed(tool)


def hqq(model: Path, segments: Tensor, setting: Setting, group: int, scratch: Path) -> dict[str, Linear]:
    """HQQ: no calibration. Four codes a byte; a scale and a zero point a group in float16.

    Its options that quantize these in turn are ignored by the versions of today.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    config = BaseQuantizeConfig(nbits=BITS, group_size=group, **setting)
    AutoHQQHFModel.quantize_model(network, quant_config=config, compute_dtype=torch.float16, device="cpu")
    found = {}
    for name, module in network.named_modules():
        if not isinstance(module, HQQLinear):
            continue
        parts = {"codes": module.W_q.data, "scale": module.meta["scale"], "zero": module.meta["zero"]}
        exact = {part: parts[part].float() for part in ("scale", "zero")} | {"compute_dtype": torch.float32}
        weight = Quantizer.dequantize(module.W_q.data, module.meta | exact)
        found[name] = Linear(weight, stored_bits(parts))
    return found


def gptqmodel(model: Path, segments: Tensor, setting: Setting, group: int, scratch: Path) -> dict[str, Linear]:
    """GPTQModel, saved in its format `gptq_v2`, the one that it recommends for zero points."""
    # On two cores it would give itself one worker, and then refuse because its loader wants two of them.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    options = dict(setting)
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(alpha=options["gptaq"])
    config = QuantizeConfig(
        bits=BITS, group_size=group, format="gptq_v2", device="cpu", offload_to_disk=False, **options
    )
    network = GPTQModel.load(str(model), config, dtype=torch.float32)
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in segments]
    network.quantize(examples, batch_size=1)
    network.save(str(scratch))
    return read_gptq(scratch, zero_offset=0)


def auto_round(model: Path, segments: Tensor, setting: Setting, group: int, scratch: Path) -> dict[str, Linear]:
    """AutoRound, saved in its own format: GPTQ's layout, with zero points less one where the grid is symmetric."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    sizes = {"nsamples": len(segments), "seqlen": segments.shape[1], "batch_size": 8}
    rounding = AutoRound(
        network,
        tokenizer,
        scheme=f"W{BITS}A16",
        group_size=group,
        dataset=[{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in segments.split(8)],
        device_map="cpu",
        amp=False,
        **sizes,
        **setting,
    )
    rounding.quantize_and_save(str(scratch), format="auto_round")
    config = json.loads(next(scratch.rglob("quantization_config.json")).read_text(encoding="utf-8"))
    return read_gptq(scratch, zero_offset=1 if "gptq" in config["packing_format"] else 0)


def read_gptq(directory: Path, zero_offset: int) -> dict[str, Linear]:
    """The linears of a directory in GPTQ's layout, by name."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(directory):
        layer, _, part = name.rpartition(".")
        if part in PARTS:
            layers.setdefault(layer, {})[part] = tensor
    return {
        name: Linear(dequantize_gptq(parts, BITS, zero_offset), stored_bits(parts)) for name, parts in layers.items()
    }


def tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a directory's safetensors files."""
    for path in sorted(directory.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)


TOOLS: dict[str, Callable[[Path, Tensor, Setting, int, Path], dict[str, Linear]]] = {
    "hqq": hqq,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
}
