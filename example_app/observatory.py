"""What the astronomer may call: one function that reads, one that writes and asks first, and two of the page's."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any, Literal

from flask import current_app
from pydantic import BaseModel, Field

from assistream_flask import ToolArgumentsError, ToolContext, page_tool, tool


def look_up(name: str) -> list[dict[str, Any]]:
    """Look up a planet or moon of the solar system: what it circles, its diameter, its orbit, how many moons it has.

    Args:
        name: Its English name, such as Saturn. For several, call this once for each.
    """
    with closing(sqlite3.connect(":memory:")) as database:
        database.row_factory = sqlite3.Row
        database.executescript((Path(current_app.root_path) / "data/bodies.sql").read_text())
        # A model says "the planet Saturn" too.
        words = json.dumps(re.findall(r"\w+", name))
        found = database.execute(
            "SELECT * FROM bodies WHERE name IN (SELECT value FROM json_each(?))", [words]
        ).fetchall()
    if not found:
        raise ToolArgumentsError("There is nothing of that name. Known are the planets, Pluto and the largest moons.")
    return [dict(row) for row in found]


@tool(approval=True)
def book_telescope(target: str, night: date, context: ToolContext) -> str:
    """Book the telescope for a night. The user is asked before it is booked, so do not ask them too.

    Args:
        target: What to look at, such as Saturn.
        night: The day on whose evening the night begins.
    """
    try:
        with closing(_bookings()) as database, database:
            values = (context.owner, target, night.isoformat())
            database.execute("INSERT INTO bookings (owner, target, night) VALUES (?, ?, ?)", values)
    except sqlite3.IntegrityError:
        raise ToolArgumentsError(f"The user has booked the night of {night} already.") from None
    return f"Booked: {target}, in the night of {night}."


class PickDate(BaseModel):
    purpose: str = Field(description="What the day is for, in a few words, such as: for the telescope")


class SetTheme(BaseModel):
    scheme: Literal["light", "dark"]


pick_date = page_tool("pick_date", "Show the user a calendar to pick a day from. Ask for days with it only.", PickDate)
set_theme = page_tool("set_theme", "Switch the user's page to light or dark colours.", SetTheme)

TOOLS = (look_up, book_telescope, pick_date, set_theme)


def _bookings() -> sqlite3.Connection:
    folder = Path(current_app.instance_path)
    folder.mkdir(0o700, parents=True, exist_ok=True)
    database = sqlite3.connect(folder / "observatory.sqlite3")
    database.execute(
        "CREATE TABLE IF NOT EXISTS bookings (owner TEXT, target TEXT, night TEXT, PRIMARY KEY (owner, night))"
    )
    return database
