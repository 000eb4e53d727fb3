"""Names of tensors in a checkpoint's files and in the model that transformers builds, where they differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def model_names(model: Any, stored: Collection[str]) -> dict[str, str]:
    """{name in the files: name in the model} of tensors that transformers renames when it loads them.

    Pythia's head is `embed_out.weight` in its files and `lm_head.weight` in the model; the files of a bare decoder lack
    the prefix that it has behind a head. What transformers converts and not only renames is not among them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # no public interface: where another version has it elsewhere, names must agree
        return {}

    expected = model.state_dict()
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    found = {
        name: rename_source_key(name, renamings, [], model.base_model_prefix, expected)[0]
        for name in stored
        if name not in expected
    }
    return {name: new for name, new in found.items() if new in expected and new not in stored}
