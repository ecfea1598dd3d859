"""What is relied on of other libraries beyond what they promise, and which of it is missing.

A release may rename what is the library's own. Then whoever relies on it does without, the log says so once, and the
doctor as long as it lasts.
"""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Final, NamedTuple

_log = logging.getLogger(__name__)

# By who does without it. A library does not get a name back while the process lives.
_MISSING: Final[dict[str, str]] = {}


class Missing(NamedTuple):
    """A name that a library does not have."""

    library: str
    name: str

    def __str__(self) -> str:
        try:
            version = f" {metadata.version(self.library)}"
        except metadata.PackageNotFoundError:
            version = ""
        return f"{self.library}{version} has no {self.name}"


def miss(who: str, missing: Missing, instead: str) -> None:
    """Note that ``who`` does without something, and have the log say once what is done ``instead``."""
    said = str(missing)
    # Of several threads that find it missing, one says so.
    if _MISSING.setdefault(who, said) is said:
        _log.warning("%s: %s is off, and %s", said, who, instead)


def missing(who: str) -> str:
    """Say what ``who`` does without, "" for nothing."""
    return _MISSING.get(who, "")


def all_missing() -> dict[str, str]:
    """Say it of all who do without something."""
    return dict(_MISSING)
