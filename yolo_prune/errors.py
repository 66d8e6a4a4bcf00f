"""The exception tree of yolo_prune.

Every message says what was found, what was expected and what to do. `exit_code` is what the command line returns: 2 for
bad input, 1 for a proof that failed (verification, parity), which is never the user's fault.
"""

from __future__ import annotations


class YoloPruneError(Exception):
    """Root of the tree.

    Args:
        found: The precise fact, with names, shapes or paths.
        expected: What would have been right.
        remedy: What the user can do about it.
    """

    exit_code = 2

    def __init__(self, found: str, *, expected: str = "", remedy: str = "") -> None:
        self.found, self.expected, self.remedy = found, expected, remedy
        lines = [found]
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  to do:    {remedy}")
        super().__init__("\n".join(lines))


class ConfigError(YoloPruneError):
    """A key or value of the configuration is wrong."""


class CheckpointError(YoloPruneError):
    """A checkpoint cannot be read, or is not one that can be pruned."""


class DataError(YoloPruneError):
    """A dataset description or one of its splits is missing or wrong."""


class OutputError(YoloPruneError):
    """An output cannot be written: it exists, its folder is read-only, or the disk is full."""


class TraceError(YoloPruneError):
    """The model's forward cannot be traced."""


class PlanError(YoloPruneError):
    """A plan is malformed, breaks a tie, or belongs to another model."""


class InfeasibleTargetError(YoloPruneError):
    """No plan within the floors reaches the target."""


class MissingDependencyError(YoloPruneError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"package '{package}' is not installed",
            expected=f"'{package}', needed to {purpose}",
            remedy=f"pip install 'yolo-prune[{extra}]'",
        )


class WorkerError(YoloPruneError):
    """Processes that score candidates keep dying."""

    exit_code = 1


class CandidateError(YoloPruneError):
    """The candidates of a search cannot be run."""

    exit_code = 1


class ExportError(YoloPruneError):
    """The host could not export a model."""

    exit_code = 1


class VerificationError(YoloPruneError):
    """A slim model is not what its plan promised: outputs, MACs or widths differ."""

    exit_code = 1


class ParityError(YoloPruneError):
    """An exported artefact does not agree with PyTorch."""

    exit_code = 1
