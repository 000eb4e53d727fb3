"""The command line: one file a command; parses, calls the API, prints."""

from __future__ import annotations

import os
import sys

import typer

from bitwright import __version__
from bitwright.cli import bench, chat, compare, demo, doctor, evaluate, generate, plan, quantize, report, verify
from bitwright.errors import BitwrightError

app = typer.Typer(
    name="bitwright",
    help="Language models in 1+1-bit weights and 4x1-bit activations, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.command)
app.command("plan")(plan.command)
app.command("quantize")(quantize.command)
app.command("verify")(verify.command)
app.command("eval")(evaluate.command)
app.command("compare")(compare.command)
app.command("report")(report.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("doctor")(doctor.command)
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        print(f"bitwright {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    # Everything is local: a name that is not a directory must not turn into a look at the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Entry point. A user's mistake ends in one line and exit code 1; only defects show a traceback."""
    try:
        app()
    except BitwrightError as error:
        _fail(str(error))
    except SystemExit as stop:
        # typer turns an interrupt from the keyboard into this code and says nothing.
        if stop.code == 130:
            goes_on = any(word in sys.argv[1:2] for word in ("quantize", "compare"))
            _fail("interrupted" + ("; the same command goes on where it stopped" if goes_on else ""), 130)
        raise
    except MemoryError as error:
        _fail(f"out of memory: {error or 'see the peak memory that `bitwright plan` prints'}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        _fail("out of memory: `bitwright plan` prints the peak memory that a run needs")


def _fail(message: str, code: int = 1) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
