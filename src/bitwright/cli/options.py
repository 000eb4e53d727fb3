"""Options that several commands have, each described once."""

from __future__ import annotations

from typing import Annotated

import typer

ModelOrArtifact = Annotated[str, typer.Argument(help="model or artifact directory")]
Preset = Annotated[
    str | None,
    typer.Option(help="recipe by name: bitwright (default), bwa, rtn, gptq, atom, quarot, gbs, billm, wgm"),
]
RecipeFile = Annotated[str | None, typer.Option(help="recipe from a JSON file instead")]
Set = Annotated[list[str], typer.Option("--set", help="recipe option key=value, e.g. weights.feedback=column")]
Outliers = Annotated[str | None, typer.Option(help="int8 channels: a number or 'auto'")]
TargetBits = Annotated[
    float | None, typer.Option(help="honest bits a weight for all linears together, shared out by what the loss feels")
]
Threads = Annotated[int | None, typer.Option(min=1, help="threads; the result does not depend on them")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Join = Annotated[str, typer.Option(help="join the text's lines first: none, space (the papers' PTB), blank-line")]
Window = Annotated[int | None, typer.Option(min=2, help="tokens a window; default 2048 or the model's context")]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="at most so many windows")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="nucleus of the distribution to sample from")]
Seed = Annotated[int, typer.Option(min=0, help="seed of the sampling")]
