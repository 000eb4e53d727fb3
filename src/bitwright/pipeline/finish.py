"""What makes shards an artifact: config, tokenizer, index, card and manifest, the small files written last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bitwright.artifact.card import write_card
from bitwright.artifact.layout import FORMAT_VERSION, QUANT_METHOD, requirements
from bitwright.artifact.manifest import write_index, write_manifest
from bitwright.artifact.shards import write_text
from bitwright.models import Skeleton
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.search import Ratios
from bitwright.pipeline.searching import with_ratios
from bitwright.pipeline.state import RunState

# Files of the model directory that go along: what from_pretrained, generate and chat read beside the weights.
CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
)


def finish(
    directory: Path,
    skeleton: Skeleton,
    plan: Plan,
    state: RunState,
    facts: dict[str, Any],
    measured: dict[str, Any],
    ratios: Ratios,
    summary: dict[str, Any],
) -> None:
    """Write them into `directory`, which holds the shards that `state` names.

    facts     what the bytes of the artifact depend on
    measured  what was measured on the way
    ratios    clip ratios that a search found, else empty
    summary   "tuning" and "allocation" where there were any
    """
    for pattern in CARRIED:
        for path in sorted(skeleton.checkpoint.directory.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
    config = {**skeleton.checkpoint.config, "architectures": [skeleton.name]}
    if plan.unties:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization_config(skeleton, plan, ratios)
    write_text(directory / "config.json", json.dumps(config, indent=1) + "\n")
    write_index(directory, state.shards, plan.tensor_bytes)
    layers = [{key: value for key, value in entry.items() if key != "seconds"} for entry in state.log]
    found: dict[str, Any] = {**({"search": state.search} if ratios else {}), **summary}
    write_card(directory, plan, layers, measured, facts, state.search, found.get("tuning"))
    write_manifest(
        directory, state.shards, {**facts, "sizes": plan.sizes(), "measured": measured, "layers": layers, **found}
    )


def quantization_config(skeleton: Skeleton, plan: Plan, ratios: Ratios) -> dict[str, Any]:
    """What a reader must know of the artifact before it opens a shard (docs/format.md)."""
    inputs = plan.recipe.activations
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "requires": requirements(
            (layer.spec for layer in plan.layers),
            outer=bool(plan.outer),
            symmetric_inputs=inputs is not None and inputs.symmetric,
            clips=bool(ratios),
        ),
        "recipe": plan.recipe.to_dict(),
        "layers": {layer.name: layer.spec.to_dict() for layer in plan.layers},
    }
    if ratios:
        config.update(with_ratios(skeleton, plan, ratios))
    if plan.outer:
        config["outer"] = {name: spec.to_dict() for name, spec in plan.outer.items()}
    return config
