"""Two bits by other tools, weights only: quantized by the tool, measured by `bitwright eval`'s code.

    python bench/peers/two_bits.py segments MODEL --calib FILE --to segments.safetensors
    PEER/bin/python bench/peers/two_bits.py quantize MODEL hqq --segments segments.safetensors --to DIR
    python bench/peers/two_bits.py table MODEL DIR --text FILE --text FILE

The first and the last run where bitwright is installed, the second where the tool is; README.md beside this says how.
The segments are those that `bitwright quantize` takes with the same seed. What a tool made is written dequantized, as
an ordinary float32 model in DIR/<tool>-<group>-<number>, with the tool's version, options, seconds and bits in
two_bits.json; what is there already is not made again, and what
was made of other weights or segments is refused. Activations are not quantized. `table` prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peer_tools import SETTINGS, TOOLS, Linear, version
from safetensors.torch import load_file, save_file

FACTS = "two_bits.json"


def segments(arguments: argparse.Namespace) -> None:
    from bitwright.calibration import load_tokenizer, random_windows, read_text, tokenize

    text = read_text([arguments.calib])
    tokens = tokenize(load_tokenizer(arguments.model), text)
    rows = random_windows(tokens, arguments.sequences, arguments.length, arguments.seed, text)
    facts = {"text": text.name, "sha256": text.sha256, "seed": str(arguments.seed)}
    save_file({"tokens": rows}, arguments.to, metadata=facts)
    print(f"{arguments.to}: {rows.shape[0]} segments of {rows.shape[1]} tokens of {text.name}")


def quantize(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    rows = load_file(arguments.segments)["tokens"]
    names = list(SETTINGS[arguments.tool])
    for number in arguments.settings or range(len(names)):
        for group in arguments.group:
            directory = arguments.to / f"{arguments.tool}-{group}-{number}"
            made_of = {"model": weights_digest(arguments.model), "tokens": digest([arguments.segments])}
            if (directory / FACTS).exists():
                before = json.loads((directory / FACTS).read_text(encoding="utf-8"))
                if before["made_of"] != made_of:
                    raise SystemExit(f"{directory} was made of another model or other segments; give another --to")
                continue
            setting = SETTINGS[arguments.tool][names[number]]
            print(f"{directory.name}: {names[number]}, groups of {group}", file=sys.stderr, flush=True)
            random.seed(0)
            torch.manual_seed(0)
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                linears = TOOLS[arguments.tool](arguments.model, rows, setting, group, Path(scratch))
            facts = {
                "tool": arguments.tool,
                "version": version(arguments.tool),
                "setting": names[number],
                "options": setting,
                "group": group,
                "seconds": round(time.perf_counter() - start, 1),
                "threads": arguments.threads,
                "segments": list(rows.shape),
                "made_of": made_of,
            }
            write(arguments.model, linears, facts, directory)


def digest(files: Iterable[Path]) -> str:
    """sha256 of the files' bytes, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.read_bytes())
    return total.hexdigest()


def weights_digest(directory: Path) -> str:
    return digest(directory.glob("*.safetensors"))


def write(model: Path, linears: dict[str, Linear], facts: dict[str, Any], directory: Path) -> None:
    """The model in float32 with these linears in it; the facts last, so that they tell a whole directory."""
    directory.mkdir(parents=True, exist_ok=True)
    left = {f"{name}.weight": linear for name, linear in linears.items()}
    weights = lost = total = 0.0
    bits = 0
    for path in sorted(model.glob("*.safetensors")):
        content = {name: tensor.float() for name, tensor in load_file(path).items()}
        for name in content.keys() & left.keys():
            linear = left.pop(name)
            lost += float((linear.weight - content[name]).square().sum())
            total += float(content[name].square().sum())
            bits += linear.bits
            weights += linear.weight.numel()
            content[name] = linear.weight.contiguous()
        save_file(content, directory / path.name, metadata={"format": "pt"})
    if left or not linears:
        raise SystemExit(f"{model} has no weight {', '.join(left) or 'that was quantized'}")
    # A layout read wrongly gives weights that have nothing to do with the original.
    if lost > total:
        raise SystemExit(f"{directory.name}: weights are farther from the original than zeros are")
    for path in model.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja") and path.name != "config.json":
            shutil.copy(path, directory / path.name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    facts |= {"linears": len(linears), "bits": bits / weights, "relative_error": lost / total}
    (directory / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def table(arguments: argparse.Namespace) -> None:
    from bitwright import evaluate
    from bitwright.calibration import read_text

    texts = [read_text([path]) for path in arguments.text]
    measure = {"window": arguments.window, "limit": arguments.windows}

    def losses(directory: Path) -> list[float]:
        """Mean loss on each text; kept in the directory of results."""
        kept = arguments.results / "losses.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        found, weights = [], weights_digest(directory)
        for text in texts:
            key = " ".join([directory.name, weights, text.sha256, json.dumps(measure)])
            if key not in known:
                known[key] = math.log(evaluate(directory, text, **measure).perplexity)
                kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
            found.append(known[key])
        return found

    original = losses(arguments.model)
    header = ["", "setting", "activations", "group", "bits a weight", "seconds"]
    header += [f"excess, {text.name}" for text in texts]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for directory in sorted(path for path in arguments.results.iterdir() if path.is_dir()):
        if (cells := about(directory)) is None:
            continue
        excess = [after - before for after, before in zip(losses(directory), original, strict=True)]
        print("| " + " | ".join([*cells, *(f"{value:.4f}" for value in excess)]) + " |", flush=True)


def about(directory: Path) -> list[str] | None:
    """The cells of a row before its figures; None where the directory is neither a tool's nor an artifact."""
    if (path := directory / FACTS).exists():
        facts = json.loads(path.read_text(encoding="utf-8"))
        cells = [f"{facts['tool']} {facts['version']}", facts["setting"], "16 bits", str(facts["group"])]
        return [*cells, f"{facts['bits']:.4f}", f"{facts['seconds']:.0f}"]
    if (path := directory / "bitwright_manifest.json").exists():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        recipe, sizes = manifest["recipe"], [math.prod(layer["shape"]) for layer in manifest["layers"]]
        bits = sum(layer["bits"] * size for layer, size in zip(manifest["layers"], sizes, strict=True)) / sum(sizes)
        planes = f"{recipe['activations']['bits']} bits" if recipe["activations"] else "16 bits"
        target = (recipe.get("allocate") or {}).get("target", "auto")
        chosen = [f"--target-bits {target}"] if target != "auto" else []
        setting = " ".join([recipe["name"], *chosen, *(["--tune"] if recipe.get("tune") else [])])
        cells = [f"bitwright {manifest['bitwright']}", setting, planes, str(recipe["weights"]["group"])]
        return [*cells, f"{bits:.4f}", ""]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("segments", help="calibration segments as token numbers")
    one.add_argument("model", type=Path)
    one.add_argument("--calib", type=Path, required=True)
    one.add_argument("--sequences", type=int, default=128)
    one.add_argument("--length", type=int, default=2048)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--to", type=Path, required=True)
    one.set_defaults(run=segments)
    two = commands.add_parser("quantize", help="every setting of a tool")
    two.add_argument("model", type=Path)
    two.add_argument("tool", choices=TOOLS)
    two.add_argument("--segments", type=Path, required=True)
    two.add_argument("--group", type=int, nargs="+", default=[64, 32])
    two.add_argument("--settings", type=int, nargs="+", help="numbers of settings, from 0; all")
    two.add_argument("--threads", type=int, default=1)
    two.add_argument("--to", type=Path, required=True)
    two.set_defaults(run=quantize)
    three = commands.add_parser("table", help="excess of everything in a directory")
    three.add_argument("model", type=Path)
    three.add_argument("results", type=Path)
    three.add_argument("--text", type=Path, action="append", required=True)
    three.add_argument("--window", type=int)
    three.add_argument("--windows", type=int)
    three.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
