"""The main job on the shipped model: quantize, measure, speak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitwright.calibration import load_tokenizer, text_of
from bitwright.demo.corpus import calibration_text, evaluation_text
from bitwright.evaluation import evaluate_model, load
from bitwright.pipeline import quantize
from bitwright.pipeline.run import Reporter
from bitwright.recipe import Recipe
from bitwright.workers import Workers

MODEL = Path(__file__).parent / "model"
SEQUENCES = 48
PROMPT = "The following methods are supported by"


def run_demo(
    output: Path, recipe: Recipe, threads: int | None = None, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Quantize the demo model into `output` and measure both on text that neither training nor calibration saw."""
    result = quantize(
        MODEL,
        output,
        recipe,
        text_of("calibration topics of pydoc", calibration_text()),
        threads=threads,
        reporter=reporter,
    )
    text = text_of("evaluation topics of pydoc", evaluation_text())
    tokenizer = load_tokenizer(MODEL)
    models = {"original": load(MODEL), "quantized": load(output)}
    measured = {name: evaluate_model(model, tokenizer, text, threads=threads) for name, model in models.items()}
    with Workers(threads) as workers:
        samples = dict(zip(models, workers.map(lambda model: _sample(model, tokenizer), models.values()), strict=True))
    plan = result.plan
    return {
        "recipe": recipe.name,
        "original": measured["original"].to_dict(),
        "quantized": measured["quantized"].to_dict(),
        "excess": measured["quantized"].loss - measured["original"].loss,
        "linear_bits": plan.linear_bits,
        "model_bits": plan.model_bits,
        "original_bits": plan.original_bytes * 8 / plan.parameters,
        "original_bytes": plan.original_bytes,
        "total_bytes": plan.total_bytes,
        "samples": samples,
    }


def _sample(model: Any, tokenizer: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=60,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
