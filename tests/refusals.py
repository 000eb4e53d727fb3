"""What the tests of bad input share: the ground that cases build on, cases by their names, and what a refusal is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import support

Arguments = list[str | Path]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class Ground:
    """What the cases build on: whole things to copy, and a folder to damage them in."""

    tmp: Path
    models: dict[str, Path]
    artifact: Callable[..., Path]
    calib: Path

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def model(self, name: str = "llama") -> Path:
        return Path(shutil.copytree(self.models[name], self.tmp / "model"))

    def quantized(self) -> Path:
        return Path(shutil.copytree(self.artifact(), self.tmp / "artifact"))

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.tmp / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def quantize(self, model: Path | str | None = None, *extra: str | Path, calib: Path | None = None) -> Arguments:
        small = ["--sequences", "2", "--length", "32"]
        return ["quantize", model or self.models["llama"], self.out, "--calib", calib or self.calib, *small, *extra]

    def generate(self, directory: Path, prompt: str = "Ba ren.", *extra: str | Path) -> Arguments:
        return ["generate", directory, prompt, "--max-new-tokens", "2", *extra]


Prepare = Callable[[Ground], Arguments]


class Case(NamedTuple):
    """A command that must be refused with all `words` in its message."""

    name: str
    prepare: Prepare
    words: tuple[str, ...]


class Cases(list[Case]):
    """The cases of one file of tests."""

    def __call__(self, name: str, *words: str) -> Callable[[Prepare], Prepare]:
        """Register a case: `words` must all stand in the message."""
        assert name not in self.names

        def register(prepare: Prepare) -> Prepare:
            self.append(Case(name, prepare, words))
            return prepare

        return register

    @property
    def names(self) -> list[str]:
        return [case.name for case in self]


def check_refusal(outcome: support.Outcome, *words: str) -> str:
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.err
    message = outcome.message
    assert message == message.strip() != ""
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


def check_case(bad: Case, ground: Ground) -> None:
    """One line that names the thing, and nothing afterwards that looks whole."""
    arguments = bad.prepare(ground)
    before = _whole_looking(ground.tmp)
    outcome = support.run_cli(*arguments)
    message = check_refusal(outcome, *bad.words)
    print(f"\n{bad.name}: {message}".replace(str(ground.tmp), "TMP"))
    assert not ground.out.exists()
    assert _whole_looking(ground.tmp) == before


def _whole_looking(folder: Path) -> set[Path]:
    return {path.parent for path in folder.rglob("*.json") if path.name == "bitwright_manifest.json"}
