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
from bitwright.models.checkpoint import INDEX_NAME, SINGLE_NAME, read_header
from bitwright.runtime import QuantizedLinear, quantized_linears
from bitwright.runtime.outer import quantized_outers
from bitwright.runtime.tiles import STORED

PARTS = (*STORED, "permutation", "bias")  # what a packed linear may store
_EXPONENT = 0x7C00  # of an fp16 number; all ones in NaN and infinity
_WHAT_TO_DO = "see what `bitwright verify` says, and quantize again where the files are as they were written"


def check_files(files: list[str], specs: dict[str, LayerSpec], outer: dict[str, OuterSpec]) -> None:
    """Refuse weight files that lack a tensor of a packed layer, hold it in another shape or dtype, or hold one more.

    transformers would fill what is missing with whatever memory holds, leave what is too much, and only warn. Raises
    ArtifactError.
    """
    if not files:
        return
    directory = Path(files[0]).parent
    if [Path(file).name for file in files] == [SINGLE_NAME] and (directory / INDEX_NAME).exists():
        raise ArtifactError(
            f"{directory} has both {SINGLE_NAME} and {INDEX_NAME}, and transformers reads the first alone; remove the"
            " one that does not belong to the artifact (`bitwright verify` says which)"
        )
    present: dict[str, Any] = {}
    for file in files:
        present.update(read_header(Path(file), ArtifactError))
    for layer, spec in specs.items():
        _check_site(layer, spec, specs)
    described = [layer_shapes(layer, spec, torch.float32) for layer, spec in specs.items()]
    for layer, shapes in zip(specs, described, strict=True):
        for name in (f"{layer}.{part}" for part in PARTS):
            if name in present and name not in shapes:
                raise ArtifactError(
                    f"tensor {name} of the artifact in {directory} is one that config.json does not describe;"
                    " config.json is damaged"
                )
    described += [outer_shapes(layer, spec, torch.float32) for layer, spec in outer.items()]
    for expected in described:
        for name, (dtype, shape) in expected.items():
            where = f"tensor {name} of the artifact in {directory}"
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


def _check_site(layer: str, spec: LayerSpec, specs: dict[str, LayerSpec]) -> None:
    """Linears that share an order are one site: the same is done to their input, in one go."""
    if spec.permutation is None or spec.permutation == layer:
        return
    leader = specs.get(spec.permutation)
    if leader is None:
        raise ArtifactError(f"layer {layer} has the permutation of {spec.permutation}, which is no packed layer")
    if leader.permutation != spec.permutation:
        raise ArtifactError(
            f"layer {layer} has the permutation of {spec.permutation}, which has none of its own;"
            " config.json is damaged"
        )
    for key in ("columns", "outliers", "group", "hadamard", "stride", "clip"):
        mine, others = getattr(spec, key), getattr(leader, key)
        if mine != others:
            raise ArtifactError(
                f"layer {layer} has the permutation of {spec.permutation} and not its {key}: {mine} and {others};"
                " config.json is damaged"
            )


def check_values(model: nn.Module) -> None:
    """Refuse scales that are not finite, of which nothing sensible can come; orders that are no order of the channels,
    by which native code would read what is not the model's; and zero points that are no code. Raises ArtifactError.
    """
    for name, linear in quantized_linears(model):
        _check_order(name, linear)
        _check_zeros(name, linear)
    stored = [(name, linear.stored()) for name, linear in quantized_linears(model)]
    stored += [(name, outer.own_tensors()) for name, outer in quantized_outers(model)]
    for name, tensors in stored:
        for part, tensor in tensors.items():
            if tensor.device.type != "meta" and tensor.is_floating_point() and not _finite(tensor):
                raise ArtifactError(f"tensor {name}.{part} of the artifact holds NaN or infinite values; {_WHAT_TO_DO}")


def _finite(numbers: torch.Tensor) -> bool:
    """As isfinite().all(), of fp16 by the exponents: a tenth of the time."""
    if numbers.dtype != torch.float16 or not numbers.numel():
        return bool(torch.isfinite(numbers).all())
    return int((numbers.view(torch.int16) & _EXPONENT).amax()) < _EXPONENT


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


def _check_zeros(name: str, linear: QuantizedLinear) -> None:
    """A zero point is one of the codes: a level is then what a byte holds."""
    zeros = linear.stored().get("zeros")
    if zeros is None or zeros.device.type == "meta" or not zeros.numel():
        return
    highest, found = 2**linear.spec.bits - 1, int(zeros.max())
    if found > highest:
        raise ArtifactError(
            f"tensor {name}.zeros of the artifact holds {found}; zero points of {linear.spec.bits}-bit codes are 0 to"
            f" {highest}; {_WHAT_TO_DO}"
        )
