"""Names, shapes and dtypes of everything in an artifact. docs/format.md says the same in words, to the byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch

from bitwright.codebook import KINDS, Kind, matrix_shapes
from bitwright.errors import ArtifactError
from bitwright.outer import BITS, outer_matrix_shapes
from bitwright.transforms import SiteHadamard
from bitwright.transforms.hadamard import constructible

QUANT_METHOD = "bitwright"
FORMAT_VERSION = 1
MANIFEST_NAME = "bitwright_manifest.json"
CARD_NAME = "README.md"
INDEX_NAME = "model.safetensors.index.json"
# Parts of the format beyond version 1 that a reader must know; an artifact that names another one is refused.
HADAMARD = "hadamard"  # layers whose input is transformed behind its order
OUTER = "outer"  # embedding or head in integers
SALIENT = "salient"  # linears with a second codebook for salient channels
SYMMETRIC_INPUTS = "symmetric_inputs"  # inputs quantized without a zero point
CLIP = "clip"  # clip ratios of a site's inputs or of a layer's cache, in place of the recipe's
KNOWN_REQUIREMENTS: frozenset[str] = frozenset({HADAMARD, OUTER, SALIENT, SYMMETRIC_INPUTS, CLIP})

# The widest group of a recipe that names one; a whole row may be wider.
LARGEST_GROUP = 4096

Shape = tuple[torch.dtype, tuple[int, ...]]


def shard_name(index: int, count: int) -> str:
    """Shard 0 holds what is outside the blocks, shard i + 1 block i."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class LayerSpec:
    """One quantized linear, as `quantization_config.layers` in config.json describes it.

    `permutation` names the linear (the site's leader) whose `permutation` tensor orders the input, or is None.
    `hadamard` and `stride` are those of transforms.SiteHadamard; hadamard = 0: none. Left out of the dict where nothing
    is transformed, so that such artifacts are what they were before there was a transform.
    `clip` is the clip ratio of the input's quantizer; None, and then left out: that of the recipe.
    """

    rows: int
    columns: int
    bits: int
    group: int
    kind: Kind
    outliers: int
    bias: bool
    permutation: str | None
    hadamard: int = 0
    stride: int = 1
    clip: float | None = None

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        if not self.hadamard:
            del data["hadamard"], data["stride"]
        if self.clip is None:
            del data["clip"]
        return data

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> LayerSpec:
        """Unknown keys are ignored (they may be notes of a newer version); missing and absurd ones are errors."""
        spec = cls(**_described(cls, name, data))
        if spec.kind not in KINDS:
            raise ArtifactError(
                f"layer {name} has a codebook of kind {spec.kind!r}; this version reads {', '.join(KINDS)}"
            )
        least = {"rows": 1, "columns": 1, "bits": 1, "group": 1, "outliers": 0, "hadamard": 0, "stride": 1}
        _check_numbers(name, vars(spec), least, {"bits": 8})
        if spec.outliers >= spec.columns or not isinstance(spec.permutation, (str, type(None))):
            raise ArtifactError(
                f"config.json gives layer {name} outliers = {spec.outliers} of {spec.columns} columns and"
                f" permutation = {spec.permutation!r}; the artifact is damaged"
            )
        _check_sizes(name, spec)
        if spec.hadamard and not constructible(spec.hadamard):
            raise ArtifactError(f"layer {name} has a Hadamard transform of size {spec.hadamard}, which has no matrix")
        if spec.clip is not None:
            check_clip(f"layer {name}", spec.clip)
        return spec

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def transform(self) -> SiteHadamard | None:
        """What is done to the input behind its order."""
        if not self.hadamard:
            return None
        return SiteHadamard(self.hadamard, self.stride, self.columns - self.outliers)


@dataclass(frozen=True)
class OuterSpec:
    """An embedding or head in integers, as `quantization_config.outer` in config.json describes it."""

    rows: int
    columns: int
    bits: int
    group: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> OuterSpec:
        """As LayerSpec.from_dict."""
        spec = cls(**_described(cls, name, data))
        _check_numbers(name, data, {"rows": 1, "columns": 1, "group": 8})
        if spec.bits not in BITS or spec.group % 8:
            raise ArtifactError(
                f"config.json gives layer {name} bits = {spec.bits!r} and group = {spec.group}; this version reads"
                " 8 or 4 bits in groups of a multiple of 8"
            )
        return spec

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def check_clip(what: str, ratio: Any) -> None:
    """Raises ArtifactError where config.json gives something else than a clip ratio."""
    if type(ratio) not in (int, float) or not 0.0 < ratio <= 1.0:
        raise ArtifactError(
            f"config.json gives {what} clip = {ratio!r}; expected a number above 0, at most 1; the artifact is damaged"
        )


def cache_clips(config: Mapping[str, Any], layers: int) -> list[float] | None:
    """`cache` of a quantization_config: the clip ratio of each layer's cache; None: that of the recipe in all.

    Raises ArtifactError where there is not one for each of `layers` decoder blocks.
    """
    if (described := config.get("cache")) is None:
        return None
    clips = described.get("clips") if isinstance(described, Mapping) else None
    if not isinstance(clips, list) or len(clips) != layers:
        raise ArtifactError(
            f"quantization_config.cache is {described!r}; expected `clips` with a number for each of the {layers}"
            " decoder blocks; the artifact is damaged"
        )
    for index, ratio in enumerate(clips):
        check_clip(f"the cache of decoder block {index}", ratio)
    return [float(ratio) for ratio in clips]


def _described(cls: type, name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `cls` in what config.json says of a layer. Raises ArtifactError where one is missing."""
    if not isinstance(data, Mapping):
        raise ArtifactError(f"config.json describes layer {name} by {data!r}; the artifact is damaged")
    missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in data]
    if missing:
        raise ArtifactError(f"config.json describes layer {name} without {', '.join(missing)}; the artifact is damaged")
    return {field.name: data[field.name] for field in fields(cls) if field.name in data}


def _check_numbers(
    name: str, data: Mapping[str, Any], least: Mapping[str, int], most: Mapping[str, int] = MappingProxyType({})
) -> None:
    for key, smallest in least.items():
        value, largest = data[key], most.get(key)
        if type(value) is not int or value < smallest or (largest is not None and value > largest):
            span = f"from {smallest} on" if largest is None else f"from {smallest} to {largest}"
            raise ArtifactError(
                f"config.json gives layer {name} {key} = {value!r}; expected a number {span}; the artifact is damaged"
            )


def _check_sizes(name: str, spec: LayerSpec) -> None:
    """Refuse groups that kernels do not take, and blocks wider than all that there is to fill them."""
    widest = max(LARGEST_GROUP, -(-spec.columns // 8) * 8)
    if spec.group % 8 or spec.group > widest:
        raise ArtifactError(
            f"config.json gives layer {name} group = {spec.group}; expected a multiple of 8, at most {widest};"
            " the artifact is damaged"
        )
    if spec.hadamard * spec.stride > widest:
        raise ArtifactError(
            f"config.json gives layer {name} hadamard = {spec.hadamard} and stride = {spec.stride}; expected blocks of"
            f" at most {widest} channels; the artifact is damaged"
        )


def permutation_dtype(columns: int) -> torch.dtype:
    """16 bits a channel where they reach."""
    return torch.uint16 if columns <= 65536 else torch.int32


def layer_shapes(name: str, spec: LayerSpec, float_dtype: torch.dtype) -> dict[str, Shape]:
    """Tensor name -> dtype and shape for the linear `name`, sentinel and bias included."""
    shapes: dict[str, Shape] = {
        f"{name}.{part}": shape
        for part, shape in matrix_shapes(
            spec.rows, spec.columns, spec.bits, spec.group, spec.kind, spec.outliers
        ).items()
    }
    # Zero elements: without bitwright, transformers finds the wrong shape and refuses instead of running on noise.
    shapes[f"{name}.weight"] = (float_dtype, (0,))
    if spec.permutation == name:
        shapes[f"{name}.permutation"] = (permutation_dtype(spec.columns), (spec.columns,))
    if spec.bias:
        shapes[f"{name}.bias"] = (float_dtype, (spec.rows,))
    return shapes


def outer_shapes(name: str, spec: OuterSpec, float_dtype: torch.dtype) -> dict[str, Shape]:
    """Tensor name -> dtype and shape for the embedding or head `name`, sentinel included, a head's bias not."""
    shapes: dict[str, Shape] = {
        f"{name}.{part}": shape
        for part, shape in outer_matrix_shapes(spec.rows, spec.columns, spec.bits, spec.group).items()
    }
    shapes[f"{name}.weight"] = (float_dtype, (0,))
    return shapes


def counted(tensor_name: str) -> bool:
    """Whether a tensor of a quantized linear belongs to its honest bits: all but the bias and the empty sentinel."""
    return not tensor_name.endswith((".bias", ".weight"))


def requirements(
    specs: Iterable[LayerSpec], outer: bool = False, symmetric_inputs: bool = False, clips: bool = False
) -> list[str]:
    """The entry `requires` of an artifact with these layers; `clips`: ratios that a search found."""
    specs = list(specs)
    features = {
        HADAMARD: any(spec.hadamard for spec in specs),
        OUTER: outer,
        SALIENT: any(spec.kind == "salient" for spec in specs),
        SYMMETRIC_INPUTS: symmetric_inputs,
        CLIP: clips,
    }
    return [feature for feature, needed in features.items() if needed]


def check_version(config: Mapping[str, Any]) -> None:
    """Refuse formats that this version cannot read. Raises ArtifactError."""
    version = config.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ArtifactError(f"quantization_config has format_version {version!r}; expected a number from 1 on")
    unknown = sorted(set(config.get("requires") or ()) - KNOWN_REQUIREMENTS)
    if version > FORMAT_VERSION or unknown:
        what = f"format version {version}" if version > FORMAT_VERSION else f"format feature {unknown[0]!r}"
        raise ArtifactError(f"the artifact uses {what}, which this bitwright does not know; upgrade bitwright")


def bits_word(bits: Iterable[int]) -> str:
    """`2`, or `2 to 3` where linears have codes of different bits."""
    found = list(bits)
    return " to ".join(str(count) for count in dict.fromkeys((min(found), max(found))))
