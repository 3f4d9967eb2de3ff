"""Every error that edgekd raises on purpose.

EdgekdError             a message that says what is wrong and where, and a hint that says the next action
 |- RecipeError         a recipe that cannot be run; the command exits with 2
 |- UsageError          a command that asks for what is not there; the command exits with 2
 |- MissingDependency   an optional package is needed; the hint is the install command
 |- DataError           images or labels that cannot be read or used
 |- ArtifactError       a stored artifact is missing, damaged or in use
 |- TrainingError       training cannot go on, for instance because a term is not finite
 |- ExportError         a model that cannot be written as ONNX
 |- ParityError         two forms of one model disagree by more than is allowed
 |- BuildError          a backend refused to build or open an engine
 |- TargetError         a target cannot be reached, or its worker died
 |- BudgetExceeded      the result misses the recipe's budget; the command exits with 3

Anything else that surfaces is a bug, and shows its traceback.
"""

from __future__ import annotations


class EdgekdError(Exception):
    """Base of all of them.

    Args:
        message: What was expected, what was received, and where.
        hint: The next action, as an imperative sentence; empty where there is none.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(EdgekdError):
    """A recipe that cannot be run."""


class UsageError(EdgekdError):
    """A command asks for something that is not there, or for no one thing."""


class MissingDependency(EdgekdError):  # noqa: N818  # the package is missing; the error is what the base says
    """An optional package is needed and not installed."""


class DataError(EdgekdError):
    """Images or labels cannot be read or used."""


class ArtifactError(EdgekdError):
    """A stored artifact is missing, damaged or in use."""


class TrainingError(EdgekdError):
    """Training cannot go on."""


class ExportError(EdgekdError):
    """A model cannot be written as ONNX."""


class ParityError(EdgekdError):
    """Two forms of one model disagree by more than is allowed."""


class BuildError(EdgekdError):
    """A backend refused to build or open an engine."""


class TargetError(EdgekdError):
    """A target cannot be reached, or its worker died."""


class BudgetExceeded(EdgekdError):  # noqa: N818
    """The result misses the recipe's budget."""


def nearest(word: str, allowed: list[str]) -> str:
    """A did-you-mean clause for ``word``: `` (did you mean 'x'?)``, or nothing when no allowed word is close."""
    import difflib

    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
