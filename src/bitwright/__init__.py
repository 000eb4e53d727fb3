"""bitwright: language models in 1+1-bit weights and 4x1-bit activations, without training.

The public API, nothing else. Importing it is light: torch and transformers are imported when they are first needed, and
the artifact format is registered with transformers at that moment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bitwright.artifact.manifest import verify
    from bitwright.errors import BitwrightError
    from bitwright.evaluation import evaluate, load
    from bitwright.pipeline.plan import plan
    from bitwright.pipeline.run import quantize
    from bitwright.recipe import PRESETS as presets
    from bitwright.recipe import Recipe, preset

__all__ = [
    "BitwrightError",
    "Recipe",
    "__version__",
    "evaluate",
    "load",
    "plan",
    "preset",
    "presets",
    "quantize",
    "verify",
]

_HOMES = {
    "BitwrightError": ("bitwright.errors", "BitwrightError"),
    "Recipe": ("bitwright.recipe", "Recipe"),
    "preset": ("bitwright.recipe", "preset"),
    "presets": ("bitwright.recipe", "PRESETS"),
    "evaluate": ("bitwright.evaluation", "evaluate"),
    "load": ("bitwright.evaluation", "load"),
    "plan": ("bitwright.pipeline", "plan"),
    "quantize": ("bitwright.pipeline", "quantize"),
    "verify": ("bitwright.artifact.manifest", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


@when_imported("transformers.modeling_utils")
def _register(_: Any) -> None:
    """Every way to load a model passes through that module; our method joins the table of quantizers right then."""
    import_module("bitwright.integrations.transformers")
