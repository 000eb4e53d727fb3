"""The bare frame of a model: its modules on meta, and where its decoder blocks stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


def context_length(config: Any) -> int | None:
    """Tokens that a model of this config can look back on, None where the config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or None


@dataclass(eq=False)
class Frame:
    """A causal language model of transformers on the meta device, its config, and its one list of decoder blocks.

    prefix  the list's module name, e.g. `model.layers`
    """

    model: Any
    config: Any
    prefix: str
    blocks: list[nn.Module]

    @property
    def name(self) -> str:
        """The architecture, e.g. `LlamaForCausalLM`."""
        return type(self.model).__name__

    @property
    def embedding(self) -> Any:
        """The model's input embedding."""
        return self.model.get_input_embeddings()

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return int(self.embedding.embedding_dim)

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def tied_names(self) -> set[str]:
        """State dict names that a checkpoint may leave out because they share another tensor."""
        if not getattr(self.config.get_text_config(decoder=True), "tie_word_embeddings", False):
            return set()
        head = self.model.get_output_embeddings()
        return {f"{name}.weight" for name, module in self.model.named_modules() if head is not None and module is head}
