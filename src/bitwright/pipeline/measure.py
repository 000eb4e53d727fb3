"""What a run measures at its end: the loss of both models, from their hidden states after the last block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration import Stream
from bitwright.models.passes import head
from bitwright.pipeline.outer import with_outer_quantized
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.source import Source
from bitwright.workers import Workers


def measure(
    source: Source, plan: Plan, streams: Mapping[str, Stream], windows: Tensor, workers: Workers
) -> dict[str, Any]:
    """Losses on the calibration windows and, behind them, those of another text, from the streams `full` and
    `quantized` after the last block; `windows` int64 [sequences, length]."""
    values = source.outer("after")
    sequences = plan.recipe.calibration.sequences
    parts = {"calibration": range(sequences)}
    if len(windows) > sequences:
        parts["evaluation"] = range(sequences, len(windows))
    losses: dict[str, dict[str, float]] = {}
    for role in ("full", "quantized"):
        if role == "quantized":
            values = with_outer_quantized(source.skeleton, values, plan.outer)
        with head(source.skeleton, values) as logits:
            stream = streams[role]

            def unit(index: int, stream: Stream = stream, logits: Callable[[Tensor], Tensor] = logits) -> float:
                scores = logits(stream.read(index))[0, :-1]
                return float(torch.nn.functional.cross_entropy(scores, windows[index, 1:]))

            losses[role] = {part: sum(workers.map(unit, indices)) / len(indices) for part, indices in parts.items()}
    return {
        part: {
            "windows": len(indices),
            "length": plan.length,
            "loss_original": losses["full"][part],
            "loss_quantized": losses["quantized"][part],
            "excess": losses["quantized"][part] - losses["full"][part],
        }
        for part, indices in parts.items()
    }
