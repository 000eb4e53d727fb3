"""Data parallel training inside one process: one torch thread a replica, all on the same weights.

Small models spend a CPU's time on many small operations, where two threads on one operation wait for each other; two
replicas of one thread each do not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn


class Replicas:
    """Copies of a model that share its parameters' storage and have gradients of their own."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self.models = [model]
        for _ in range(count - 1):
            replica = copy.deepcopy(model)
            self.share(model, replica)
            self.models.append(replica)
        self.pool = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1)) if count > 1 else None

    @staticmethod
    def share(model: nn.Module, replica: nn.Module) -> None:
        for parameter, copied in zip(model.parameters(), replica.parameters(), strict=True):
            copied.data = parameter.data

    def accumulate(
        self, parts: list[torch.Tensor], loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Adds the gradients of the sum of `loss` over `parts` to the first model's; gives that sum.

        Part i is the work of replica i mod count, and replicas are added in order: the result depends on their number
        alone, not on which is faster.
        """

        def work(index: int) -> torch.Tensor:
            model, total = self.models[index], torch.zeros((), device=parts[0].device)
            for part in parts[index :: len(self.models)]:
                value = loss(model, part)
                value.backward()
                total += value.detach()
            return total

        if self.pool is None:
            return work(0)
        total = torch.stack(list(self.pool.map(work, range(len(self.models))))).sum()
        for parameter, *others in zip(*(model.parameters() for model in self.models), strict=True):
            for other in others:
                if other.grad is not None:
                    parameter.grad = other.grad if parameter.grad is None else parameter.grad.add_(other.grad)
                    other.grad = None
        return total
