"""The demo's text: the language help that every Python carries in `pydoc_data.topics`, split by topic.

No text of anyone else has to live in this package, and no download is needed. Evaluation topics are held out whole;
paragraphs that also stand in one of them are dropped everywhere else, so nothing evaluated was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EVALUATION_TOPICS = frozenset(
    {
        "assignment",
        "augassign",
        "calls",
        "comparisons",
        "dynamic-features",
        "exceptions",
        "execmodel",
        "import",
        "in",
        "naming",
        "raise",
        "strings",
        "typesmapping",
    }
)
CALIBRATION_TOPICS = frozenset({"formatstrings", "objects", "specialnames", "string-methods", "types", "typesseq"})

# Shorter paragraphs (headings, "Changed in version 3.x") repeat by nature and give nothing away.
SHARED_PARAGRAPH_CHARS = 60

_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*?(?=[^\n]*\S)")


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError("the demo text needs pydoc_data.topics, which this Python was installed without") from error
    return topics


def normalise(paragraph: str) -> str:
    """One paragraph with every run of whitespace as one space: what two paragraphs are compared by."""
    return " ".join(paragraph.split())


def paragraphs(text: str) -> list[str]:
    """The non-empty paragraphs of `text`, indentation kept, in order."""
    found = (part.strip("\n").rstrip() for part in _BLANK_LINES.split(text.replace("\r\n", "\n")))
    return [part for part in found if part.strip()]


def evaluation_paragraphs() -> frozenset[str]:
    """The normalised paragraphs of the evaluation topics that no other text may contain."""
    topics = _topics()
    normalised = (normalise(part) for name in EVALUATION_TOPICS for part in paragraphs(topics.get(name, "")))
    return frozenset(part for part in normalised if len(part) > SHARED_PARAGRAPH_CHARS)


def _text(kind: str, names: Iterable[str], dropped: frozenset[str]) -> str:
    """The named topics in order of name, each paragraph once, without the `dropped` ones."""
    topics = _topics()
    seen: set[str] = set()
    kept: list[str] = []
    for name in sorted(names):
        for part in paragraphs(topics.get(name, "")):
            key = normalise(part)
            if key in seen or key in dropped:
                continue
            seen.add(key)
            kept.append(part)
    if not kept:
        raise RuntimeError(f"the demo's {kind} text is empty: this Python's pydoc_data.topics has none of its topics")
    return "\n\n".join(kept) + "\n"


def training_text() -> str:
    """Every topic that is not held out for evaluation (this contains the calibration text)."""
    return _text("training", set(_topics()) - EVALUATION_TOPICS, evaluation_paragraphs())


def calibration_text() -> str:
    """A fixed part of the training topics, to quantize with."""
    return _text("calibration", CALIBRATION_TOPICS, evaluation_paragraphs())


def evaluation_text() -> str:
    """The held-out topics, to measure perplexity on."""
    return _text("evaluation", EVALUATION_TOPICS, frozenset())
