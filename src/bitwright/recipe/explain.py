"""What is wrong with a recipe, in one sentence that names the key, what was found and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


def unknown_key(key: str, node: Mapping[str, Any], word: str) -> str:
    """A sentence on a key that is not there, with the nearest that is."""
    close = difflib.get_close_matches(word, list(node), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the keys there are {', '.join(node)}"
    return f"there is no key {key!r}; {hint}"


def explain(error: ValidationError, recipe: type[BaseModel]) -> str:
    """The first problem of a pydantic report in one sentence, in this project's words."""
    problems = error.errors()
    problem = problems[0]
    where = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, leaf = [str(part) for part in problem["loc"]]
        return unknown_key(where, _fields(recipe, parents), leaf)
    if problem["type"] == "value_error":
        return ": ".join(part for part in (where, str(problem["ctx"]["error"])) if part)
    if problem["type"] == "model_type":
        keys = ", ".join(_fields(recipe, [str(part) for part in problem["loc"]]))
        return f"{where} = {problem['input']!r}: input should be an object with the keys {keys}"
    # Of a choice, such as 'auto' or a number, each alternative is a problem of its own.
    choices = [other["msg"].lower() for other in problems if _place(other["loc"]) == where]
    rest = "".join(f" or {choice.removeprefix('input should be ')}" for choice in choices[1:])
    return f"{where} = {problem['input']!r}: {choices[0]}{rest}"


def _place(loc: tuple[int | str, ...]) -> str:
    """The dotted key of a place in a pydantic report; empty for the whole recipe."""
    return ".".join(str(part) for part in loc if part not in ("int", "float", "literal['auto']"))


def _fields(recipe: type[BaseModel], parents: list[str]) -> Mapping[str, Any]:
    """The fields of the part of a recipe that stands under these keys."""
    fields: Any = recipe.model_fields
    rest = iter(parents)
    for parent in rest:
        annotation = fields[parent].annotation
        part = next(p for p in (annotation, *get_args(annotation)) if hasattr(p, "model_fields"))
        fields = part.model_fields
        if get_origin(annotation) is dict:
            next(rest, None)  # a key of the user's own, such as a pattern of `sites`
    return fields
