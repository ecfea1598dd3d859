"""Which of the fast ways are on in this process: those that the setting leaves on, and no library lacks a name for."""

from __future__ import annotations

import os
from typing import Final

from ..errors import ConfigurationError
from ..platform import reliances

VARIABLE: Final = "ASSISTREAM_FAST"
"""The environment variable, which takes precedence over the setting of the same name."""
NAMES: Final = ("chunk_reader", "event_template", "batched_reading", "direct_send")


def wanted(setting: str = "") -> frozenset[str]:
    """Read which are to be on: ``on``, ``off``, or all but some, such as ``-direct_send,-chunk_reader``.

    Raises :class:`ConfigurationError`.
    """
    said = os.environ.get(VARIABLE, "").strip() or setting.strip()
    if said in ("", "on"):
        return frozenset(NAMES)
    if said == "off":
        return frozenset()
    words = [word.strip() for word in said.split(",")]
    if any(word[:1] != "-" or word[1:] not in NAMES for word in words):
        raise ConfigurationError(
            f"{VARIABLE} is {said!r}: give on, off, or what is to be off, each with a minus before it, such as "
            f"-direct_send,-chunk_reader. There are {', '.join(NAMES)}"
        )
    return frozenset(NAMES) - {word[1:] for word in words}


class Switches:
    """One set a process: what reads a stream, or sends one, knows of no app."""

    def __init__(self) -> None:
        # Until a worker starts, what the environment says: a client may be made lean, or a stream relayed, before.
        self._wanted: frozenset[str] | None = None

    def choose(self, setting: str) -> None:
        """Have those on that the setting leaves on. Of several apps in a process the last says which.

        Raises :class:`ConfigurationError`.
        """
        self._wanted = wanted(setting)

    def is_on(self, name: str) -> bool:
        """Tell whether one of :data:`NAMES` is on. It is asked once a stream, not for each delta."""
        return name in (wanted() if self._wanted is None else self._wanted) and not reliances.missing(name)


SWITCHES: Final = Switches()
