"""The recipe: everything that was asked for, and nothing about the model it will be applied to.

A recipe is immutable, validated, and serialises to the same JSON bytes for equal content, so that it can be part of
the fingerprint of a run and of the artifact. Presets carry the methods' names.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitwright.errors import RecipeError

OutlierCount = Literal["auto"] | int


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightRecipe(_Part):
    """How the weights of a linear layer become codes, levels and int8 outlier columns (BWA, sections 2.1 to 2.3)."""

    method: Literal["bwa", "rtn", "gptq", "wgm"] = "bwa"
    bits: int = Field(
        2, ge=1, le=8, description="bits of a code; 2 is the paper's 1+1; above 4 for wgm and uniform levels"
    )
    group: int = Field(128, ge=0, le=4096, description="input channels that share a codebook; 0: a whole row")
    levels: Literal["em", "dp", "minmax", "uniform", "windowed", "greedy"] = Field(
        "em",
        description="em: weighted Lloyd iterations (paper); dp: the exact optimum; minmax: equally spaced between the"
        " extremes of the group; uniform: round-to-nearest grid with a zero point; windowed, greedy: neighbouring"
        " magnitudes of the whole matrix merged (WGM algorithms 3 and 2), with dp the choices of method wgm",
    )
    em_iterations: int = Field(20, ge=1, le=1000)
    window: int = Field(512, ge=1, description="sorted magnitudes that merging starts from, levels = windowed")
    penalty: float = Field(
        0.75, ge=0.0, allow_inf_nan=False, description="lambda of WGM: a group of m weights costs penalty / m more"
    )
    symmetric: bool = Field(False, description="levels = uniform: the range is -max..max, and no zero point is stored")
    range: Literal["minmax", "mse"] = Field(
        "minmax", description="levels = uniform: the grid spans the extremes, or the share of them that errs least"
    )
    importance: Literal["none", "hessian", "inverse", "conditional"] = Field(
        "conditional", description="weight h_i of a column: 1, H_ii, 1/P_ii or 1/U_ii^2 (erratum E6)"
    )
    feedback: Literal["none", "block-diag", "block-tri", "column"] = Field(
        "block-diag",
        description="how the error of a block reaches the later columns; block-diag is the paper's listing",
    )
    feedback_outliers: bool = Field(True, description="the outlier columns absorb error too (erratum E5)")
    order: Literal["ascending", "descending", "none"] = Field(
        "ascending", description="order of the normal channels by activation energy; outliers are always last"
    )
    outliers: OutlierCount = Field(
        "auto", description="input channels kept in int8; auto: about 3 %, see outlier_count"
    )
    refine: int = Field(
        0, ge=0, le=100, description="rounds of level refit and code exchange under the full Hessian after the solver"
    )
    damping: float = Field(0.01, gt=0.0, le=1.0, description="share of the mean diagonal of H that is added to it")

    @model_validator(mode="after")
    def _goes_together(self) -> WeightRecipe:
        if self.group % 8:
            raise ValueError(
                f"group = {self.group} is not a multiple of 8; write for example 64 or 128, or 0 for a whole row"
            )
        if isinstance(self.outliers, int) and self.outliers < 0:
            raise ValueError(f"outliers = {self.outliers} is negative; write 'auto', 0 or a positive number")
        if self.method == "rtn" and (self.levels != "uniform" or self.feedback != "none"):
            raise ValueError(
                f"method 'rtn' has no levels = '{self.levels}' with feedback = '{self.feedback}';"
                " write levels = 'uniform' and feedback = 'none'"
            )
        if self.method == "gptq" and (self.levels != "uniform" or self.feedback != "column"):
            raise ValueError(
                f"method 'gptq' has no levels = '{self.levels}' with feedback = '{self.feedback}';"
                " write levels = 'uniform' and feedback = 'column'"
            )
        merging = self.levels in ("windowed", "greedy")
        if self.method == "wgm" and (not (merging or self.levels == "dp") or self.feedback != "none"):
            raise ValueError(
                f"method 'wgm' has no levels = '{self.levels}' with feedback = '{self.feedback}';"
                " write levels = 'windowed', 'greedy' or 'dp' and feedback = 'none'"
            )
        if self.method != "wgm" and merging:
            raise ValueError(f"levels = '{self.levels}' is for method 'wgm' alone; write levels = 'em' or 'dp'")
        if self.method != "wgm" and self.levels != "uniform" and self.bits > 4:
            raise ValueError(
                f"bits = {self.bits} is for method 'wgm' and levels = 'uniform' alone; write a number from 1 to 4"
            )
        if self.levels != "uniform" and (self.symmetric or self.range != "minmax"):
            key = "symmetric" if self.symmetric else "range"
            raise ValueError(f"{key} is for levels = 'uniform' alone; leave it out with levels = '{self.levels}'")
        if self.refine and self.kind != "free":
            raise ValueError(f"refine needs free levels; write refine = 0 with levels = '{self.levels}'")
        return self

    @property
    def kind(self) -> Literal["free", "uniform", "symmetric", "shared"]:
        """The kind of codebook that this makes (bitwright.codebook)."""
        if self.method == "wgm":
            return "shared"
        if self.levels != "uniform":
            return "free"
        return "symmetric" if self.symmetric else "uniform"

    def group_of(self, normal: int) -> int:
        """Input channels that share a codebook in a linear with `normal` normal ones: a multiple of 8."""
        return self.group or (normal + 7) // 8 * 8


class TransformRecipe(_Part):
    """What is done to the inputs of sites beside their order, and undone in their weights (docs/methods.md)."""

    hadamard: Literal["none", "group"] = Field(
        "none", description="group: each group of normal channels, after the order, times its Hadamard matrix"
    )
    rotation: Literal["none", "quarot"] = Field(
        "none", description="quarot: residual stream, heads and the inputs of the last products in a Hadamard basis"
    )
    seed: int = Field(0, ge=0, description="of the random signs of a rotation")

    @model_validator(mode="after")
    def _goes_together(self) -> TransformRecipe:
        if self.rotation != "none" and self.hadamard != "none":
            raise ValueError("a rotation has transforms of its own; write hadamard = 'none' or rotation = 'none'")
        return self


class ActivationRecipe(_Part):
    """The dynamic 4-bit quantizer of a site's input, one scale and zero point a token and group (BWA, eq. 3, 4, 10)."""

    bits: Literal[4, 8] = 4
    balance: Literal["support", "literal", "none"] = Field(
        "support", description="free plane scales: averaged over the plane's support, over all positions, or not at all"
    )
    clip: float = Field(1.0, gt=0.0, le=1.0, description="share of the range min..max that the codes span")

    @model_validator(mode="after")
    def _goes_together(self) -> ActivationRecipe:
        if self.bits != 4 and self.balance != "none":
            raise ValueError("balance is defined for 4 planes only; write balance = 'none' with bits = 8")
        return self


class KVRecipe(_Part):
    """The key-value cache: asymmetric, one scale and minimum a token and head."""

    bits: Literal[4, 8] = 4
    hadamard: bool = Field(False, description="keys are cached times a Hadamard matrix, after RoPE (QuaRot)")


class CalibrationRecipe(_Part):
    """Random segments of the calibration text (GPTQ's protocol)."""

    sequences: int = Field(128, ge=1)
    length: Literal["auto"] | int = Field("auto", description="tokens a segment; auto: 2048 or the model's context")
    seed: int = Field(0, ge=0)
    reforward: bool = Field(
        False,
        description="solve the sites of a block one after the other, each on inputs that the solved ones before gave",
    )
    asymmetry: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="how far the target goes from the weights to those that turn the quantized inputs into the outputs"
        " of the full-precision model (GPTAQ)",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> CalibrationRecipe:
        if isinstance(self.length, int) and self.length < 8:
            raise ValueError(f"length = {self.length} is too short to say anything; write 8 or more")
        return self


class OuterRecipe(_Part):
    """What stands outside the blocks: embedding and output head, symmetric, rounded to nearest (bitwright.outer)."""

    embedding: Literal[16, 8, 4] = Field(16, description="bits of a weight; 16 keeps the matrix as it is")
    head: Literal[16, 8, 4] = Field(16, description="as embedding; equal to it where the model ties the two")
    group: int = Field(128, ge=8, le=4096, description="columns of a row that share a scale")

    @model_validator(mode="after")
    def _goes_together(self) -> OuterRecipe:
        if self.group % 8:
            raise ValueError(f"group = {self.group} is not a multiple of 8; write for example 64 or 128")
        return self


class Recipe(_Part):
    """A complete recipe. `activations = None` keeps 16-bit activations, `kv = None` a 16-bit cache."""

    name: str = "bwa"
    weights: WeightRecipe = WeightRecipe()
    transform: TransformRecipe = TransformRecipe()
    activations: ActivationRecipe | None = ActivationRecipe()
    kv: KVRecipe | None = KVRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    outer: OuterRecipe = OuterRecipe()

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        if self.transform.rotation != "none" and (self.weights.outliers != 0 or self.weights.order != "none"):
            raise ValueError(
                f"transform.rotation = '{self.transform.rotation}' leaves no channels to set aside or to sort;"
                " write weights.outliers = 0 and weights.order = 'none'"
            )
        if self.transform.rotation != "none" and min(self.outer.embedding, self.outer.head) < 16:
            raise ValueError(
                f"transform.rotation = '{self.transform.rotation}' is not made for an embedding or head in integers;"
                " write outer.embedding = 16 and outer.head = 16"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it. `outer` is left out where it keeps everything: artifacts without it read as ever."""
        data = self.model_dump(mode="json")
        if self.outer.embedding == self.outer.head == 16:
            del data["outer"]
        return data

    def to_json(self) -> str:
        """Canonical JSON: the same bytes for equal recipes."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Validate `data`. Raises RecipeError that names the key, what was found and what to write instead."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(f"{source}: {_explain(error)}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file; keys that are left out keep the values of preset `bwa`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecipeError(f"recipe {path} is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"recipe {path} holds a {type(data).__name__}; a JSON object was expected")
        return cls.from_dict(data, str(path))

    def with_options(self, options: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced: `{"weights.outliers": 0, "kv": None}`."""
        data = self.model_dump(mode="json")
        for key, value in options.items():
            *parents, leaf = key.split(".")
            node = data
            for depth, parent in enumerate(parents):
                child = node.get(parent)
                if child is None and parent in node:
                    off = ".".join(parents[: depth + 1])
                    cure = f"write {off}={json.dumps({leaf: value}, default=str)} to turn it on"
                    raise RecipeError(f"recipe: {key} has no effect because {off} is off; {cure}")
                if not isinstance(child, dict):
                    raise RecipeError(f"recipe: {_unknown(key, node, parent)}")
                node = child
            if leaf not in node:
                raise RecipeError(f"recipe: {_unknown(key, node, leaf)}")
            node[leaf] = value
        return Recipe.from_dict(data)


def parse_option(text: str) -> tuple[str, Any]:
    """`weights.outliers=0` -> ("weights.outliers", 0). The value is JSON where it parses, else the bare word."""
    key, separator, value = (part.strip() for part in text.partition("="))
    if not separator or not key:
        raise RecipeError(f"option {text!r} is not of the form key=value, for example weights.outliers=0")
    if value in ("none", "off") and key in ("kv", "activations"):
        return key, None
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def outlier_count(columns: int, asked: OutlierCount) -> int:
    """Number of int8 input channels of a linear with `columns` inputs.

    `auto` keeps the paper's share: columns / 32 rounded to a multiple of 16, at least 16, at most half of the columns.
    Raises RecipeError when more than `columns - 1` are asked for.
    """
    if asked == "auto":
        return min(max(16, int(columns / 32 / 16 + 0.5) * 16), columns // 2)
    if asked >= columns:
        raise RecipeError(
            f"weights.outliers = {asked} leaves nothing to quantize in a layer with {columns} inputs;"
            f" write a number below {columns} or 'auto'"
        )
    return asked


PRESETS: dict[str, Recipe] = {
    "bwa": Recipe(name="bwa"),
    "rtn": Recipe(name="rtn", weights=WeightRecipe(method="rtn", levels="uniform", feedback="none", importance="none")),
    # Weights alone, in the order of the model, as the paper and its code by default.
    "gptq": Recipe(
        name="gptq",
        weights=WeightRecipe(
            method="gptq",
            bits=4,
            levels="uniform",
            feedback="column",
            importance="none",
            order="none",
            outliers=0,
        ),
        activations=None,
        kv=None,
    ),
    # W4A4KV4, GPTQ on round-to-nearest grids; groups of 128 for weights and activations, both asymmetric.
    "quarot": Recipe(
        name="quarot",
        weights=WeightRecipe(
            method="gptq",
            bits=4,
            levels="uniform",
            feedback="column",
            importance="none",
            order="none",
            outliers=0,
        ),
        transform=TransformRecipe(rotation="quarot"),
        activations=ActivationRecipe(balance="none", clip=0.9),
        kv=KVRecipe(hadamard=True),
    ),
    # Weights alone, as the paper: 32 groups a matrix. What moves channels or reads a Hessian is off.
    "wgm": Recipe(
        name="wgm",
        weights=WeightRecipe(
            method="wgm",
            bits=6,
            levels="windowed",
            feedback="none",
            importance="none",
            order="none",
            outliers=0,
        ),
        activations=None,
        kv=None,
    ),
}


def preset(name: str) -> Recipe:
    """The recipe of that name. Raises RecipeError that lists the presets."""
    if name not in PRESETS:
        raise RecipeError(f"there is no preset {name!r}; the presets are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def _unknown(key: str, node: Mapping[str, Any], word: str) -> str:
    close = difflib.get_close_matches(word, list(node), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the keys there are {', '.join(node)}"
    return f"there is no key {key!r}; {hint}"


def _explain(error: ValidationError) -> str:
    """The first problem of a pydantic report in one sentence, in this project's words."""
    problems = error.errors()
    problem = problems[0]
    where = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, leaf = [str(part) for part in problem["loc"]]
        return _unknown(where, _fields(parents), leaf)
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    if problem["type"] == "model_type":
        keys = ", ".join(_fields([str(part) for part in problem["loc"]]))
        return f"{where} = {problem['input']!r}: input should be an object with the keys {keys}"
    # Of a choice, such as 'auto' or a number, each alternative is a problem of its own.
    choices = [other["msg"].lower() for other in problems if _place(other["loc"]) == where]
    rest = "".join(f" or {choice.removeprefix('input should be ')}" for choice in choices[1:])
    return f"{where} = {problem['input']!r}: {choices[0]}{rest}"


def _place(loc: tuple[int | str, ...]) -> str:
    """The dotted key of a place in a pydantic report."""
    return ".".join(str(part) for part in loc if part not in ("int", "literal['auto']")) or "recipe"


def _fields(parents: list[str]) -> Mapping[str, Any]:
    """The fields of the part of a recipe that stands under these keys."""
    fields: Any = Recipe.model_fields
    for parent in parents:
        annotation = fields[parent].annotation
        part = next(p for p in (annotation, *getattr(annotation, "__args__", ())) if hasattr(p, "model_fields"))
        fields = part.model_fields
    return fields
