"""The recipe: everything that was asked for, and nothing about the model it will be applied to.

A recipe is immutable, validated, and serialises to the same JSON bytes for equal content, so that it can be part of
the fingerprint of a run and of the artifact.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import Field, ValidationError, model_validator

from bitwright.errors import RecipeError
from bitwright.recipe.explain import explain, unknown_key
from bitwright.recipe.parts import (
    ActivationRecipe,
    AllocateRecipe,
    CalibrationRecipe,
    KVRecipe,
    OuterRecipe,
    Part,
    SearchRecipe,
    SiteRecipe,
    TransformRecipe,
    TuneRecipe,
    WeightRecipe,
)


class Recipe(Part):
    """A complete recipe. `activations = None` keeps 16-bit activations, `kv = None` a 16-bit cache."""

    name: str = "bwa"
    weights: WeightRecipe = WeightRecipe()
    transform: TransformRecipe = TransformRecipe()
    activations: ActivationRecipe | None = ActivationRecipe()
    kv: KVRecipe | None = KVRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    outer: OuterRecipe = OuterRecipe()
    search: SearchRecipe = SearchRecipe()
    sites: dict[str, SiteRecipe] = Field(
        default_factory=dict,
        description="what linears have otherwise than `weights`, by a pattern of their names; the longest that fits",
    )
    allocate: AllocateRecipe | None = None
    tune: TuneRecipe | None = None

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
        if self.search.method != "none" and self.activations is None and self.kv is None:
            raise ValueError(
                f"search.method = '{self.search.method}' has nothing to look for with activations and kv off;"
                " write search.method = 'none' or turn one of them on"
            )
        return self

    @model_validator(mode="after")
    def _sites_go_together(self) -> Recipe:
        for pattern, changes in self.sites.items():
            self._checked(f"sites '{pattern}'", changes)
        return self

    def _checked(self, key: str, changes: SiteRecipe) -> None:
        """Refuse what `weights` cannot be changed to."""
        try:
            weights = self._with(changes)
        except ValidationError as error:
            raise ValueError(f"{key}: {explain(error, WeightRecipe)}") from None
        if self.transform.rotation != "none" and weights.outliers != 0:
            raise ValueError(
                f"{key}: transform.rotation = '{self.transform.rotation}' leaves no channels to set aside;"
                " write outliers = 0"
            )

    @model_validator(mode="after")
    def _can_be_allocated(self) -> Recipe:
        if self.allocate is None:
            return self
        if self.weights.kind in ("shared", "salient"):
            raise ValueError(
                f"allocate chooses bits, groups and int8 channels, which method '{self.weights.method}' has ways of its"
                " own for; write allocate = none"
            )
        for candidate in self.candidates():
            self._checked("allocate", candidate)
        return self

    @model_validator(mode="after")
    def _can_be_tuned(self) -> Recipe:
        if self.tune is None:
            return self
        if self.weights.kind in ("shared", "salient"):
            what = "one table for a matrix" if self.weights.kind == "shared" else "two codebooks a group"
            raise ValueError(
                f"tune is for one codebook a row and group, and method '{self.weights.method}' has {what};"
                " write tune = none"
            )
        if self.weights.rows_a_scale != 1:
            raise ValueError(
                f"tune moves the scale of each row by itself, and weights.rows_a_scale = {self.weights.rows_a_scale};"
                " write tune = none or weights.rows_a_scale = 1"
            )
        if self.search.method != "none":
            raise ValueError(
                f"tune and search.method = '{self.search.method}' each start from the solved model;"
                " write tune = none or search.method = 'none'"
            )
        if self.tune.codes and self.weights.kind != "free":
            raise ValueError(
                f"tune.codes needs free levels; write tune.codes = 0 with levels = '{self.weights.levels}'"
            )
        if self.calibration.sequences < 2:
            raise ValueError("tune needs calibration.sequences of 2 or more: some are held back to judge")
        return self

    def _with(self, changes: SiteRecipe) -> WeightRecipe:
        return WeightRecipe.model_validate({**self.weights.model_dump(), **changes.model_dump(exclude_none=True)})

    def candidates(self) -> list[SiteRecipe]:
        """What `allocate` chooses from, what `weights` says among it."""
        assert self.allocate is not None
        weights, asked = self.weights, self.allocate
        groups = (weights.group,) if asked.groups is None else asked.groups
        outliers = (0, weights.outliers) if asked.outliers is None else asked.outliers
        combined = [*itertools.product(asked.bits, groups, outliers), (weights.bits, weights.group, weights.outliers)]
        return [SiteRecipe(bits=b, group=g, outliers=o) for b, g, o in dict.fromkeys(combined)]

    def settled(self, sites: Mapping[str, SiteRecipe]) -> Recipe:
        """The recipe with nothing left to choose: `sites` as well as its own."""
        return self.model_copy(update={"sites": {**sites, **self.sites}, "allocate": None})

    def pattern_of(self, linears: Iterable[str]) -> str | None:
        """The key of `sites` that is for linears with these full names, which share an input: the longest that fits
        one of them, of equally long ones the first in the alphabet; None where none does."""
        names = list(linears)
        fitting = [pattern for pattern in self.sites if any(fnmatchcase(name, pattern) for name in names)]
        return min(fitting, key=lambda pattern: (-len(pattern), pattern), default=None)

    def weights_at(self, linears: Iterable[str]) -> WeightRecipe:
        """`weights` with what `sites` says of the linears with these full names, which share an input."""
        pattern = self.pattern_of(linears)
        return self.weights if pattern is None else self._with(self.sites[pattern])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it. What came later is left out where it does nothing: artifacts without it read as ever."""
        data = self.model_dump(mode="json")
        if self.outer.embedding == self.outer.head == 16:
            del data["outer"]
        if not self.sites:
            del data["sites"]
        if self.weights.clip == 1.0:
            del data["weights"]["clip"]
        if self.weights.scale == "span":
            del data["weights"]["scale"]
        if self.calibration.quantizers:
            del data["calibration"]["quantizers"]
        if self.weights.rows_a_scale == 1:
            del data["weights"]["rows_a_scale"]
        if self.weights.damping_over == "all":
            del data["weights"]["damping_over"]
        if self.activations is not None and not self.activations.symmetric:
            del data["activations"]["symmetric"]
        if self.calibration.residual == 0.0:
            del data["calibration"]["residual"]
        if self.search.method == "none":
            del data["search"]
        if self.allocate is None:
            del data["allocate"]
        if self.transform.expansion == "none":
            del data["transform"]["expansion"]
        if self.kv is not None and self.kv.clip == 1.0:
            del data["kv"]["clip"]
        if self.tune is None:
            del data["tune"]
        return data

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """Canonical JSON: the same bytes for equal recipes."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Validate `data`. Raises RecipeError that names the key, what was found and what to write instead."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(f"{source}: {explain(error, cls)}") from None

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

    def changed_from(self, other: Recipe) -> dict[str, Any]:
        """The options that make this recipe of `other`, beside its name: `other.with_options(...)` is equal to it."""
        found: dict[str, Any] = {}
        before = other.model_dump(mode="json")
        for key, value in self.model_dump(mode="json", exclude={"name"}).items():
            if value == before[key]:
                continue
            if key == "sites" or value is None:
                found[key] = value
            elif before[key] is None:
                usual = _usual(key)
                found[key] = {leaf: chosen for leaf, chosen in value.items() if chosen != usual[leaf]}
            else:
                changed = {leaf: chosen for leaf, chosen in value.items() if chosen != before[key][leaf]}
                found.update({f"{key}.{leaf}": chosen for leaf, chosen in changed.items()})
        return found

    def with_options(self, options: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced: `{"weights.outliers": 0, "kv": None, "tune": {"steps": 8}}`.

        A later key may reach into what an earlier one sets.
        """
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
                    raise RecipeError(f"recipe: {unknown_key(key, node, parent)}")
                node = child
            if leaf not in node:
                raise RecipeError(f"recipe: {unknown_key(key, node, leaf)}")
            filled = {**_usual(key), **value} if isinstance(value, dict) else value
            node[leaf] = copy.deepcopy(filled)
        return Recipe.from_dict(data)


def _usual(key: str) -> dict[str, Any]:
    """What a part of the recipe has where nothing else is said; nothing for a key that is no part."""
    field = Recipe.model_fields.get(key)
    choices = () if field is None or get_origin(field.annotation) is dict else get_args(field.annotation)
    for part in (field.annotation if field else None, *choices):
        if isinstance(part, type) and issubclass(part, Part):
            return part().model_dump(mode="json")
    return {}


def parse_option(text: str) -> tuple[str, Any]:
    """`weights.outliers=0` -> ("weights.outliers", 0). The value is JSON where it parses, else the bare word."""
    key, separator, value = (part.strip() for part in text.partition("="))
    if not separator or not key:
        raise RecipeError(f"option {text!r} is not of the form key=value, for example weights.outliers=0")
    if value in ("none", "off") and key in ("kv", "activations", "tune", "allocate"):
        return key, None
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
