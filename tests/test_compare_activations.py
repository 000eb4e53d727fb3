"""`bitwright compare`'s activations "as quantized": what an artifact's quantizers get, against matrices written out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bitwright
import simulation
import support
from bitwright.calibration import Text, load_tokenizer, random_windows, tokenize
from bitwright.integrations.transformers import quantized_cache, recipe_of
from bitwright.transforms.hadamard import RandomHadamard

WITHOUT = '{"*layers.0.*": {"outliers": 0}, "*layers.1.mlp.*": {"outliers": 8}}'
METHODS = {
    "atom": "atom:weights.outliers=16",
    "quarot": "quarot:weights.group=32,transform.expansion=power",
    "group": f"bitwright:allocate=none,weights.group=64,weights.outliers=16,sites={WITHOUT}",
    "in place": "bwa:weights.outliers=0,weights.order=none",
    "16 bits": "bwa:activations=none",
}
WIDTH, WIDE = 96, 128  # of mistral, and expanded to a power of two


@pytest.fixture(scope="module")
def out(
    models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A comparison whose artifacts are kept. Do not write to it."""
    root = tmp_path_factory.mktemp("activations")
    outcome = support.run_cli(
        *("compare", models["mistral"], "--calib", calibration_file, "--text", evaluation_file, "--out", root / "out"),
        *("--methods", ",".join(METHODS.values()), "--keep-artifacts", "--threads", "1"),
        *("--sequences", "2", "--length", "48", "--window", "48", "--windows", "1"),
    )
    assert outcome.code == 0, outcome.err
    return root / "out"


@pytest.fixture(scope="module")
def rows(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())["methods"]
    assert [row["method"] for row in found] == list(METHODS.values())
    return dict(zip(METHODS, found, strict=True))


@pytest.fixture(scope="module")
def inputs(calibration: Text) -> Callable[..., dict[str, Tensor]]:
    """inputs(directory) -> what the linears get from the model around them, fp64 [tokens, columns], by full name."""

    def capture(directory: Path) -> dict[str, Tensor]:
        model = bitwright.load(directory)
        found: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(
                    lambda _, args, name=name: found.setdefault(name, []).append(args[0][0].double())
                )
        recipe = recipe_of(model)
        tokens = tokenize(load_tokenizer(directory), calibration, 300)
        with torch.inference_mode():
            for ids in random_windows(tokens, 8, support.CONTEXT, 0, calibration):
                cache = quantized_cache(model, recipe) if recipe else None
                model(input_ids=ids[None], past_key_values=cache, use_cache=cache is not None)
        return {name: torch.cat(parts) for name, parts in found.items()}

    return capture


def sylvester(size: int) -> Tensor:
    """H / sqrt(size), fp64, of a power of two."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), made)
    return made / math.sqrt(size)


def by_groups(channels: int, group: int) -> list[Tensor]:
    """A Hadamard matrix for each group, and for what is left of the last one by falling powers of two."""
    sizes = []
    while channels:
        sizes.append(min(group, 1 << (channels.bit_length() - 1)))
        channels -= sizes[-1]
    return [sylvester(size) for size in sizes]


def dense(artifact: Path, leader: str, spec: dict[str, Any]) -> Tensor:
    """[columns, columns] by which an input is multiplied before it is quantized: order, then Hadamard."""
    columns = spec["columns"]
    made = torch.eye(columns, dtype=torch.float64)
    if spec["permutation"] is not None:
        made = made[:, simulation.as_tensor(support.read_tensors(artifact)[f"{leader}.permutation"]).long()]
    if spec.get("hadamard") and spec["stride"] == 1:
        blocks = by_groups(columns - spec["outliers"], spec["hadamard"])
        made = made @ torch.block_diag(*blocks, torch.eye(spec["outliers"], dtype=torch.float64))
    elif spec.get("hadamard"):
        assert spec["hadamard"] * spec["stride"] == columns
        made = made @ torch.kron(sylvester(spec["hadamard"]), torch.eye(spec["stride"], dtype=torch.float64))
    return made


def drawn(x: Tensor) -> list[float]:
    """The largest |x| of each of at most 96 runs of channels."""
    largest = x.abs().amax(dim=0).numpy()
    return [float(part.max()) for part in np.array_split(largest, min(96, len(largest)))]


LEADERS = {"attn_in": "self_attn.q_proj", "attn_out": "self_attn.o_proj", "mlp_in": "mlp.gate_proj",
           "mlp_out": "mlp.down_proj"}  # fmt: skip


@pytest.mark.parametrize("method", ["atom", "quarot", "group"])
def test_as_quantized_is_what_the_quantizer_gets(method: str, rows: Any, out: Path, inputs: Any) -> None:
    artifact = out / "artifacts" / rows[method]["key"]
    layers = json.loads((artifact / "config.json").read_text())["quantization_config"]["layers"]
    seen, after = inputs(artifact), rows[method]["after"]
    assert sorted(after) == sorted(f"{block}/{site}" for block in (0, 1) for site in LEADERS)
    for key, entry in after.items():
        block, _, site = key.partition("/")
        leader = f"model.layers.{block}.{LEADERS[site]}"
        spec = layers[leader]
        expected = drawn(seen[leader] @ dense(artifact, leader, spec))
        np.testing.assert_allclose(entry["curve"], expected, rtol=2e-3, err_msg=key)
        assert entry["normal"] == 1 - spec["outliers"] / spec["columns"]
        if method != "quarot":  # the twin tells a transform from none
            assert not np.allclose(entry["curve"], drawn(seen[leader]), rtol=0.05)


def test_a_rotated_and_expanded_stream_is_seen_as_it_is(
    rows: Any, models: dict[str, Path], inputs: Any, out: Path
) -> None:
    """Nothing is quantized before the first site: its inputs are the original's, without gamma, with zeros, times Q."""
    gamma = simulation.as_tensor(support.read_tensors(models["mistral"])["model.layers.0.input_layernorm.weight"])
    normed = inputs(models["mistral"])["model.layers.0.self_attn.q_proj"] / gamma.double()
    wide = torch.nn.functional.pad(normed, (0, WIDE - WIDTH)) / math.sqrt(WIDTH / WIDE)
    signs = RandomHadamard(WIDE, WIDE, 0).signs(torch.ones(1, dtype=torch.float64))
    expected = drawn(wide @ (torch.diag(signs) @ sylvester(WIDE)))
    curve = rows["quarot"]["after"]["0/attn_in"]["curve"]
    # Embeddings are stored in bfloat16, after the rotation.
    np.testing.assert_allclose(curve, expected, rtol=0.02)
    assert max(curve) < max(drawn(normed))


def test_methods_that_change_no_input_have_no_figure(rows: Any, out: Path) -> None:
    assert rows["in place"]["after"] == rows["16 bits"]["after"] == {}
    page = (out / "report.html").read_text()
    assert re.findall(r"As quantized by methods? ([\d, ]+)\.", page) == ["1"] * 4 + ["2"] * 4 + ["3"] * 4


def test_each_blocks_own_int8_channels_are_marked(rows: Any, out: Path) -> None:
    page = (out / "report.html").read_text()
    for way, method in enumerate(("atom", "quarot", "group")):
        for site in LEADERS:
            entries = {block: rows[method]["after"][f"{block}/{site}"]["normal"] for block in (0, 1)}
            svg = re.search(rf'<g id="activations{way}{site}-figure_1".*?</svg>', page, re.DOTALL)
            assert svg
            bars = re.findall(r'id="activations\w+-int8-(\d)">\s*<path d="M ([\d.]+) [\d.]+ ([^"]*)"', svg[0])
            widths = {
                int(block): max(map(float, re.findall(r"L ([\d.]+)", rest))) - float(x) for block, x, rest in bars
            }
            shares = {block: 1 - normal for block, normal in entries.items() if normal < 1}
            assert widths.keys() == shares.keys()
            if len(shares) == 2:
                assert widths[0] / widths[1] == pytest.approx(shares[0] / shares[1], rel=0.01)
    normals = {key: entry["normal"] for key, entry in rows["group"]["after"].items()}
    assert normals["0/attn_in"] == 1 > normals["1/attn_in"]


def test_what_is_measured_once_is_kept(out: Path, rows: Any) -> None:
    for row in rows.values():
        assert json.loads((out / "methods" / f"{row['key']}.json").read_text())["after"] == row["after"]
