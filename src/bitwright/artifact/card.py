"""The model card: a README.md that says how large and how good the artifact is, from measurements alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from bitwright.artifact.layout import CARD_NAME
from bitwright.artifact.shards import write_text

if TYPE_CHECKING:
    from bitwright.pipeline.plan import Plan

TEMPLATE = """\
---
library_name: transformers
base_model: {{ plan.model }}
tags: [bitwright, quantized, w{{ plan.weight_bits|replace(' to ', '-') }}a{{ activation_bits }}]
---

# {{ plan.model }}, quantized with bitwright (recipe `{{ plan.recipe.name }}`)

```python
import bitwright  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
```

or `bitwright generate THIS_DIRECTORY "Once upon a time"`. `bitwright verify THIS_DIRECTORY` checks every byte.

## Size, all bits counted

| | bits | bytes |
|---|---|---|
| quantized linears ({{ "{:,}".format(plan.linear_weights) }} weights): codes, levels, scales, outliers, permutations \
| {{ "%.4f"|format(plan.linear_bits) }} a weight | {{ "{:,}".format(plan.linear_bytes) }} |
{% if claimed is not none -%}
| the same by the method's own formula, which leaves out {{ left_out }} \
| {{ "%.4f"|format(claimed) }} a weight | |
{% endif -%}
| whole model ({{ "{:,}".format(plan.parameters) }} parameters), embeddings and head included \
| {{ "%.4f"|format(plan.model_bits) }} a parameter | {{ "{:,}".format(plan.total_bytes) }} |
{% for name in plan.outer -%}
| of these `{{ name }}`: codes, scales | {{ "%.4f"|format(plan.outer_bits(name)) }} a weight \
| {{ "{:,}".format(plan.outer_bytes(name)) }} |
{% endfor -%}
| original weight files | {{ "%.4f"|format(plan.original_bytes * 8 / plan.parameters) }} a parameter \
| {{ "{:,}".format(plan.original_bytes) }} |

## Quality, measured

| text | windows | perplexity before | after | excess |
|---|---|---|---|---|
{% for part, row in measured.items() -%}
| {{ names[part] }} | {{ row.windows }} x {{ row.length }} tokens | {{ "%.4f"|format(exp(row.loss_original)) }} \
| {{ "%.4f"|format(exp(row.loss_quantized)) }} | {{ "%.4f"|format(row.excess) }} |
{% endfor %}
Perplexity a token of the model's own tokenizer, mean over the targets of each window, windows averaged; weights,
{{ activation_words }} and {{ kv_words }} quantized as in use. Excess is ln(after / before). The calibration text was
seen by the quantizer: its row flatters. For a text of your own: `bitwright eval THIS_DIRECTORY --text FILE`.
{% if tuning -%}
Tuned for {{ tuning.steps }} steps of Adam: the divergence of the logits from the original's, on calibration text that \
was held back, went from {{ "%.4f"|format(tuning.before) }} to {{ "%.4f"|format(tuning.after) }} nats a token. The \
errors below are those before the tuning.
{% endif %}
## Provenance

- recipe: `{{ recipe_json }}`
- calibration: {{ facts.calibration.name }}, sha256 {{ facts.calibration.sha256 }}
{% for name, digest in facts.model.files.items() -%}
- original {{ name }}: sha256 {{ digest }}
{% endfor -%}
- bitwright {{ facts.bitwright }}, torch {{ facts.torch }}, transformers {{ facts.transformers }}

## Layers

Relative output error on the calibration inputs (quantized activations in, weights exchanged).

| linear | shape | outliers | bits | error | damping | rescue |
|---|---|---|---|---|---|---|
{% for entry in layers -%}
| {{ entry.linear }} | {{ entry.shape[0] }} x {{ entry.shape[1] }} | {{ entry.outliers }} | \
{{ "%.4f"|format(entry.bits) }} | {{ "%.5f"|format(entry.error) }} | {{ entry.damping }} | {{ entry.rescue or "" }} |
{% endfor %}
{%- if search %}
## Clip ratios

{% set asked = plan.recipe.search -%}
Searched by `{{ asked.method }}`, in this order, for the least \
{% if asked.method == "ambiguous" -%}
squared error of the output and, where that left several ratios open (ambiguous), loss, on at most 16 windows of the \
first \
{% else -%}
{{ "loss" if asked.objective == "perplexity" else "squared error of the output" }} on the first \
{% endif -%}
{{ "%g"|format(asked.share * 100) }} % of the calibration text.

| inputs or cache | ratio | value | evaluations |
|---|---|---|---|
{% for entry in search -%}
| {{ entry.target }} | {{ "%.5g"|format(entry.ratio) }} | \
{{ ("loss " if entry.ambiguous else "error ") if entry.ambiguous is defined }}{{ "%.6g"|format(entry.value) }} | \
{{ entry.tried|length + entry.errors|default([])|length }} |
{% endfor %}
{%- endif %}"""


def write_card(
    directory: Path,
    plan: Plan,
    layers: list[dict[str, Any]],
    measured: dict[str, Any],
    facts: dict[str, Any],
    search: list[dict[str, Any]],
    tuning: dict[str, Any] | None = None,
) -> None:
    """Write README.md. It holds no time, path or command line: equal artifacts have equal cards."""
    recipe = plan.recipe
    names = {"calibration": f"{facts['calibration']['name']} (calibration)"}
    if facts["evaluation"]:
        names["evaluation"] = f"{facts['evaluation']['name']} (not calibrated on)"
    left_out = "the group of each weight"
    if recipe.weights.method == "billm":
        left_out = "which side of the break point a weight is on, and all parameters"
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE)
    text = template.render(
        plan=plan,
        claimed=plan.claimed_after(layers),
        left_out=left_out,
        layers=layers,
        measured=measured,
        facts=facts,
        search=search,
        tuning=tuning,
        names=names,
        exp=math.exp,
        recipe_json=json.dumps(recipe.to_dict(), sort_keys=True),
        activation_bits=recipe.activations.bits if recipe.activations else 16,
        activation_words=f"activations to {recipe.activations.bits} bits"
        if recipe.activations
        else "16-bit activations",
        kv_words=f"the key-value cache to {recipe.kv.bits} bits" if recipe.kv else "a 16-bit key-value cache",
    )
    write_text(directory / CARD_NAME, text)
