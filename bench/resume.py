"""Kill -9 a quantization at random moments and let it resume.

    python bench/resume.py [--kills 100] [--seed 0] [--tune]

The demo model is quantized once unbroken. Then runs are killed at random moments, started again and killed again until
one gets through; its directory must equal the unbroken one byte for byte. Ends after --kills kills survived.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path


def quantize(output: str, sequences: int, tune: bool) -> None:
    """One run, in a process of its own."""
    import bitwright
    from bitwright.calibration import text_of
    from bitwright.demo.corpus import calibration_text
    from bitwright.demo.run import MODEL

    recipe = bitwright.preset("bwa").with_options({"calibration.sequences": sequences, "calibration.length": 256})
    if tune:
        recipe = recipe.with_options({"tune": {"steps": 6, "interval": 2}})
    bitwright.quantize(MODEL, output, recipe, text_of("calibration", calibration_text()))


def digest(directory: Path) -> str:
    """sha256 over the names and contents of all files of a directory."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tune", action="store_true", help="tune the model, too")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitwright.pipeline", "transformers.models.llama.modeling_llama"])

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=quantize, args=(str(output), arguments.sequences, arguments.tune))
        process.start()
        return process

    with tempfile.TemporaryDirectory(prefix="bitwright-resume-") as scratch:
        whole = Path(scratch) / "whole"
        start(whole).join()  # the fork server imports torch here; the next run is timed
        shutil.rmtree(whole)
        began = time.monotonic()
        start(whole).join()
        full = time.monotonic() - began
        expected = digest(whole)
        print(f"unbroken run: {full:.1f} s, sha256 {expected}", flush=True)
        kills = chains = resumed = 0
        while kills < arguments.kills:
            output = Path(scratch) / f"broken-{chains}"
            while True:
                process = start(output)
                process.join(generator.uniform(0.0, full))
                if process.exitcode is not None:
                    break
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
                resumed += (output.with_name(output.name + ".run") / "run.json").exists()
            if process.exitcode != 0 or digest(output) != expected:
                raise SystemExit(f"chain {chains}: exit code {process.exitcode}, the artifact is lost or differs")
            leftovers = [path.name for path in Path(scratch).iterdir() if path.name.startswith(f"{output.name}.run")]
            if leftovers:
                raise SystemExit(f"chain {chains} left {leftovers} behind")
            shutil.rmtree(output)
            chains += 1
            print(
                f"{kills} kills survived ({resumed} with blocks to resume from), {chains} artifacts, all equal",
                flush=True,
            )


if __name__ == "__main__":
    main()
