"""What an artifact must be before anything is computed with it: native code relies on what is looked at here.

Tensors of the described shapes and dtypes in the weight files, before transformers reads them; and, once they are read,
values that can be what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.artifact.layout import LayerSpec, OuterSpec, counted, layer_shapes, outer_shapes
from bitwright.artifact.shards import DTYPE_NAMES
from bitwright.errors import ArtifactError
from bitwright.models.checkpoint import read_header
from bitwright.runtime import QuantizedLinear, quantized_linears
from bitwright.runtime.outer import quantized_outers

_EXPONENT = 0x7C00  # of an fp16 number; all ones in NaN and infinity
_WHAT_TO_DO = "see what `bitwright verify` says, and quantize again where the files are as they were written"


def check_files(files: list[str], specs: dict[str, LayerSpec], outer: dict[str, OuterSpec]) -> None:
    """Refuse weight files that lack a tensor of a packed layer, or hold it in another shape or dtype.

    transformers would fill what is missing with whatever memory holds and only warn. Raises ArtifactError.
    """
    if not files:
        return
    present: dict[str, Any] = {}
    for file in files:
        present.update(read_header(Path(file), ArtifactError))
    for layer, spec in specs.items():
        if spec.permutation is not None and spec.permutation not in specs:
            raise ArtifactError(f"layer {layer} has the permutation of {spec.permutation}, which is no packed layer")
    shapes = [layer_shapes(layer, spec, torch.float32) for layer, spec in specs.items()]
    shapes += [outer_shapes(layer, spec, torch.float32) for layer, spec in outer.items()]
    for expected in shapes:
        for name, (dtype, shape) in expected.items():
            where = f"tensor {name} of the artifact in {Path(files[0]).parent}"
            if name not in present:
                raise ArtifactError(f"{where} is missing from its weight files; see what `bitwright verify` says")
            found = present[name]
            # The sentinel and the bias have the dtype of the original model.
            as_written = found["dtype"] == DTYPE_NAMES[dtype] or not counted(name)
            if found["shape"] != list(shape) or not as_written:
                raise ArtifactError(
                    f"{where} is {found['dtype']} {found['shape']}; config.json asks for"
                    f" {DTYPE_NAMES[dtype]} {list(shape)}"
                )


def check_values(model: nn.Module) -> None:
    """Refuse scales that are not finite, of which nothing sensible can come, and orders that are no order of the
    channels, by which native code would read what is not the model's. Raises ArtifactError.
    """
    for name, linear in quantized_linears(model):
        _check_order(name, linear)
    stored = [(name, linear.stored()) for name, linear in quantized_linears(model)]
    stored += [(name, outer.own_tensors()) for name, outer in quantized_outers(model)]
    for name, tensors in stored:
        for part, tensor in tensors.items():
            if tensor.device.type != "meta" and tensor.dtype == torch.float16 and not _finite(tensor):
                raise ArtifactError(f"tensor {name}.{part} of the artifact holds NaN or infinite values; {_WHAT_TO_DO}")


def _finite(halves: torch.Tensor) -> bool:
    """As isfinite().all(), by the exponents: a tenth of the time."""
    return int((halves.view(torch.int16) & _EXPONENT).amax()) < _EXPONENT if halves.numel() else True


def _check_order(name: str, linear: QuantizedLinear) -> None:
    """Of the first linear of a site, which holds the order: every channel once."""
    if linear.spec.permutation != name or linear.permutation.device.type == "meta":
        return
    columns = linear.spec.columns
    order = linear.permutation.to(torch.int64)
    if not torch.equal(order.sort().values, torch.arange(columns, device=order.device)):
        raise ArtifactError(
            f"tensor {name}.permutation of the artifact is no order of the {columns} columns, each of 0 to"
            f" {columns - 1} once; {_WHAT_TO_DO}"
        )
