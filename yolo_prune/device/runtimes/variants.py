"""How an artefact shall run where its runtime has several ways: `slim.onnx@cuda`, `slim.pt@cuda+half`."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Protocol, Sequence

from yolo_prune.device.runtimes.base import Runtime
from yolo_prune.errors import ConfigError

_ENDINGS = (".onnx", ".pt", ".engine", "_model")  # of artefacts: no word of a variant ends like that


class Chooser(Protocol):
    """Chooses what runs an artefact."""

    def __call__(self, artefact: Path, *, variant: Sequence[str] = ()) -> Runtime:
        """Return the runtime; the words of the variant say how it shall run."""
        ...


def split_variant(text: str) -> tuple[Path, tuple[str, ...]]:
    """Read `PATH` or `PATH@WORD+WORD`; a file whose own name holds an @ is taken as it is, be it there or not.

    Returns:
        The path, and the words in their order.
    """
    path, at, words = text.rpartition("@")
    if not at or Path(text).exists() or words.endswith(_ENDINGS) or "/" in words:
        return Path(text), ()
    return Path(path), tuple(words.split("+"))


def variant_name(backend: str, variant: Iterable[str]) -> str:
    """Return a backend's name with the words of a variant, as tables and records have it: `pytorch@cuda+half`."""
    words = "+".join(variant)
    return f"{backend}@{words}" if words else backend


def require_words(variant: Sequence[str], known: Iterable[str], *, backend: str, most: int | None = None) -> None:
    """Refuse words that a runtime does not know, or too many of them.

    Args:
        variant: The words.
        known: Those that the runtime knows.
        backend: The runtime's name.
        most: How many may be given; None allows each once.

    Raises:
        ConfigError: A word is unknown or given twice, or there are too many.
    """
    names = list(known)
    wrong = [word for word in variant if word not in names]
    if wrong or len(set(variant)) < len(variant) or len(variant) > (len(names) if most is None else most):
        choice = "one of" if most == 1 else "any of"
        raise ConfigError(
            f"variant '{'+'.join(variant)}' of {backend}",
            expected=f"{choice}: {', '.join(names)}" if names else "no variant: it runs in one way only",
            remedy="write it behind the artefact, as in slim.onnx@cuda",
        )
