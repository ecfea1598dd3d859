"""Libraries in which names are others, as after an upgrade, in the processes that a test starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Rename(NamedTuple):
    """What is to stand in a package's source, in all of its modules, where the pattern ``old`` matches."""

    package: str
    old: str
    new: str


# Python imports a module of this name before all else. What it compiles goes into no cache.
_HOOK = """
import importlib.machinery, re, sys

RENAMES = {renames}

class Renamed(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        source = self.get_data(self.path).decode()
        for package, old, new in RENAMES:
            if name.partition(".")[0] == package:
                source = re.sub(old, new, source)
        return compile(source, self.path, "exec", dont_inherit=True)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {{package for package, _, _ in RENAMES}}:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is not None and isinstance(found.loader, importlib.machinery.SourceFileLoader):
            found.loader = Renamed(name, found.origin)
        return found

sys.meta_path.insert(0, Finder)
"""


def environment(folder: Path, renames: Sequence[Rename]) -> dict[str, str]:
    """Give the variables that have each Python which is started with them find the names changed; ``folder`` is for
    the module that sees to it."""
    (folder / "sitecustomize.py").write_text(_HOOK.format(renames=[tuple(one) for one in renames]))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}
