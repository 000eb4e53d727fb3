"""A model or artifact from a directory, with errors in one sentence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from bitwright.errors import ArtifactError, BitwrightError, ModelError
from bitwright.models.checkpoint import Checkpoint
from bitwright.models.passes import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str) -> None:
    """Raises ModelError where models are not loaded in it."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def load(path: str | Path, dtype: str = "float32") -> Any:
    """A causal language model of a local directory, original or artifact, in evaluation mode.

    Raises ModelError or ArtifactError in one sentence where transformers would fail later and at length.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    checkpoint = Checkpoint(path)
    check_dtype(dtype)
    logging.disable_progress_bar()
    error = ArtifactError if checkpoint.config.get("quantization_config") is not None else ModelError
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that it says which; refused below
        )
    except BitwrightError:
        raise
    except Exception as problem:
        raise error(f"transformers cannot load {path}: {first_line(problem)}") from None
    model, info = loaded
    # transformers only warns, and goes on with random weights.
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise error(f"tensor {name} in {path} has shape {list(found)}; config.json asks for {list(expected)}")
    if missing := sorted(info["missing_keys"]):
        raise error(
            f"{path} lacks {len(missing)} of the tensors of {type(model).__name__}, first {missing[0]};"
            " the weights are incomplete or of another architecture"
        )
    # Not state_dict: it would turn packed weights back; the artifact's own numbers were checked before packing.
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
        ):
            raise error(
                f"tensor {name} in {path} holds NaN or infinite values in {dtype}; nothing sensible can come of it"
            )
    return model.eval()
