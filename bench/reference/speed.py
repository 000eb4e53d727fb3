"""How fast training goes, in tokens and in floating-point operations, beside what the machine can do."""

from __future__ import annotations

import time

import torch
from torch import nn


def flops_per_token(model: nn.Module, window: int) -> float:
    """Operations of a training step a token: 6 a weight of every matrix product, and causal attention over `window`.

    Attention: scores and mixing are 2 x 2 x hidden operations a layer and past token, half of the window on average,
    three times for forward and backward. Norms, rotations and the optimizer are left out, as is usual.
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    config = model.config
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 6.0 * weights + 3.0 * 4.0 * heads * config.num_hidden_layers * (window / 2)


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of this machine's best square matrix product: what training could reach at most."""
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        began = time.perf_counter()
        while time.perf_counter() - began < seconds / 2:
            start = time.perf_counter()
            for _ in range(3):
                left @ right
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 3 * 2.0 * size**3 / (time.perf_counter() - start))
    return best
