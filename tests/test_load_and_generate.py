"""An artifact in the hands of transformers: load, generate, save again, cast, dequantize, and the quantized cache."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import bitwright
import simulation
import support
from bitwright import native
from bitwright.calibration import read_text
from bitwright.errors import ArtifactError
from bitwright.runtime import QuantizedKVCache, QuantizedLinear, quantized_linears
from conftest import MODELS

PROMPTS = ["Renta mi.", "Ba ren tol mi sha kur velon pi da."]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("preset", ["bwa", "rtn"])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, preset: str, models: dict[str, Path], artifact: Callable[..., Path]) -> None:
    directory = artifact(name, preset)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    # Every linear of every block is packed, none is left as nn.Linear but the head.
    packed = {found for found, _ in quantized_linears(model)}
    plain = {found for found, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert packed == set(simulation.stored_matrices(directory))
    assert plain == {"lm_head"}

    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    assert batch["attention_mask"].min() == 0, "the batch must be padded to be a test"
    for extra in (
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
    ):
        torch.manual_seed(0)
        made = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **extra)
        assert made.shape == (2, batch["input_ids"].shape[1] + 6)
        assert int(made.max()) < 300
        assert isinstance(tokenizer.decode(made[1]), str)


def test_padding_changes_no_answer(artifact: Callable[..., Path]) -> None:
    """A prompt alone and the same prompt beside a longer one, padded on the left: the same greedy text."""
    directory = artifact("llama")
    model = bitwright.load(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    alone = tokenizer(PROMPTS[0], return_tensors="pt")
    both = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=5, min_new_tokens=5
    )
    one = model.generate(
        input_ids=alone["input_ids"], attention_mask=alone["attention_mask"], max_new_tokens=5, min_new_tokens=5
    )
    assert both[0, -5:].tolist() == one[0, -5:].tolist()


@pytest.mark.parametrize("name", ["llama", "mistral", "llama_biases"])
def test_save_and_reload(name: str, artifact: Callable[..., Path], tmp_path: Path) -> None:
    """save_pretrained keeps every stored byte, so the logits are the same to the last bit."""
    model = bitwright.load(artifact(name))
    model.save_pretrained(tmp_path / "again")
    again = bitwright.load(tmp_path / "again")
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(model, ids), logits(again, ids))
    before, after = support.read_tensors(artifact(name)), support.read_tensors(tmp_path / "again")
    for layer in simulation.stored_matrices(artifact(name)):
        own = {key for key in before if key.startswith(f"{layer}.") and not key.endswith((".weight", ".bias"))}
        assert own
        for key in own:
            assert (after[key].dtype, after[key].raw) == (before[key].dtype, before[key].raw), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["to", "from_pretrained"])
def test_casting_keeps_what_is_stored(how: str, dtype: torch.dtype, artifact: Callable[..., Path]) -> None:
    """A model cast to 16 bits, or loaded in them, keeps its fp16 scales and all integers bit for bit."""
    directory = artifact("llama_biases")
    if how == "to":
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    stored = support.read_tensors(directory)
    for name, module in quantized_linears(model):
        assert module.stored()["scales"].dtype == torch.float16
        assert module.stored()["outlier_scales"].dtype == torch.float16
        for part, tensor in module.state_dict().items():
            if part not in ("bias", "weight"):
                assert torch.equal(tensor, simulation.as_tensor(stored[f"{name}.{part}"])), f"{name}.{part}"
        assert module.weight.dtype == dtype
        assert module.bias.dtype == dtype
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    output = model(ids, use_cache=False).logits
    assert output.dtype == dtype
    assert bool(torch.isfinite(output).all())
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 27)


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama_biases"])
def test_dequantize(name: str, models: dict[str, Path], artifact: Callable[..., Path], tmp_path: Path) -> None:
    """model.dequantize() gives plain linears with the simulated weights, which need no bitwright any more."""
    directory = artifact(name)
    packed = bitwright.load(directory)
    plain = packed.dequantize()
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    simulated, _ = simulation.simulate(models[name], directory, order="model")
    for layer in simulation.stored_matrices(directory):
        assert torch.equal(plain.get_submodule(layer).weight, simulated.get_submodule(layer).weight)
    for module in simulated.modules():
        module._forward_pre_hooks.clear()
    ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(2))
    assert simulation.relative_difference(logits(plain, ids), logits(simulated, ids)) <= 1e-6
    made = plain.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert not isinstance(made.past_key_values, QuantizedKVCache)
    plain.save_pretrained(tmp_path / "plain")
    again = bitwright.load(tmp_path / "plain")
    assert torch.equal(logits(again, ids), logits(plain, ids))


# --- the quantized cache --------------------------------------------------------------------------------------------


def caches_of(model: Any, **extra: Any) -> Any:
    """The cache that a call of `generate` leaves behind."""
    ids = torch.arange(2, 12).unsqueeze(0)
    made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, **extra)
    return made.past_key_values


def test_generate_uses_the_quantized_cache(artifact: Callable[..., Path]) -> None:
    cache = caches_of(bitwright.load(artifact("llama")))
    assert isinstance(cache, QuantizedKVCache)
    # 13 tokens in 2 layers, keys and values of 2 heads of 12 channels: 6 bytes of codes, a scale and a minimum.
    assert cache.get_seq_length() == 13
    assert cache.stored_bytes() == 13 * 2 * 2 * 2 * (12 // 2 + 4)


def test_cache_bits_follow_the_recipe(artifact: Callable[..., Path]) -> None:
    cache = caches_of(bitwright.load(artifact("llama", "bwa", {"kv.bits": 8})))
    assert isinstance(cache, QuantizedKVCache)
    assert cache.stored_bytes() == 13 * 2 * 2 * 2 * (12 + 4)


def test_the_caller_wins(artifact: Callable[..., Path]) -> None:
    model = bitwright.load(artifact("llama"))
    own = DynamicCache(config=model.config)
    assert caches_of(model, past_key_values=own) is own
    assert caches_of(model, use_cache=False) is None
    static = caches_of(model, cache_implementation="static")
    assert static is not None
    assert not isinstance(static, QuantizedKVCache)
    # And afterwards the default is the recipe's again, each call with a cache of its own.
    first, second = caches_of(model), caches_of(model)
    assert isinstance(first, QuantizedKVCache)
    assert isinstance(second, QuantizedKVCache)
    assert first is not second


def test_no_quantized_cache_without_kv(artifact: Callable[..., Path]) -> None:
    cache = caches_of(bitwright.load(artifact("llama", "bwa", {"kv": None})))
    assert isinstance(cache, DynamicCache)
    assert not isinstance(cache, QuantizedKVCache)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_step_by_step_equals_one_pass(name: str, artifact: Callable[..., Path]) -> None:
    """Tokens fed one by one through the cache give the logits of one pass through it, beyond a sliding window too."""
    model = bitwright.load(artifact(name))
    recipe = bitwright.preset("bwa")
    ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = model(ids, past_key_values=QuantizedKVCache(2, recipe.kv), use_cache=True).logits[0]
        cache = QuantizedKVCache(2, recipe.kv)
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, 0] for i in range(60)]
    # A 4-bit code may flip where the last digit of a sum differs; most tokens agree far better than this.
    assert simulation.relative_difference(torch.stack(steps), whole) <= 0.05
    agree = (torch.stack(steps) - whole).norm(dim=-1) / whole.norm(dim=-1) < 1e-4
    assert float(agree.float().mean()) > 0.5


def test_the_cache_is_part_of_the_measurement(
    artifact: Callable[..., Path], evaluation_file: Path, calibration_file: Path
) -> None:
    """The same packed weights with and without the cache quantizer: another perplexity, and the protocol says which."""
    text = read_text([evaluation_file])
    tokenizer = AutoTokenizer.from_pretrained(artifact("llama"))
    found = {}
    from bitwright.evaluation import evaluate_model

    for kv in (4, 8, None):
        model = bitwright.load(artifact("llama"))
        model.config.quantization_config.recipe["kv"] = kv and {"bits": kv}
        found[kv] = evaluate_model(model, tokenizer, text, limit=6)
        assert (f"KV cache {kv}-bit" if kv else "KV cache 16-bit") in found[kv].protocol
    assert len({round(result.loss, 9) for result in found.values()}) == 3
    assert abs(found[8].loss - found[None].loss) < abs(found[4].loss - found[None].loss)


# --- with and without `import bitwright` ----------------------------------------------------------------------------


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_the_import_loading_fails(artifact: Callable[..., Path]) -> None:
    ran = python(
        """
        import sys
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print("loaded a", type(model).__name__)
        """,
        artifact("llama"),
    )
    assert ran.returncode != 0
    assert "loaded" not in ran.stdout
    assert "mismatch" in ran.stderr


def test_with_the_import_loading_works(artifact: Callable[..., Path]) -> None:
    """In a fresh process, in either order of the imports."""
    ran = python(
        """
        import sys
        from transformers import AutoModelForCausalLM
        import bitwright
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(sum(type(module).__name__ == "QuantizedLinear" for module in model.modules()))
        """,
        artifact("llama"),
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "14"), ran.stderr


@pytest.mark.parametrize("options", [{}, {"outer.embedding": 8, "outer.head": 8}], ids=["plain", "outer"])
def test_without_its_head_it_is_refused_by_that(options: dict[str, Any], artifact: Callable[..., Path]) -> None:
    """AutoModel has other names for the blocks: that is said, and not that the artifact is of another model."""
    with pytest.raises(ArtifactError, match=r"LlamaModel has none; load it with AutoModelForCausalLM") as refused:
        AutoModel.from_pretrained(artifact("llama", "bwa", options))
    assert "another model" not in str(refused.value)


def test_import_is_light() -> None:
    ran = python(
        """
        import sys, time
        began = time.perf_counter()
        import bitwright
        seconds = time.perf_counter() - began
        heavy = [name for name in ("torch", "transformers", "numpy", "pydantic", "rich") if name in sys.modules]
        print(seconds, heavy)
        assert bitwright.__version__
        assert "bitwright.recipe" not in sys.modules
        assert bitwright.preset("bwa").name == "bwa"
        assert "torch" not in sys.modules
        try:
            bitwright.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        else:
            raise SystemExit("bitwright.nothing exists")
        """
    )
    assert ran.returncode == 0, ran.stderr
    seconds, heavy = ran.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 2.0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files on this system")
@pytest.mark.skipif(native.find() is None, reason="built without native kernels: codes stay as they were loaded")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_repacked_blocks_let_go_of_their_files(name: str, artifact: Callable[..., Path]) -> None:
    """A mapped file would count a second time in resident memory: packed weights are copies."""
    directory = artifact(name, "bwa")
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert str(directory.resolve()) not in Path("/proc/self/maps").read_text()
    assert all(linear.packed is not None for _, linear in quantized_linears(model))
