"""How far the tool loop of a run came: what another worker needs to go on with it."""

from __future__ import annotations

from typing import NamedTuple

from ..events import Json


class LoopState(NamedTuple):
    """As of the newest answer that called something.

    ``round`` is its number, from 1 on, and ``step_id`` the step of its calls. When it was over, the message had so many
    parts (``content``), and there were so many ``steps``: what is more is of the next answer. ``equal`` is how often in
    a row the model made ``calls``; ``seconds`` is how long tools took. ``followup`` is what the model server needs to
    go on. ``trace`` names the span that it is of, for who goes on in another one.
    """

    round: int = 0
    step_id: str = ""
    content: int = 0
    steps: int = 0
    equal: int = 0
    calls: str = ""
    seconds: float = 0.0
    followup: Json | None = None
    trace: str = ""

    def stored(self) -> Json:
        """Give it as JSON."""
        return self._asdict()

    @classmethod
    def restored(cls, value: Json | None) -> LoopState | None:
        """Take what :meth:`stored` gave, by any release; ``None`` for ``None``."""
        return None if value is None else cls(**{name: value[name] for name in cls._fields if name in value})
