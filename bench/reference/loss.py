"""Cross-entropy of a large vocabulary in pieces, so that on a CPU the logits never leave the cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

ROWS = 512


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(hidden @ head^T)[label]; both gradients are made on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros(())
        wanted = torch.is_grad_enabled() or hidden.requires_grad
        hidden_gradient = torch.empty_like(hidden) if wanted else None
        head_gradient = torch.zeros_like(head) if wanted else None
        for start in range(0, len(hidden), ROWS):
            rows, label = hidden[start : start + ROWS], labels[start : start + ROWS]
            scores = torch.log_softmax(rows @ head.t(), dim=-1)
            total += F.nll_loss(scores, label, reduction="sum")
            if hidden_gradient is not None and head_gradient is not None:
                scores.exp_()
                scores[torch.arange(len(label)), label] -= 1.0
                torch.mm(scores, head, out=hidden_gradient[start : start + ROWS])
                head_gradient.addmm_(scores.t(), rows)
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # type: ignore[override]
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * gradients[0], head_gradient * gradients[0], None


def summed_cross_entropy(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of all `labels` (tokens) under logits hidden (tokens, width) @ head^T (vocabulary, width)."""
    return _SummedCrossEntropy.apply(hidden, head, labels)
