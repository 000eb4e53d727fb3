"""The run's directory: where a run keeps what it has, so that it can be killed at any moment and go on.

Beside OUT stands OUT.run with a lock, the streams between two blocks, the shards written so far, and run.json, which
names them with their sha256. Everything is written under a temporary name, synced and renamed, and run.json last: what
it names is whole, what it does not name is not there. At the end the artifact's directory is renamed to OUT.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitwright.artifact.shards import write_text
from bitwright.errors import RunError
from bitwright.models.checkpoint import read_json, sha256_file

STATE_NAME = "run.json"


@dataclass
class RunState:
    """What run.json holds. `completed` blocks are solved; `streams` are the inputs of the next block; `search` what is
    known of clip ratios, an entry each; `choosing` is what `allocate` has found out and kept so far (allocate.py),
    `allocation` what it came to.

    Where the recipe tunes: `solved` are the sha256 of the shards before it, `tuning` is tune.Progress, and `rewritten`
    blocks have gone into the artifact since it ended.
    """

    fingerprint: dict[str, Any]
    completed: int = 0
    streams: dict[str, str] = field(default_factory=dict)
    stream_sha256: dict[str, str] = field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
    choosing: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    solved: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    rewritten: int = 0

    def others(self) -> dict[str, str]:
        """sha256 of the files of an allocation and of a tuning, by name."""
        return {**self.choosing.get("files", {}), **self.solved, **self.tuning.get("files", {})}

    def files(self) -> set[str]:
        """Names of all files beside the artifact that the rest of the run needs."""
        return {*self.streams.values(), *self.others()}


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold `directory`, made where it is missing, for this process. Raises RunError where another one holds it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise RunError(f"cannot write to {directory}: {error.strerror}") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # pragma: no cover - not on this system
            pass
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise RunError(f"another run is at work in {directory}; wait for it or give another output") from None
            raise
        yield


class RunDirectory:
    """OUT.run. Raises RunError for what a user can mend."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".run")
        self.artifact = self.path / "artifact"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; a second run on the same output is refused."""
        if self.path.exists() and not self.is_ours():
            raise RunError(f"{self.path} exists and holds no run of bitwright; move it away or give another output")
        with exclusive(self.path):
            yield

    def is_ours(self) -> bool:
        """Whether the directory holds nothing but what runs leave there, and so may be cleaned."""
        known = ("lock", STATE_NAME, "artifact", "stream-", "search-", "solved-", "tune-", "allocate-")
        return self.path.is_dir() and all(path.name.startswith(known) for path in self.path.iterdir())

    def load(self) -> RunState | None:
        """The state of a broken-off run, None where there is none."""
        path = self.path / STATE_NAME
        if not path.exists():
            return None
        try:
            return RunState(**read_json(path, RunError))
        except TypeError:
            raise RunError(
                f"{path} was written by another version of bitwright; remove {self.path} to start again"
            ) from None

    def save(self, state: RunState) -> None:
        write_text(self.path / STATE_NAME, json.dumps(asdict(state), indent=1))

    def seal(self, state: RunState, **changes: Any) -> None:
        """Record the state with these fields changed in one step; then remove the files that it names no more."""
        before = state.files()
        for name, value in changes.items():
            setattr(state, name, value)
        self.save(state)
        for name in sorted(before - state.files()):
            (self.path / name).unlink()

    def check(self, state: RunState, fingerprint: dict[str, Any]) -> None:
        """Go on only with the same question, the same program and the bytes that were left. Raises RunError."""
        if state.fingerprint != fingerprint:
            differing = sorted(
                key for key in {*state.fingerprint, *fingerprint} if state.fingerprint.get(key) != fingerprint.get(key)
            )
            raise RunError(
                f"{self.path} holds an unfinished run that differs in {', '.join(differing)};"
                " repeat its own command to finish it, or add --restart to drop it"
            )
        for name, entry in state.shards.items():
            self._check_file(self.artifact / name, entry["sha256"])
        for role, digest in state.stream_sha256.items():
            self._check_file(self.path / state.streams[role], digest)
        for name, digest in state.others().items():
            self._check_file(self.path / name, digest)

    def _check_file(self, path: Path, sha256: str) -> None:
        if not path.exists():
            raise RunError(f"the unfinished run lacks {path}; add --restart to begin again")
        if sha256_file(path) != sha256:
            raise RunError(f"{path} has changed since the run wrote it; add --restart to begin again")

    def clean(self, state: RunState) -> None:
        """Remove what the state does not name: the rests of a block that was broken off."""
        keep = {STATE_NAME, "lock", "artifact", *state.files()}
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()
        for path in self.artifact.iterdir():
            if path.name not in state.shards:
                path.unlink()

    def restart(self) -> None:
        """Forget an unfinished run."""
        (self.path / STATE_NAME).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish(self) -> None:
        """The finished artifact gets its name in one step; the rest of the run goes."""
        os.replace(self.artifact, self.output)
        self.remove()

    def remove(self) -> None:
        (self.path / STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
