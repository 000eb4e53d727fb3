"""What can go wrong by a user's doing. Each message says what was found, what was expected, and what to do."""

from __future__ import annotations


class BitwrightError(Exception):
    """Base of all errors that a user can act on; the command line prints its message alone, without a traceback."""


class RecipeError(BitwrightError):
    """A recipe asks for something that does not exist or does not go together."""


class ModelError(BitwrightError):
    """A model directory is missing, incomplete, damaged or of an architecture that is not supported."""


class TextError(BitwrightError):
    """A calibration or evaluation text is missing, empty, unreadable or too short."""


class ArtifactError(BitwrightError):
    """An artifact is missing, damaged, or written by a version that this one cannot read."""


class RunError(BitwrightError):
    """A quantization run cannot start, continue or write."""


class TransformError(BitwrightError):
    """A transform that a size does not allow."""
