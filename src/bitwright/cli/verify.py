"""bitwright verify: is every byte of an artifact as it was written?"""

from __future__ import annotations

import json

import typer

from bitwright.cli import console, options


def command(
    artifact: str = typer.Argument(..., help="artifact directory"),
    as_json: options.AsJson = False,
) -> None:
    """Compare every file with the manifest. Exit code 1 and a line for each problem where something differs."""
    from bitwright.artifact.manifest import read_manifest, verify

    manifest = read_manifest(artifact)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    read = 0
    with console.counting("verifying", total) as update:

        def on_bytes(count: int) -> None:
            nonlocal read
            read += count
            update(read)

        problems = verify(artifact, on_bytes)
    if as_json:
        found = [{"file": problem.file, "kind": problem.kind, "detail": problem.detail} for problem in problems]
        print(json.dumps({"ok": not problems, "files": len(manifest["files"]), "bytes": total, "problems": found}))
    elif problems:
        for problem in problems:
            console.out.print(str(problem), markup=False, soft_wrap=True)
    else:
        console.out.print(
            f"{artifact} is whole: {len(manifest['files'])} files, {total:,} bytes, all sha256 match",
            markup=False,
            soft_wrap=True,
        )
    if problems:
        raise typer.Exit(1)
