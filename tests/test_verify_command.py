"""`verify` finds every change and says where."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import bitwright
import support
from bitwright.errors import ArtifactError

SHARD = "model-00002-of-00003.safetensors"
MANIFEST = "bitwright_manifest.json"


def data_start(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def test_whole(artifact: Callable[..., Path]) -> None:
    for model in ("llama", "mistral", "llama_sharded"):
        assert bitwright.verify(artifact(model)) == []
    directory = artifact()
    outcome = support.run_cli("verify", directory)
    assert outcome.code == 0
    files = [path for path in directory.iterdir() if path.name != MANIFEST]
    assert f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes" in outcome.out
    outcome = support.run_cli("verify", directory, "--json")
    assert outcome.code == 0
    assert outcome.json["ok"] is True
    assert outcome.json["problems"] == []


def test_flipped_bit_names_the_tensor(artifact_copy: Path) -> None:
    """Whichever tensor of a shard is hit, it and no other is named."""
    path = artifact_copy / SHARD
    whole = path.read_bytes()
    start = data_start(path)
    header = json.loads(whole[8:start])
    for name, entry in header.items():
        begin, end = entry.get("data_offsets", (0, 0))
        if begin == end:
            continue
        support.flip_bit(path, start + (begin + end) // 2, 3)
        (problem,) = bitwright.verify(artifact_copy)
        assert (problem.file, problem.kind, problem.detail) == (SHARD, "changed", f"bytes differ in {name}")
        path.write_bytes(whole)
    assert bitwright.verify(artifact_copy) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "adapter_config.json",
        "processor_config.json",
        "pytorch_model.bin",
        "modeling_llama.py",
        "other.jinja",
        "additional_chat_templates/tool.jinja",
        "tokenizer.model",
        "vocab.txt",
    ],
)
def test_a_file_that_was_added_is_found(name: str, artifact: Callable[..., Path], artifact_copy: Path) -> None:
    """Every byte that was written is as it was; what transformers would read is not."""
    assert name not in support.tree(artifact())
    path = artifact_copy / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((artifact_copy / SHARD).read_bytes())
    (problem,) = bitwright.verify(artifact_copy)
    assert (problem.file, problem.kind) == (name, "unknown")
    outcome = support.run_cli("verify", artifact_copy)
    assert outcome.code == 1
    assert outcome.out.startswith(f"unknown: {name}: ")
    path.unlink()
    assert bitwright.verify(artifact_copy) == []


def test_what_nobody_reads_may_be_added(artifact_copy: Path) -> None:
    (artifact_copy / "notes.txt").write_text("mine")
    (artifact_copy / "LICENSE").write_text("theirs")
    (artifact_copy / "figures").mkdir()
    (artifact_copy / "figures" / "sizes.json").write_text("{}")
    (artifact_copy / ".git").mkdir()
    assert bitwright.verify(artifact_copy) == []


def test_two_damaged_tensors_are_both_named(artifact_copy: Path) -> None:
    path = artifact_copy / SHARD
    start = data_start(path)
    header = json.loads(path.read_bytes()[8:start])
    names = ["model.layers.0.mlp.up_proj.codes", "model.layers.0.self_attn.q_proj.scales"]
    for name in names:
        support.flip_bit(path, start + header[name]["data_offsets"][0], 7)
    outcome = support.run_cli("verify", artifact_copy)
    assert outcome.code == 1
    assert outcome.out.splitlines() == [f"changed: {SHARD}: bytes differ in {', '.join(names)}"]


def test_any_flipped_bit_anywhere_is_found(artifact_copy: Path) -> None:
    """Some hundred random bits of all files, headers and manifest included: found each time, never a crash."""
    rng = random.Random(7)
    files = sorted(path for path in artifact_copy.iterdir())
    assert MANIFEST in [path.name for path in files]
    for path in files:
        whole = path.read_bytes()
        places = [rng.randrange(len(whole)) for _ in range(12)]
        if path.suffix == ".safetensors":
            places += [*range(8), *(rng.randrange(8, data_start(path)) for _ in range(25))]
        for place in places:
            support.flip_bit(path, place, rng.randrange(8))
            if path.name == MANIFEST:
                with pytest.raises(ArtifactError, match=MANIFEST):
                    bitwright.verify(artifact_copy)
            else:
                (problem,) = bitwright.verify(artifact_copy)
                assert problem.file == path.name
            path.write_bytes(whole)
    assert bitwright.verify(artifact_copy) == []


def test_manifest_that_says_the_same_in_other_bytes(artifact_copy: Path) -> None:
    """1e-05 and 1E-05 are one number and one bit apart."""
    path = artifact_copy / MANIFEST
    text = path.read_text()
    for changed in (text.replace("\n", "\r\n"), text + " ", json.dumps(json.loads(text))):
        path.write_bytes(changed.encode())
        outcome = support.run_cli("verify", artifact_copy)
        assert outcome.code == 1
        assert MANIFEST in outcome.message
        assert "has changed since it was written" in outcome.message


@pytest.mark.parametrize(
    ("name", "kind"), [(SHARD, "missing"), (SHARD, "truncated"), (SHARD, "grown"), ("config.json", "changed")]
)
def test_damaged_file(name: str, kind: str, artifact_copy: Path) -> None:
    path = artifact_copy / name
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[:-5])
    elif kind == "grown":
        path.write_bytes(data + b"\x00")
    else:
        support.flip_bit(path, data.index(b"hidden_size") + 2)
    outcome = support.run_cli("verify", artifact_copy)
    assert outcome.code == 1
    assert outcome.err == ""
    (line,) = outcome.out.splitlines()
    assert line.startswith(f"{kind}: {name}: ")
    if kind in ("truncated", "grown"):
        assert f"{path.stat().st_size} bytes, {len(data)} were written" in line
    found = support.run_cli("verify", artifact_copy, "--json")
    assert found.code == 1
    assert found.json["ok"] is False
    assert [(problem["file"], problem["kind"]) for problem in found.json["problems"]] == [(name, kind)]


def test_every_problem_is_listed(artifact_copy: Path) -> None:
    (artifact_copy / SHARD).unlink()
    (artifact_copy / "tokenizer.json").unlink()
    support.flip_bit(artifact_copy / "README.md", 10)
    problems = bitwright.verify(artifact_copy)
    assert {(problem.file, problem.kind) for problem in problems} == {
        (SHARD, "missing"),
        ("tokenizer.json", "missing"),
        ("README.md", "changed"),
    }


def test_extra_file_is_tolerated(artifact_copy: Path) -> None:
    (artifact_copy / "notes.txt").write_text("mine")
    assert bitwright.verify(artifact_copy) == []


def test_manifest_names_every_file_and_tensor(artifact: Callable[..., Path]) -> None:
    import hashlib

    directory = artifact()
    manifest = json.loads((directory / MANIFEST).read_text())
    files = support.tree(directory)
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: digest for name, digest in files.items() if name != MANIFEST
    }
    assert manifest["tensors"] == {
        name: hashlib.sha256(entry.raw).hexdigest() for name, entry in support.read_tensors(directory).items()
    }
    assert manifest["quant_method"] == "bitwright"
    assert manifest["format_version"] == 1
