"""The script that trains reference models: it learns, survives a kill, and writes a model that bitwright measures."""

from __future__ import annotations

import json
import lzma
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import support
from bitwright.demo.corpus import evaluation_text, training_text

BENCH = Path(__file__).resolve().parents[1] / "bench" / "reference"
if not BENCH.is_dir():
    pytest.skip("a source distribution has no bench/", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import curve  # noqa: E402 - a script's folder, not a package
import figures  # noqa: E402
import train  # noqa: E402
from data import Windows  # noqa: E402
from loss import summed_cross_entropy  # noqa: E402
from replicas import Replicas  # noqa: E402
from speed import flops_per_token, peak_flops  # noqa: E402

STEPS, CONTEXT, BATCH = 40, 64, 4


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    with lzma.open(folder / "train.txt.xz", "wt", encoding="utf-8") as stream:
        stream.write(training_text()[:200_000].replace("\n\n\n", "\n<|endoftext|>\n"))
    (folder / "held-out.txt").write_text(evaluation_text()[:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(text_dir: Path) -> Path:
    path = text_dir / "recipe.json"
    content = {
        "name": "tiny",
        "architecture": "Qwen2ForCausalLM",
        "config": {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        "context": CONTEXT,
        "short_windows": {"length": 16, "share": 0.5},
        "tokenizer": {"vocab_size": 400, "sample_bytes": 50_000},
        "sources": [
            {"name": "train.txt.xz", "weight": 0.8},
            {"name": "pydoc-topics", "weight": 0.2, "max_bytes": 90_000},
        ],
        "evaluation": [{"name": "held-out.txt"}],
        "evaluate_every": 15,
        "tokens": STEPS * CONTEXT * BATCH,
        "batch_windows": BATCH,
        "peak_lr": 0.01,
        "final_lr_fraction": 0.1,
        "warmup_steps": 5,
        "seed": 7,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def argv(recipe: Path, text_dir: Path, work: Path, *more: str) -> list[str]:
    options = ["--text-dir", text_dir, "--work", work, "--log-every", "1", "--device", "cpu", "--replicas", "2", *more]
    return [str(word) for word in [recipe, *options]]


@pytest.fixture(scope="module")
def trained(recipe: Path, text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert train.main(argv(recipe, text_dir, folder / "work", "--out", str(folder / "model"))) == 0
    return folder


def losses(work: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in curve.read(work / "curve.jsonl") if "loss" in record}


def test_training_learns_and_draws_its_curve(trained: Path) -> None:
    found = losses(trained / "work")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert sum(found[step] for step in range(STEPS - 9, STEPS + 1)) / 10 < found[1] - 0.9
    held_out = [
        r["bits_per_byte"]["held-out.txt"] for r in curve.read(trained / "work" / "curve.jsonl") if "lr" not in r
    ]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    assert (trained / "work" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_goes_on_to_the_same_losses_and_weights(
    trained: Path, recipe: Path, text_dir: Path, tmp_path: Path
) -> None:
    words = argv(recipe, text_dir, tmp_path / "work", "--out", str(tmp_path / "model"), "--save-minutes", "0")
    child = subprocess.Popen([sys.executable, BENCH / "train.py", *words], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(losses(tmp_path / "work")) < 12 and time.monotonic() < until:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "model").exists()
    before = len(losses(tmp_path / "work"))
    assert 12 <= before < STEPS
    assert train.main(words) == 0
    assert losses(tmp_path / "work") == pytest.approx(losses(trained / "work"), abs=1e-3)
    expected = load_file(trained / "model" / "model.safetensors")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-3, rtol=1e-2)


def test_the_written_model_is_measured_and_its_card_says_so(trained: Path, text_dir: Path) -> None:
    model, text = trained / "model", text_dir / "held-out.txt"
    assert figures.main([str(model), "--text", str(text)]) == 0
    row = json.loads((model / "figures.json").read_text())[0]
    assert row["perplexity"] == pytest.approx(row["plain_loop"], rel=1e-3)
    printed = support.run_cli("eval", model, "--text", text, "--json")
    assert json.loads(printed.out)["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)
    card = (model / "README.md").read_text()
    assert (
        f"{STEPS * CONTEXT * BATCH:,} tokens seen in windows of 16 for the first {STEPS * CONTEXT * BATCH // 2:,} and"
        in card
    )
    assert f"{row['perplexity']:.4f}" in card
    first = card
    assert figures.main([str(model), "--text", str(text)]) == 0
    assert (model / "README.md").read_text() == first, "measuring twice leaves one section"


def test_a_long_text_meets_the_plain_loop_on_its_first_windows(
    trained: Path, text_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = trained / "model", text_dir / "held-out.txt"
    assert figures.main([str(model), "--text", str(text)]) == 0
    whole = json.loads((model / "figures.json").read_text())[0]
    monkeypatch.setattr(figures, "PLAIN_WINDOWS", 2)
    assert whole["windows"] > 2
    assert figures.main([str(model), "--text", str(text)]) == 0
    row = json.loads((model / "figures.json").read_text())[0]
    assert (row["perplexity"], row["windows"], row["plain_windows"]) == (whole["perplexity"], whole["windows"], 2)
    assert row["same"] == pytest.approx(row["plain_loop"], rel=1e-3)
    assert row["same"] != row["perplexity"]
    assert f"({row['same']:.4f} by `eval`, first 2 windows)" in (model / "README.md").read_text()
    # Or no more than so many windows are measured at all, and the card says so.
    assert figures.main([str(model), "--text", str(text), "--windows", "2"]) == 0
    cut = json.loads((model / "figures.json").read_text())[0]
    assert (cut["perplexity"], cut["windows"]) == (row["same"], 2)
    assert f"| `held-out.txt`, first 2 windows | {row['same']:.4f} |" in (model / "README.md").read_text()


def test_shards_stay_small_and_replace_those_of_another_export(
    trained: Path, recipe: Path, text_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = argv(recipe, text_dir, trained / "work", "--out", str(tmp_path / "model"), "--export-only")
    assert train.main(words) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    monkeypatch.setattr(train.export, "SHARD_BYTES", 40_000)
    assert train.main(words) == 0
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert max(path.stat().st_size for path in shards) < 45_000
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_a_finished_run_is_taken_on_to_more_tokens(
    trained: Path, recipe: Path, text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "work", tmp_path / "work")
    longer = STEPS + 10
    words = argv(recipe, text_dir, tmp_path / "work", "--tokens", str(longer * CONTEXT * BATCH))
    assert train.main([*words, "--out", str(tmp_path / "model")]) == 0
    assert "is taken on to" in capsys.readouterr().out
    found, before = losses(tmp_path / "work"), losses(trained / "work")
    assert {step: found[step] for step in before} == before
    assert sorted(found) == list(range(1, longer + 1))
    last = [record for record in curve.read(tmp_path / "work" / "curve.jsonl") if "lr" in record][-1]
    assert last["lr"] == pytest.approx(0.01 * 0.1)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{longer * CONTEXT * BATCH:,} tokens seen" in card
    assert f"--tokens {longer * CONTEXT * BATCH} " in card
    assert f"windows of 16 for the first {STEPS * CONTEXT * BATCH // 2:,} and" in card, "not once more"


def test_bad_calls_are_one_line(
    trained: Path, recipe: Path, text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[list[str], str]] = [
        (argv(recipe, text_dir, tmp_path / "w3", "--set", "context=long"), "'long' is not a whole number"),
        (argv(recipe, text_dir, tmp_path / "w3", "--set", "tokenizer=3"), "its numbers are context, evaluate_every"),
        (argv(recipe, text_dir, trained / "work", "--set", "seed=8"), "another recipe"),
        (argv(recipe, text_dir, trained / "work", "--tokens", str(CONTEXT * BATCH)), "another recipe"),
        (argv(tmp_path / "none.json", text_dir, tmp_path), "no recipe"),
        (argv(recipe, tmp_path, tmp_path / "w"), "no file train.txt.xz"),
        (argv(recipe, text_dir, tmp_path / "w2", "--export-only", "--out", str(tmp_path / "m")), "no checkpoint"),
    ]
    for words, expected in cases:
        assert train.main(words) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert figures.main([str(tmp_path), "--text", str(tmp_path / "no.txt")]) == 2


def test_the_pieced_loss_is_cross_entropy_with_its_gradients() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1200, 24, requires_grad=True)
    head = torch.randn(90, 24, requires_grad=True)
    labels = torch.randint(0, 90, (1200,))
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), labels, reduction="sum")
    wanted = torch.autograd.grad(expected / 7, (hidden, head))
    found = summed_cross_entropy(hidden, head, labels)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for got, want in zip(torch.autograd.grad(found / 7, (hidden, head)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert float(summed_cross_entropy(hidden, head, labels)) == float(found)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_replicas_sum_the_gradients_of_all_parts(count: int) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    parts = [torch.randn(3, 5) for _ in range(5)]
    expected = sum(model(part).square().sum() for part in parts)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    replicas = Replicas(model, count)
    found = replicas.accumulate(parts, lambda net, part: net(part).square().sum())
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        model[0].weight.zero_()
    assert all(bool((replica[0].weight == 0).all()) for replica in replicas.models), "weights are shared"


def test_every_window_comes_once_an_epoch() -> None:
    import numpy as np

    tokens = np.arange(1000, dtype=np.uint16)
    windows = Windows([tokens], [1.0], 2 * ((1000 - 10 - 1) // 10), 10, seed=0)
    one = windows.batch(0, windows.epoch_windows[0])
    assert len({int(row[0]) for row in one}) == windows.epoch_windows[0]
    assert all((np.diff(row) == 1).all() for row in one)


def test_operations_a_token_by_hand() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = train.LlamaForCausalLM(train.LlamaConfig(vocab_size=50, **sizes, **heads))
    weights = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 50 * 16
    attention = 2 * (2 * 2 * 16 * 32)  # scores and mixing, 32 past tokens of a window of 64 on average
    assert flops_per_token(model, 64) == 3 * (2 * weights + attention)
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32, 0.1) < 1e14
