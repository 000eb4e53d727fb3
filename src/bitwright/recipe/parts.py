"""The parts of a recipe: each a set of choices with their bounds, held together by validators.

Parts are immutable and refuse unknown keys; a description says what the choices mean where the name does not.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bitwright.errors import RecipeError

OutlierCount = Literal["auto"] | int
Choice = TypeVar("Choice")


def _several(value: object) -> object:
    """A list, as JSON has it, or one choice by itself."""
    return (value,) if isinstance(value, (int, str)) else tuple(value) if isinstance(value, list) else value


Choices = Annotated[tuple[Choice, ...], BeforeValidator(_several)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightRecipe(Part):
    """How the weights of a linear layer become codes, levels and int8 outlier columns (BWA, sections 2.1 to 2.3)."""

    method: Literal["bwa", "rtn", "gptq", "wgm", "billm"] = "bwa"
    bits: int = Field(
        2, ge=1, le=8, description="bits of a code; 2 is the paper's 1+1; above 4 for wgm and uniform levels"
    )
    group: int = Field(128, ge=0, le=4096, description="input channels that share a codebook; 0: a whole row")
    levels: Literal["em", "dp", "minmax", "uniform", "windowed", "greedy", "split"] = Field(
        "em",
        description="em: weighted Lloyd iterations (paper); dp: the exact optimum; minmax: equally spaced between the"
        " extremes of the group; uniform: round-to-nearest grid with a zero point; windowed, greedy: neighbouring"
        " magnitudes of the whole matrix merged (WGM algorithms 3 and 2), with dp the choices of method wgm; split: two"
        " signed magnitudes on either side of a break point, two in sum in salient columns (method billm)",
    )
    em_iterations: int = Field(20, ge=1, le=1000)
    window: int = Field(512, ge=1, description="sorted magnitudes that merging starts from, levels = windowed")
    penalty: float = Field(
        0.75, ge=0.0, allow_inf_nan=False, description="lambda of WGM: a group of m weights costs penalty / m more"
    )
    symmetric: bool = Field(False, description="levels = uniform: the range is -max..max, and no zero point is stored")
    scale: Literal["span", "max"] = Field(
        "span",
        description="symmetric: span: 2 max / (2**bits - 1), the levels span the range (GPTQ, Atom); max:"
        " max / (2**(bits - 1) - 1), the largest magnitude is a level (QuaRot)",
    )
    range: Literal["minmax", "mse"] = Field(
        "minmax", description="levels = uniform: the grid spans the extremes, or the share of them that errs least"
    )
    clip: float = Field(
        1.0, gt=0.0, le=1.0, description="levels = uniform: share of the range that the grid spans; 1 with range = mse"
    )
    rows_a_scale: int = Field(
        1, ge=1, le=2, description="symmetric: rows next to each other whose grid is found together (Atom: 2)"
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
    damping_over: Literal["all", "normal"] = Field(
        "all", description="input channels that this mean is taken over; normal: without the int8 ones, however large"
    )

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
        splits = self.levels == "split" and self.feedback != "column"
        if self.method == "billm" and not (splits and self.bits == 2):
            raise ValueError(
                f"method 'billm' has no levels = '{self.levels}' with feedback = '{self.feedback}'"
                f" and bits = {self.bits}; write levels = 'split', bits = 2"
                " and feedback = 'block-diag', 'block-tri' or 'none'"
            )
        if self.method != "billm" and self.levels == "split":
            raise ValueError("levels = 'split' is for method 'billm' alone; write levels = 'em' or 'dp'")
        if self.method != "wgm" and merging:
            raise ValueError(f"levels = '{self.levels}' is for method 'wgm' alone; write levels = 'em' or 'dp'")
        if self.method != "wgm" and self.levels != "uniform" and self.bits > 4:
            raise ValueError(
                f"bits = {self.bits} is for method 'wgm' and levels = 'uniform' alone; write a number from 1 to 4"
            )
        if self.levels != "uniform" and (self.symmetric or self.range != "minmax" or self.clip != 1.0):
            key = "symmetric" if self.symmetric else "range" if self.range != "minmax" else "clip"
            raise ValueError(f"{key} is for levels = 'uniform' alone; leave it out with levels = '{self.levels}'")
        if self.clip != 1.0 and self.range != "minmax":
            raise ValueError(f"clip = {self.clip} is what range = '{self.range}' searches for; write clip = 1")
        if self.rows_a_scale != 1 and self.kind != "symmetric":
            raise ValueError(
                f"rows_a_scale = {self.rows_a_scale} is for levels = 'uniform' with symmetric = true alone;"
                " write rows_a_scale = 1"
            )
        if self.scale != "span" and (self.kind != "symmetric" or self.bits == 1):
            raise ValueError(
                f"scale = '{self.scale}' is for levels = 'uniform' with symmetric = true and 2 bits or more;"
                " write scale = 'span'"
            )
        if self.refine and self.kind != "free":
            raise ValueError(f"refine needs free levels; write refine = 0 with levels = '{self.levels}'")
        return self

    @property
    def kind(self) -> Literal["free", "uniform", "symmetric", "shared", "salient"]:
        """The kind of codebook that this makes (bitwright.codebook)."""
        if self.method == "wgm":
            return "shared"
        if self.method == "billm":
            return "salient"
        if self.levels != "uniform":
            return "free"
        return "symmetric" if self.symmetric else "uniform"

    def group_of(self, normal: int) -> int:
        """Input channels that share a codebook in a linear with `normal` normal ones: a multiple of 8."""
        return self.group or (normal + 7) // 8 * 8


class SiteRecipe(Part):
    """What the inputs of some linears, and their weights, have otherwise than `weights` says; None: the same."""

    bits: int | None = Field(None, ge=1, le=8)
    group: int | None = Field(None, ge=0, le=4096)
    outliers: OutlierCount | None = None


class TransformRecipe(Part):
    """What is done to the inputs of sites beside their order, and undone in their weights (docs/transforms.md)."""

    hadamard: Literal["none", "group"] = Field(
        "none", description="group: each group of normal channels, after the order, times its Hadamard matrix"
    )
    rotation: Literal["none", "quarot"] = Field(
        "none", description="quarot: residual stream, heads and the inputs of the last products in a Hadamard basis"
    )
    seed: int = Field(0, ge=0, description="of the random signs of a rotation")
    expansion: Literal["none", "hadamard", "power"] = Field(
        "none",
        description="width and intermediate size filled up with zeros: to the next that has a Hadamard matrix, or to a"
        " power of two (GBS)",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> TransformRecipe:
        if self.expansion != "none" and self.rotation == "none":
            raise ValueError(
                f"expansion = '{self.expansion}' is for rotations; write rotation = 'quarot' or expansion = 'none'"
            )
        if self.rotation != "none" and self.hadamard != "none":
            raise ValueError("a rotation has transforms of its own; write hadamard = 'none' or rotation = 'none'")
        return self


class ActivationRecipe(Part):
    """The dynamic quantizer of a site's input, one scale and zero point a token and group (BWA, eq. 3, 4, 10)."""

    bits: int = Field(4, ge=1, le=8, description="of a channel's code; 4 is the paper's 4x1")
    balance: Literal["support", "literal", "none"] = Field(
        "support", description="free plane scales: averaged over the plane's support, over all positions, or not at all"
    )
    clip: float = Field(1.0, gt=0.0, le=1.0, description="share of the range min..max that the codes span")
    symmetric: bool = Field(False, description="the range is -max..max of the magnitudes, without a zero point (Atom)")

    @model_validator(mode="after")
    def _goes_together(self) -> ActivationRecipe:
        if self.bits != 4 and self.balance != "none":
            raise ValueError(f"balance is defined for 4 planes only; write balance = 'none' with bits = {self.bits}")
        if self.symmetric and self.balance != "none":
            raise ValueError("balance is for codes with a zero point; write balance = 'none' with symmetric = true")
        if self.symmetric and self.bits == 1:
            raise ValueError("one bit has no codes around 0; write symmetric = false with bits = 1")
        return self


class KVRecipe(Part):
    """The key-value cache: asymmetric, one scale and minimum a token and head."""

    bits: int = Field(4, ge=2, le=8)
    hadamard: bool = Field(False, description="keys are cached times a Hadamard matrix, after RoPE (QuaRot)")
    clip: float = Field(1.0, gt=0.0, le=1.0, description="share of the range min..max that the codes span")


class SearchRecipe(Part):
    """A search for clip ratios of activations, a site, and of the cache, a layer, once all weights are solved (GBS)."""

    method: Literal["none", "gbs", "golden", "grid", "global", "ambiguous"] = Field(
        "none",
        description="gbs: the paper's alternating halving; golden: golden section; grid: 16 ratios from 1 down to 0.25;"
        " global: one of five ratios for everything; ambiguous: by the output's error, and by perplexity where that"
        " leaves several ratios open",
    )
    objective: Literal["perplexity", "output"] = Field(
        "perplexity",
        description="perplexity of the model so far, or the error of what a site's linears and a layer's cache make",
    )
    iterations: int = Field(10, ge=1, le=100, description="of gbs and golden: evaluations behind the first one")
    share: float = Field(0.1, gt=0.0, le=1.0, description="of the calibration text's tokens, from its start")

    @model_validator(mode="after")
    def _goes_together(self) -> SearchRecipe:
        if self.method == "global" and self.objective != "perplexity":
            raise ValueError("method 'global' goes by perplexity alone; write objective = 'perplexity'")
        if self.method == "ambiguous" and self.objective != "perplexity":
            raise ValueError(
                "method 'ambiguous' asks for the output's error first and for perplexity where that does not decide;"
                " write objective = 'perplexity', or method = 'grid' to go by the output alone"
            )
        return self


class CalibrationRecipe(Part):
    """Random segments of the calibration text (GPTQ's protocol)."""

    sequences: int = Field(128, ge=1)
    length: Literal["auto"] | int = Field("auto", description="tokens a segment; auto: 2048 or the model's context")
    seed: int = Field(0, ge=0)
    reforward: bool = Field(
        False,
        description="solve the sites of a block one after the other, each on inputs that the solved ones before gave",
    )
    quantizers: bool = Field(
        True,
        description="inputs of sites, keys and values are quantized while weights are solved, too; false: only in use"
        " (QuaRot)",
    )
    asymmetry: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="how far the target goes from the weights to those that turn the quantized inputs into the outputs"
        " of the full-precision model (GPTAQ)",
    )
    residual: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="how far linears that write to the residual stream make up for what it has strayed from that of the"
        " full-precision model",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> CalibrationRecipe:
        if isinstance(self.length, int) and self.length < 8:
            raise ValueError(f"length = {self.length} is too short to say anything; write 8 or more")
        return self


class OuterRecipe(Part):
    """What stands outside the blocks: embedding and output head, symmetric, rounded to nearest (bitwright.outer)."""

    embedding: Literal[16, 8, 4] = Field(16, description="bits of a weight; 16 keeps the matrix as it is")
    head: Literal[16, 8, 4] = Field(16, description="as embedding; equal to it where the model ties the two")
    group: int = Field(128, ge=8, le=4096, description="columns of a row that share a scale")

    @model_validator(mode="after")
    def _goes_together(self) -> OuterRecipe:
        if self.group % 8:
            raise ValueError(f"group = {self.group} is not a multiple of 8; write for example 64 or 128")
        return self


class TuneRecipe(Part):
    """After all blocks are solved, Adam on what is stored in real numbers, by the logits (docs/tuning.md).

    Rates are what a step of Adam moves at first: a share of the largest level of a group, of the largest int8 weight of
    a row, of the mean norm weight. They fall to 0 along a cosine. A rate of 0 leaves that part as it is.
    """

    steps: int = Field(64, ge=1, le=100_000, description="steps of Adam")
    batch: int = Field(4, ge=1, le=1024, description="calibration sequences a step")
    levels: float = Field(1.5e-3, ge=0.0, le=1.0, description="rate of levels and scales")
    outliers: float = Field(1.5e-3, ge=0.0, le=1.0, description="rate of the int8 columns")
    vectors: float = Field(1.5e-3, ge=0.0, le=1.0, description="rate of norms and biases")
    codes: float = Field(0.0, ge=0.0, le=1.0, description="rate of the weights that codes are the nearest levels of")
    held_back: float = Field(
        0.125, gt=0.0, le=0.5, description="share of the calibration sequences that only judge; the best state is kept"
    )
    interval: int = Field(8, ge=1, description="steps between two judgements; a run that was killed goes on from one")
    patience: int = Field(
        4, ge=1, description="judgements in sequence that are no better than the best end the tuning's second half"
    )
    seed: int = Field(0, ge=0, description="of the order of the sequences")


class AllocateRecipe(Part):
    """Before anything is solved: ways to store each site, chosen by what the loss feels of them (docs/allocation.md).

    The candidates are all combinations of `bits`, `groups` and `outliers`, and what `weights` says.
    """

    target: Literal["auto"] | float = Field(
        "auto",
        description="honest bits a weight that all quantized linears together may take; auto: as many as without this",
    )
    bits: Choices[Annotated[int, Field(ge=1, le=8)]] = Field((2, 3, 4), min_length=1)
    groups: Choices[Annotated[int, Field(ge=0, le=4096)]] | None = Field(
        None, min_length=1, description="none: that of weights alone"
    )
    outliers: Choices[OutlierCount] | None = Field(None, min_length=1, description="none: 0 and that of weights")
    tokens: int = Field(8192, ge=8, description="of the calibration's first sequences, that it is measured on")
    rows: int = Field(128, ge=1, description="of each linear, solved for each candidate")

    @model_validator(mode="after")
    def _goes_together(self) -> AllocateRecipe:
        if self.target != "auto" and not 0 < self.target <= 16:
            raise ValueError(f"target = {self.target} is no number of bits a weight; write for example 2.5, or 'auto'")
        return self


def outlier_count(columns: int, asked: OutlierCount) -> int:
    """Number of int8 input channels of a linear with `columns` inputs.

    `auto` keeps the paper's share: columns / 32 rounded to a multiple of 16, at least 16, at most half of the columns.
    Raises RecipeError when more than `columns - 1` are asked for.
    """
    if asked == "auto":
        return min(max(16, int(columns / 32 / 16 + 0.5) * 16), columns // 2)
    if asked >= columns:
        raise RecipeError(
            f"outliers = {asked} leaves nothing to quantize in a layer with {columns} inputs;"
            f" write a number below {columns} or 'auto'"
        )
    return asked
