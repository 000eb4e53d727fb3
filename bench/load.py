"""How fast an artifact loads, and what it holds in memory.

    python bench/load.py DIR [--shape llama-2-7b] [--layers 32] [--balance none] [--runs 3]

Makes a random artifact of that shape in DIR, unless there is one, and verifies it. Then fresh processes load it with
`from_pretrained`, from files that the system's cache holds by then: seconds for reading the files alone, for the
import of the libraries, and for loading, of which the checks and the repacking are told apart; resident memory after
each step. Prints one line of JSON for each process, then the medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def make(directory: str, shape: str, layers: int | None, balance: str) -> None:
    """An artifact of random codes, levels, scales and permutations, as `bitwright quantize` would lay it out."""
    import torch
    import transformers
    from torch import nn

    from bitwright import preset
    from bitwright.artifact.layout import FORMAT_VERSION, QUANT_METHOD, LayerSpec, layer_shapes, shard_name
    from bitwright.artifact.manifest import write_index, write_manifest
    from bitwright.artifact.shards import write_shard, write_text
    from bitwright.evaluation.shapes import CONTEXT, SHAPES
    from bitwright.recipe import outlier_count

    output = Path(directory)
    output.mkdir(parents=True)
    recipe = preset("bwa").with_options({"activations.balance": balance})
    name, fields = SHAPES[shape]
    config = getattr(transformers, name)(**fields, max_position_embeddings=CONTEXT, dtype="bfloat16")
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.architectures = [name.replace("Config", "ForCausalLM")]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)

    specs: dict[str, LayerSpec] = {}
    leader = ""
    for path, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            if not path.endswith(("k_proj", "v_proj", "up_proj")):  # these share the inputs of the one before
                leader = path
            outliers = outlier_count(module.in_features, recipe.weights.outliers)
            sizes = (module.out_features, module.in_features, 2, recipe.weights.group)
            specs[path] = LayerSpec(*sizes, "free", outliers, module.bias is not None, leader)

    def values(tensor: str, dtype: torch.dtype, size: tuple[int, ...]) -> torch.Tensor:
        part = tensor.rsplit(".", 1)[1]
        if part == "codes":
            planes = torch.empty(size, dtype=dtype).random_(256)
            used = specs[tensor[: -len(".codes")]]
            if spare := -(used.columns - used.outliers) % 8:
                planes[..., -1] &= 255 >> spare
            return planes
        if part == "permutation":
            return torch.randperm(size[0]).to(dtype)
        if dtype == torch.int8:
            return torch.randint(-127, 128, size, dtype=dtype)
        if dtype == torch.float16:
            return torch.full(size, 1e-4, dtype=dtype)
        return torch.ones(size, dtype=dtype) if len(size) == 1 else torch.empty(size, dtype=dtype).normal_(0, 0.02)

    kept = {
        path: tuple(tensor.shape) for path, tensor in model.named_parameters() if path.rpartition(".")[0] not in specs
    }
    shards: dict[str, dict[str, Any]] = {}
    total = 0
    for index in range(config.num_hidden_layers + 1):
        prefix = f"model.layers.{index - 1}."
        inside = [path for path in kept if (path.startswith(prefix) if index else ".layers." not in path)]
        shapes = {path: (torch.bfloat16, kept[path]) for path in inside}
        for path, spec in specs.items():
            if index and path.startswith(prefix):
                shapes.update(layer_shapes(path, spec, torch.bfloat16))
        tensors = {path: values(path, dtype, size) for path, (dtype, size) in shapes.items()}
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        file = shard_name(index, config.num_hidden_layers + 1)
        shards[file] = vars(write_shard(output / file, tensors))
    described = {**config.to_dict(), "quantization_config": {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "requires": [],
        "recipe": recipe.to_dict(),
        "layers": {path: spec.to_dict() for path, spec in specs.items()},
    }}  # fmt: skip
    write_text(output / "config.json", json.dumps(described, indent=1) + "\n")
    write_index(output, shards, total)
    write_manifest(output, shards, {})


def memory() -> dict[str, int]:
    """Resident memory in bytes: now, of which file pages, and the most so far (Linux)."""
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE))
    return {name: int(lines[key]) << 10 for name, key in (("now", "VmRSS"), ("files", "RssFile"), ("most", "VmHWM"))}


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **options)
        seconds[name] = time.perf_counter() - began
        return result

    return wrapped


def load(directory: str) -> dict[str, Any]:
    """One loading, in a process of its own."""
    seconds: dict[str, float] = {}
    files = sorted(Path(directory).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    buffer = bytearray(1 << 22)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    seconds["reading"] = time.perf_counter() - began

    began = time.perf_counter()
    import torch  # noqa: F401
    import transformers

    from bitwright.integrations import transformers as integration
    from bitwright.runtime import quantized_linears

    seconds["import"] = time.perf_counter() - began
    transformers.utils.logging.disable_progress_bar()
    imported = memory()
    for name in ("check_files", "check_values", "pack_sites", "use_lean_forward"):
        setattr(integration, name, timed(getattr(integration, name), seconds, name))
    began = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    seconds["loading"] = time.perf_counter() - began
    packed = sum(linear.packed.numel() for _, linear in quantized_linears(model) if linear.packed is not None)
    head = model.get_output_embeddings().weight
    return {
        "seconds": seconds,
        "file_bytes": size,
        "packed_bytes": packed,
        "outer_bytes": 2 * head.numel() * head.element_size(),
        "imported": imported,
        "loaded": memory(),
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function called in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--balance", default="none", help="none: byte tiles; support: boolean tiles")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    directory = str(arguments.directory)
    if not arguments.directory.exists():
        alone(make, directory, arguments.shape, arguments.layers, arguments.balance)
    from bitwright import verify

    if problems := verify(directory):
        raise SystemExit("\n".join(map(str, problems)))
    rows = []
    for _ in range(arguments.runs):
        rows.append(alone(load, directory))
        print(json.dumps(rows[-1]), flush=True)
    seconds = {name: statistics.median(row["seconds"][name] for row in rows) for name in rows[0]["seconds"]}
    neutral = rows[0]["file_bytes"] - rows[0]["outer_bytes"]
    for name, value in seconds.items():
        print(f"{name:16} {value:7.2f} s")
    print(f"repacking        {seconds['pack_sites'] / neutral * 1e9:7.2f} s a GB of {neutral / 1e9:.2f} GB")
    for name in ("imported", "loaded"):
        row = {key: value / 1e9 for key, value in rows[-1][name].items()}
        print(
            f"{name:16} {row['now']:7.2f} GB resident, {row['files']:.2f} of them file pages; {row['most']:.2f} at most"
        )


if __name__ == "__main__":
    main()
