"""The golden artifacts: written once, read by every later version, and decoded here from docs/format.md alone.

The decoder is plain Python on the bytes: no torch, no safetensors, no bitwright. tests/golden/make.py made the files.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
import support
from bitwright.runtime import QuantizedKVCache, quantized_linears

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("free", "uniform", "shared", "salient")

Rows = list[list[float]]


# --- the decoder ------------------------------------------------------------------------------------------------------


def numbers(code: str, raw: bytes) -> list[Any]:
    return [value[0] for value in struct.iter_unpack("<" + code, raw)]


class Decoder:
    """docs/format.md, "Tensors of a linear", as code."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.layers = config["quantization_config"]["layers"]
        self.tensors = support.read_tensors(directory)

    def stored(self, layer: str, part: str, code: str, dtype: str, shape: tuple[int, ...]) -> list[Any]:
        """The numbers of a tensor that must have this dtype and shape."""
        entry = self.tensors[f"{layer}.{part}"]
        assert (entry.dtype, entry.shape) == (dtype, shape), f"{layer}.{part}"
        return numbers(code, entry.raw)

    def codes(self, layer: str) -> list[list[int]]:
        """Bit (i mod 8), least significant first, of byte i / 8 of row r of plane p is bit p of code (r, i)."""
        spec = self.layers[layer]
        rows, normal = spec["rows"], spec["columns"] - spec["outliers"]
        width = -(-normal // 8)
        planes = self.stored(layer, "codes", "B", "U8", (spec["bits"], rows, width))
        codes = [[0] * normal for _ in range(rows)]
        for plane in range(spec["bits"]):
            for row in range(rows):
                start = (plane * rows + row) * width
                for i in range(normal):
                    codes[row][i] |= (planes[start + i // 8] >> (i % 8) & 1) << plane
                for i in range(normal, 8 * width):
                    assert planes[start + i // 8] >> (i % 8) & 1 == 0, "padding bits are 0"
        return codes

    def site_order(self, layer: str) -> Rows:
        """Weights in site order: normal channels first, outlier channels last."""
        spec = self.layers[layer]
        rows, columns, outliers, group = spec["rows"], spec["columns"], spec["outliers"], spec["group"]
        normal, count = columns - outliers, 2 ** spec["bits"]
        groups = -(-normal // group)
        if spec["kind"] == "shared":
            assert outliers == 0
            table = self.stored(layer, "table", "f", "F32", (count,))
            return [[table[code] for code in codes] for codes in self.codes(layer)]
        scales = self.stored(layer, "scales", "e", "F16", (rows, groups))
        salient = [False] * normal
        if spec["kind"] == "salient":
            bitmap = self.stored(layer, "salient", "B", "U8", (-(-normal // 8),))
            salient = [bool(bitmap[i // 8] >> (i % 8) & 1) for i in range(normal)]
            salient_levels = self.stored(layer, "salient_levels", "b", "I8", (rows, groups, count))
            salient_scales = self.stored(layer, "salient_scales", "e", "F16", (rows, groups))
        if spec["kind"] in ("free", "salient"):
            levels = self.stored(layer, "levels", "b", "I8", (rows, groups, count))
        else:
            zeros = self.stored(layer, "zeros", "B", "U8", (rows, groups))
            levels = [code - zero for zero in zeros for code in range(count)]
        weights = []
        for row, codes in enumerate(self.codes(layer)):
            values = []
            for i, code in enumerate(codes):
                cell = row * groups + i // group
                if salient[i]:
                    values.append(salient_levels[cell * count + code] * salient_scales[cell])
                else:
                    values.append(levels[cell * count + code] * scales[cell])
            weights.append(values)
        if outliers:
            integers = self.stored(layer, "outliers", "b", "I8", (rows, outliers))
            row_scales = self.stored(layer, "outlier_scales", "e", "F16", (rows,))
            for row in range(rows):
                weights[row] += [integers[row * outliers + j] * row_scales[row] for j in range(outliers)]
        return weights

    def weights(self, layer: str) -> Rows:
        """Weights in the order of the model's input channels: site channel i is input channel permutation[i]."""
        spec = self.layers[layer]
        order = list(range(spec["columns"]))
        if spec["permutation"] is not None:
            order = self.stored(spec["permutation"], "permutation", "H", "U16", (spec["columns"],))
        assert sorted(order) == list(range(spec["columns"]))
        rows = []
        for values in self.site_order(layer):
            row = [0.0] * spec["columns"]
            for i, value in zip(order, values, strict=True):
                row[i] = value
            rows.append(row)
        return rows


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def golden(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    kind = request.param
    return GOLDEN / kind, json.loads((GOLDEN / f"{kind}.json").read_text())


Golden = tuple[Path, dict[str, Any]]


def test_verify_passes(golden: Golden) -> None:
    assert bitwright.verify(golden[0]) == []


def test_logits(golden: Golden) -> None:
    directory, expected = golden
    model = bitwright.load(directory)
    recipe = model.config.quantization_config.parsed_recipe()
    ids = torch.tensor([expected["ids"]])
    with torch.inference_mode():
        cache = None if recipe.kv is None else QuantizedKVCache(1, recipe.kv)
        found = model(ids, past_key_values=cache, use_cache=True).logits[0]
    assert float((found - torch.tensor(expected["logits"])).abs().max()) <= 1e-4


def test_decoder_from_the_format_alone(golden: Golden) -> None:
    """Every weight of every linear, exactly: the bytes, the decoder, the loaded module and the stored hash agree."""
    directory, expected = golden
    decoder = Decoder(directory)
    modules = dict(quantized_linears(bitwright.load(directory)))
    assert set(modules) == set(decoder.layers) == set(expected["weights_sha256"])
    assert len(modules) == 7
    for name, module in modules.items():
        decoded = torch.tensor(decoder.weights(name), dtype=torch.float64)
        loaded = module.matrix().dequantize()
        assert torch.equal(loaded.double(), decoded), name
        raw = b"".join(struct.pack(f"<{len(row)}f", *row) for row in decoder.weights(name))
        assert hashlib.sha256(raw).hexdigest() == expected["weights_sha256"][name], name


BOOKS = {
    "free": {"scales", "levels", "outliers", "outlier_scales"},
    "uniform": {"scales", "zeros", "outliers", "outlier_scales"},
    "shared": {"table"},
    "salient": {"scales", "levels", "salient", "salient_levels", "salient_scales"},
}


def test_tensors_are_those_of_the_format(golden: Golden) -> None:
    """No tensor more and none less than the format lists, each in one place."""
    directory, _ = golden
    kind = directory.name
    decoder = Decoder(directory)
    leaders = set()
    for name, spec in decoder.layers.items():
        assert set(spec) == {"rows", "columns", "bits", "group", "kind", "outliers", "bias", "permutation"}
        assert spec["kind"] == kind
        leaders.add(spec["permutation"])
        parts = {"codes", "weight"} | BOOKS[kind]
        parts |= {"bias"} if spec["bias"] else set()
        parts |= {"permutation"} if spec["permutation"] == name else set()
        own = {key.removeprefix(f"{name}.") for key in decoder.tensors if key.startswith(f"{name}.")}
        assert own == parts, name
        sentinel = decoder.tensors[f"{name}.weight"]
        assert (sentinel.dtype, sentinel.shape, sentinel.raw) == ("BF16", (0,), b"")
    moved = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert leaders == ({None} if kind in ("shared", "salient") else {f"model.layers.0.{leader}" for leader in moved})
    kept = {key for key in decoder.tensors if key.rpartition(".")[0] not in decoder.layers}
    assert kept == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }


def test_features_are_named(golden: Golden) -> None:
    config = json.loads((golden[0] / "config.json").read_text())["quantization_config"]
    assert config.get("requires", []) == (["salient", "symmetric_inputs"] if golden[0].name == "salient" else [])


def test_salient_columns_are_some_of_every_group() -> None:
    decoder = Decoder(GOLDEN / "salient")
    for name, spec in decoder.layers.items():
        bits = "".join(f"{byte:08b}"[::-1] for byte in decoder.tensors[f"{name}.salient"].raw)
        assert set(bits[spec["columns"] :]) <= {"0"}, "padding bits are 0"
        for start in range(0, spec["columns"], spec["group"]):
            assert "".join(sorted(set(bits[start : start + spec["group"]]))) == "01"


def test_levels_of_free_codebooks() -> None:
    """Codes 2, 0, 1, 3 stand for the levels in ascending order, within -127..127; the largest reaches 127."""
    decoder = Decoder(GOLDEN / "free")
    for name in decoder.layers:
        levels = numbers("b", decoder.tensors[f"{name}.levels"].raw)
        assert len(levels) % 4 == 0
        for start in range(0, len(levels), 4):
            by_code = levels[start : start + 4]
            assert by_code[2] <= by_code[0] <= by_code[1] <= by_code[3]
            assert max(abs(level) for level in by_code) == 127


def test_shared_tables_are_signs_and_magnitudes() -> None:
    """Code 2 k is the negative of code 2 k + 1, and magnitudes rise with k."""
    decoder = Decoder(GOLDEN / "shared")
    for name, spec in decoder.layers.items():
        table = numbers("f", decoder.tensors[f"{name}.table"].raw)
        assert len(table) == 2 ** spec["bits"] == 64
        assert [-value for value in table[0::2]] == table[1::2] == sorted(map(abs, table[1::2]))


def test_safetensors_files_are_written_in_one_way(golden: Golden) -> None:
    """Tensors by falling element size, then by name; compact header, metadata first, padded to 8; no gaps."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "U16": 2, "I8": 1, "U8": 1}
    for path in golden[0].glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = data[8 : 8 + length].decode()
        assert length % 8 == 0
        assert text.startswith('{"__metadata__":{"format":"pt"}')
        header = json.loads(text)
        assert text.rstrip(" ") == json.dumps(header, separators=(",", ":"))
        assert len(text) - len(text.rstrip(" ")) < 8
        header.pop("__metadata__")
        assert list(header) == sorted(header, key=lambda name: (-sizes[header[name]["dtype"]], name))
        end = 0
        for entry in header.values():
            assert entry["data_offsets"][0] == end
            end = entry["data_offsets"][1]
        assert len(data) == 8 + length + end


def test_the_golden_files_are_small() -> None:
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 260_000
