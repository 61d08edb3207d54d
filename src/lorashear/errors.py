"""What a user can cause, each with a message of three parts: what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LorashearError(ValueError):
    """A mistake in what was asked for or given. The command line prints the message and exits with code 2."""


class ModelError(LorashearError):
    """The model cannot be read, or is not one that can be worked on."""


class DataError(LorashearError):
    """The data cannot be read, or holds too little."""


class SettingsError(LorashearError):
    """A setting has an unknown name or a value outside its range."""


class PlanError(LorashearError):
    """A plan does not fit the model, or the ratio cannot be reached."""


class TrainingError(LorashearError):
    """Training cannot go on: its loss is no longer a finite number."""


class OutputError(LorashearError):
    """The output folder cannot be written, or holds something already."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as `did you mean "ratio"?`, or the known names where nothing is near."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1)
    return f'did you mean "{near[0]}"?' if near else "known: " + ", ".join(names)


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
