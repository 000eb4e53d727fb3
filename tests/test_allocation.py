"""Bits where the loss feels them: `allocate` and `sites` through whole runs."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bitwright
import simulation
import support
from bitwright.calibration import Text, load_tokenizer, random_windows, text_of, tokenize
from bitwright.demo import run as demo
from bitwright.demo.corpus import calibration_text
from bitwright.errors import RecipeError
from bitwright.pipeline.run import Silent
from bitwright.pipeline.sensitivity import rows_of, shrinkage

ALLOCATE = {"bits": [1, 2, 3, 4], "rows": 24, "tokens": 128}
FEW = support.SMALL | {"allocate": ALLOCATE}


def manifest(artifact: Path) -> Any:
    return json.loads((artifact / "bitwright_manifest.json").read_text())


def specs(artifact: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((artifact / "config.json").read_text())["quantization_config"][
        "layers"
    ]
    return found


class Broken(Exception):
    pass


class BreakAt(Silent):
    """Raises at the n-th advance of the choice or of the blocks; counts both."""

    def __init__(self, choosing: int = 0, blocks: int = 0) -> None:
        self.limits = {"choosing": choosing, "blocks": blocks}
        self.calls = {"choosing": 0, "blocks": 0}
        self.chosen = 0.0

    def _called(self, what: str) -> None:
        self.calls[what] += 1
        if self.calls[what] == self.limits[what]:
            raise Broken

    def allocating(self, fraction: float) -> None:
        self.chosen += fraction
        self._called("choosing")

    def advance(self, fraction: float) -> None:
        self._called("blocks")


@pytest.mark.parametrize(
    ("model", "preset", "options"),
    [
        ("llama_biases", "bwa", {"weights.group": 32}),
        ("qwen3", "bitwright", {"allocate": ALLOCATE | {"groups": [32, 64]}}),
        ("mistral", "quarot", {"weights.bits": 3, "weights.group": 32}),
        ("qwen2", "rtn", {"allocate": ALLOCATE | {"target": 3.5}, "outer.embedding": 8, "outer.head": 8}),
    ],
)
def test_threads_do_not_show_and_the_budget_is_kept(
    model: str, preset: str, options: dict[str, Any], models: dict[str, Path], calibration: Text, tmp_path: Path
) -> None:
    recipe = bitwright.preset(preset).with_options(FEW | options)
    support.assert_threads_do_not_show(models[model], recipe, calibration, tmp_path)
    assert bitwright.verify(tmp_path / "1") == []
    plain = bitwright.plan(models[model], recipe)
    target = options.get("allocate", {}).get("target", plain.linear_bits)
    stored = support.read_tensors(tmp_path / "1")
    counted = ("codes", "levels", "scales", "zeros", "outliers", "outlier_scales", "permutation")
    linears = [name for name in stored if name.startswith("model.layers.") and name.rpartition(".")[2] in counted]
    assert sum(len(stored[name].raw) for name in linears) * 8 / plain.linear_weights <= target
    assert len({(s["bits"], s["group"], s["outliers"]) for s in specs(tmp_path / "1").values()}) > 1


def test_broken_off_while_choosing_and_behind_it(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    recipe = bitwright.preset("bitwright").with_options(FEW)
    out = tmp_path / "out"

    def run(reporter: BreakAt) -> Any:
        return bitwright.quantize(models["llama"], out, recipe, calibration, threads=1, reporter=reporter)

    whole = BreakAt()
    first = run(whole)
    assert whole.chosen == pytest.approx(1.0)
    expected = support.tree(out)
    log = [json.loads(line) for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    assert log == [*first.log, {"allocation": manifest(out)["allocation"]}]
    again = run(BreakAt())  # complete: nothing is chosen again
    assert again.plan.recipe.sites == first.plan.recipe.sites != {}
    # Two passes forward, then back: a step for what passes the block and one for each of its four sites.
    assert whole.calls["choosing"] == 2 + 2 * 5
    # Of the last block, of the first one, and when all is known but not written down.
    left = {1: 12, 7: 12, 8: 6, 12: 6}
    for choosing, blocks in (*((at, 0) for at in left), (0, 1), (0, whole.calls["blocks"] - 1)):
        shutil.rmtree(out)
        with pytest.raises(Broken):
            run(BreakAt(choosing, blocks))
        assert not out.exists()
        resumed = BreakAt()
        run(resumed)
        assert support.tree(out) == expected
        assert resumed.calls["choosing"] == left.get(choosing, 0)
        assert resumed.chosen == pytest.approx(1.0 if choosing else 0.0)


def test_what_was_chosen_can_be_asked_for(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    """The settled recipe, without `allocate`, gives the same weights."""
    recipe = bitwright.preset("bitwright").with_options(FEW)
    first = bitwright.quantize(models["llama"], tmp_path / "chosen", recipe, calibration)
    settled = first.plan.recipe
    assert settled.allocate is None
    assert bitwright.Recipe.from_dict(json.loads(settled.to_json())) == settled
    bitwright.quantize(models["llama"], tmp_path / "asked", settled, calibration)
    chosen, asked = (support.read_tensors(tmp_path / name) for name in ("chosen", "asked"))
    assert {name: entry.raw for name, entry in chosen.items()} == {name: entry.raw for name, entry in asked.items()}


def test_sites(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    """The longest pattern wins, all linears of a site go together, and `allocate` leaves alone what `sites` fixes."""
    sites = {"*.down_proj": {"bits": 3, "group": 64}, "*.0.*": {"outliers": 0}, "*.0.mlp.down_proj": {"bits": 4}}
    options = {"sites": {**sites, "*.v_proj": {"bits": 1}}, "allocate": ALLOCATE | {"target": 3.5}}
    recipe = bitwright.preset("bwa").with_options(support.SMALL | options)
    bitwright.quantize(models["llama"], tmp_path / "out", recipe, calibration)
    found = specs(tmp_path / "out")
    down = [found[f"model.layers.{block}.mlp.down_proj"] for block in (0, 1)]
    assert [(spec["bits"], spec["group"], spec["outliers"]) for spec in down] == [(4, 128, 16), (3, 64, 16)]
    for block in (0, 1):
        assert {found[f"model.layers.{block}.self_attn.{name}_proj"]["bits"] for name in "qkv"} == {1}
    assert found["model.layers.0.self_attn.o_proj"]["outliers"] == 0
    chosen = manifest(tmp_path / "out")["allocation"]["sites"].keys()
    assert (
        set()
        < chosen
        <= {
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.gate_proj",
        }
    )


def test_refusals(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wide = {"transform.hadamard": "group", "allocate": {"groups": [32, 0]}}
    for options, words in (
        ({"allocate": {"outliers": [100000]}}, r"self_attn.q_proj: outliers = 100000"),
        (wide, r"self_attn.q_proj: transform.hadamard = 'group' needs groups of inputs, found group = 0"),
        ({"allocate": {"target": 1.0}}, r"allocate.target = 1.0 is below the \d\.\d{4} bits a weight"),
        ({"sites": {"*.gait_proj": {"bits": 3}}}, r"'\*.gait_proj' fits none of the 14 linears .* like model.layers.0"),
    ):
        recipe = bitwright.preset("bwa").with_options(support.SMALL | options)
        with pytest.raises(RecipeError, match=words):
            bitwright.quantize(models["llama"], out, recipe, calibration)
        with pytest.raises(RecipeError, match=words):
            bitwright.plan(models["llama"], recipe)
        assert not out.exists()
        assert not out.with_name("out.run").exists()


def test_the_least_that_is_named_can_be_had(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    recipe = bitwright.preset("bwa").with_options(FEW)
    with pytest.raises(RecipeError) as refused:
        bitwright.plan(models["llama"], recipe.with_options({"allocate.target": 0.5}))
    least = re.search(r"below the (\d\.\d{4}) bits", str(refused.value))
    assert least
    asked = recipe.with_options({"allocate.target": float(least[1])})
    made = bitwright.quantize(models["llama"], tmp_path / "out", asked, calibration)
    assert made.plan.linear_bits == pytest.approx(float(least[1]), abs=1e-3)
    assert made.plan.weight_bits == "1"
    more = bitwright.plan(models["llama"], recipe.with_options({"allocate.target": 6.0}))
    assert more.bound == int(6.0 * more.linear_weights / 8)
    assert more.work_disk >= bitwright.plan(models["llama"], recipe).work_disk + more.bound - more.linear_bytes


def test_command_line(models: dict[str, Path], calibration_file: Path, tmp_path: Path) -> None:
    both = support.run_cli("plan", models["mistral"], "--target-bits", 3, "--set", "allocate=none")
    assert "leave out one of them" in both.message
    few = ["--sequences", 4, "--length", 64, "--set", "allocate.rows=16", "--target-bits", 3.25]
    told = support.run_cli("plan", models["mistral"], "--target-bits", 3.25)
    assert told.code == 0
    assert "at most 3.2500 bits a weight in all" in " ".join(told.out.replace("│", " ").split())
    done = support.run_cli("quantize", models["mistral"], tmp_path / "out", "--calib", calibration_file, *few, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["linear_bits"] <= 3.25
    shown = support.run_cli("report", tmp_path / "out", "--out", tmp_path / "page.html")
    assert shown.code == 0, shown.err


# --- what is felt -----------------------------------------------------------------------------------------------------


def divergence(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


def test_shrinkage() -> None:
    """Outputs that shrink and err beside it are told apart, and few rows tell nearly what all do."""
    random = torch.Generator().manual_seed(0)
    wanted = torch.randn(4000, 512, generator=random)
    noise = 0.05 * torch.randn(4000, 512, generator=random)
    share, rest = shrinkage(wanted, 0.9 * wanted)
    assert share == pytest.approx(0.1)
    assert rest == pytest.approx(0.0, abs=1e-6)
    found = 0.93 * wanted + noise
    exact = float((wanted - found).double().sum(dim=1).square().sum())
    for rows in (8, 64, 512):
        share, rest = shrinkage(wanted[:, :rows], found[:, :rows])
        assert share == pytest.approx(0.07, abs=0.003)
        common = float((share * wanted.double().sum(dim=1)).square().sum())
        assert common + rest * 512 / rows == pytest.approx(exact, rel=0.1)
    assert shrinkage(torch.zeros(3, 2), torch.ones(3, 2)) == (0.0, 6.0)


def test_rows_that_share_a_scale_are_measured_together() -> None:
    for rows, count in ((40, 12), (41, 12), (7, 100), (9, 1)):
        alone, pairs = rows_of(rows, count).tolist(), rows_of(rows, count, 2).tolist()
        assert len(alone) == min(count, rows)
        for found in (alone, pairs):
            assert found == sorted(set(found))
            assert set(found) <= set(range(rows))
        assert all(row ^ 1 in pairs for row in pairs if row ^ 1 < rows)
        assert min(count, rows) <= len(pairs) + (rows % 2) <= count + 2


def test_what_is_felt_is_what_a_site_costs(tmp_path: Path) -> None:
    """One site at a time is exchanged in the whole model: the divergence of its logits is what was predicted, within
    a factor of 2.5, and in nearly the same order."""
    options = {
        "activations": None,
        "kv": None,
        "weights.outliers": 0,
        "calibration.sequences": 16,
        "calibration.length": 256,
        "allocate": {"bits": [2], "outliers": [0], "tokens": 4096},
    }
    out, text = tmp_path / "out", text_of("calibration", calibration_text())
    bitwright.quantize(demo.MODEL, out, bitwright.preset("bwa").with_options(options), text)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    tokens = tokenize(load_tokenizer(demo.MODEL), text, model.config.vocab_size)
    ids = random_windows(tokens, 16, 256, 0, text)[8:]  # the half that errors are measured on
    matrices = simulation.stored_matrices(out)
    with torch.inference_mode():
        wanted = model(ids).logits.log_softmax(dim=-1)
        predicted, measured = [], []
        for leader, losses in manifest(out)["allocation"]["losses"].items():
            other = copy.deepcopy(model)
            for name in (name for name, spec in specs(out).items() if spec["permutation"] == leader):
                other.get_submodule(name).weight = nn.Parameter(matrices[name].dequantize())
            predicted.append(losses[0])
            measured.append(divergence(wanted, other(ids).logits.log_softmax(dim=-1)))
    ratios = [a / b for a, b in zip(predicted, measured, strict=True)]
    print(ratios)
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios
    ranks = torch.tensor([predicted, measured]).argsort(dim=1).argsort(dim=1).float()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8
