"""The dialects by name: a new one is a module beside this one, and a line here."""

from __future__ import annotations

from typing import Final

from .assistants_v2 import Assistants
from .chat import Chat
from .protocol import Dialect
from .responses import Responses

_ALL: Final[tuple[Dialect, ...]] = (
    Responses(),
    Chat(),
    Assistants(),
)
DIALECTS: Final[dict[str, Dialect]] = {dialect.name: dialect for dialect in _ALL}
"""What ``Assistant(upstream=...)`` may be. A stream without a name is of the first one that recognises an event."""
