"""The loss curve: JSON lines that survive a resume, and a picture of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Curve:
    """Appends records to a JSON lines file; on resume, drops those that came after the checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [record for record in read(path) if record["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)

    def add(self, **record: Any) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a curve file; a last line cut off by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def draw(path: Path, picture: Path, title: str) -> None:
    """Training loss and held-out bits per byte against tokens seen, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read(path)
    train = [record for record in records if "loss" in record]
    held_out = [record for record in records if "bits_per_byte" in record]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot([r["tokens"] / 1e6 for r in train], [r["loss"] for r in train], linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", title=title)
    for name in sorted({name for record in held_out for name in record["bits_per_byte"]}):
        points = [(r["tokens"] / 1e6, r["bits_per_byte"][name]) for r in held_out if name in r["bits_per_byte"]]
        right.plot(*zip(*points, strict=True), marker=".", label=name)
    right.set(xlabel="million tokens", ylabel="bits a byte", title="held-out text")
    if held_out:
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
