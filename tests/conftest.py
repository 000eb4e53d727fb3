"""Fixtures of the behaviour tests: real models of real architectures, small and of awkward sizes, made here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run beside each other: threads that wait must not keep a core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

import bitwright
import support
from bitwright.calibration import Text, read_text
from refusals import Ground

logging.disable_progress_bar()

MODELS = ("llama", "mistral", "qwen2", "llama_sharded", "llama_biases")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Matrices here are too small to share out; bitwright's own threads are what the tests vary."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories by the names in MODELS, qwen3 and odd. Do not write to them."""
    root = tmp_path_factory.mktemp("models")
    common: dict[str, Any] = {
        "vocab_size": 300,
        "max_position_embeddings": support.CONTEXT,
        "num_hidden_layers": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    llama: dict[str, Any] = common | {
        "hidden_size": 72,
        "intermediate_size": 140,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    save = support.save_model
    return {
        # Grouped-query attention, tied embeddings, no size a multiple of 128 (nor of 16).
        "llama": save(
            root / "llama",
            LlamaConfig(**llama, tie_word_embeddings=True),
            torch.float32,
            1,
            bos=True,
            chat_template=support.CHAT_TEMPLATE,
        ),
        "mistral": save(
            root / "mistral",
            MistralConfig(
                **common
                | {
                    "hidden_size": 96,
                    "intermediate_size": 200,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 20,
                    "sliding_window": 24,
                },
                tie_word_embeddings=False,
            ),
            torch.bfloat16,
            2,
        ),
        "qwen2": save(
            root / "qwen2",
            Qwen2Config(
                **common
                | {
                    "hidden_size": 56,
                    "intermediate_size": 300,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 1,
                },
                tie_word_embeddings=True,
            ),
            torch.float16,
            3,
        ),
        "llama_sharded": save(
            root / "llama_sharded",
            LlamaConfig(**llama | {"num_hidden_layers": 3}, tie_word_embeddings=False),
            torch.bfloat16,
            4,
            max_shard_size="100KB",
        ),
        # Norms of queries and keys by head.
        "qwen3": save(
            root / "qwen3",
            Qwen3Config(
                **common
                | {
                    "hidden_size": 64,
                    "intermediate_size": 136,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 24,
                },
                tie_word_embeddings=True,
            ),
            torch.float32,
            6,
        ),
        # Sizes without a Hadamard matrix.
        "odd": save(
            root / "odd",
            Qwen3Config(
                **common
                | {
                    "hidden_size": 92,
                    "intermediate_size": 184,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 24,
                },
                tie_word_embeddings=True,
            ),
            torch.bfloat16,
            9,
        ),
        "llama_biases": save(
            root / "llama_biases",
            LlamaConfig(**llama, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
            torch.float32,
            5,
        ),
    }


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(support.words(4000, 11))
    return path


@pytest.fixture(scope="session")
def evaluation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "evaluation.txt"
    path.write_text(support.words(2500, 12))
    return path


@pytest.fixture(scope="session")
def calibration(calibration_file: Path) -> Text:
    return read_text([calibration_file])


@pytest.fixture(scope="session")
def artifact(
    models: dict[str, Path], calibration: Text, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """artifact(model, preset, options) -> its directory, quantized once a session. Do not write to it."""
    root = tmp_path_factory.mktemp("artifacts")
    made: dict[str, Path] = {}

    def make(model: str = "llama", preset: str = "bwa", options: dict[str, Any] | None = None) -> Path:
        recipe = bitwright.preset(preset).with_options(support.SMALL | (options or {}))
        key = f"{model}-{preset}-{hashlib.sha256(recipe.to_json().encode()).hexdigest()[:8]}"
        if key not in made:
            bitwright.quantize(models[model], root / key, recipe, calibration, threads=2)
            made[key] = root / key
        return made[key]

    return make


@pytest.fixture
def artifact_copy(artifact: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the default artifact that a test may damage."""
    import shutil

    return Path(shutil.copytree(artifact(), tmp_path / "copy"))


@pytest.fixture
def model_copy(models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """model_copy(name) -> a copy of a model that a test may damage."""
    import shutil

    def copy(name: str = "llama") -> Path:
        return Path(shutil.copytree(models[name], tmp_path / f"model-{name}"))

    return copy


@pytest.fixture
def ground(tmp_path: Path, models: dict[str, Path], artifact: Callable[..., Path], calibration_file: Path) -> Ground:
    return Ground(tmp_path, models, artifact, calibration_file)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data; a test that asks for it is skipped where there is none."""
    if not (support.SHARED / "data" / "models" / "stories260K").is_dir():
        pytest.skip(f"no shared data in {support.SHARED} (set BITWRIGHT_SHARED)")
    return support.SHARED / "data"
