"""The native kernels (csrc/): found and chosen once, or reported missing once.

`BITWRIGHT_ISA` overrides the choice: a variant's name (`avx512`, `avx2`, `neon`, `scalar`), or `reference` for the
torch code that is always there.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any

from bitwright.errors import BitwrightError

VARIABLE = "BITWRIGHT_ISA"
REFERENCE = "reference"


@cache
def native() -> Any:
    """The module of native kernels with the asked-for variant chosen, or None for the reference backend.

    Raises BitwrightError when BITWRIGHT_ISA names what this build or processor does not have.
    """
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if asked == REFERENCE:
        return None
    module = find()
    if module is None:
        if asked:
            raise BitwrightError(f"{VARIABLE}={asked} was asked for, but {missing()}")
        warnings.warn(f"{missing()}; running on the slow reference backend", stacklevel=3)
        return None
    if asked:
        choose(module, asked)
    return module


def find() -> ModuleType | None:
    """The compiled module, whatever BITWRIGHT_ISA says; None where the package was built without one."""
    try:
        from bitwright import _native
    except ImportError:
        return None
    return _native


def choose(module: Any, name: str) -> None:
    """Make `name` the variant that all ops run."""
    known = dict(module.variants())
    if name not in known:
        raise BitwrightError(
            f"{VARIABLE}={name} is no variant of this build; it has {', '.join(known)} and {REFERENCE}"
        )
    if not known[name]:
        usable = ", ".join(variant for variant, runs in known.items() if runs)
        raise BitwrightError(f"{VARIABLE}={name} cannot run on this processor; it runs {usable} and {REFERENCE}")
    module.choose(name)


def missing() -> str:
    """Why there are no native kernels, and what to do."""
    return (
        "bitwright was installed without its native kernels (a C++ compiler and cmake were missing, or the build"
        " failed); install them and run: pip install --force-reinstall --no-deps bitwright"
    )
