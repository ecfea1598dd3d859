"""What the log needs of a Redis, and what is to be done where that is refused. Knows no client: Redis's is an extra."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

# Each as it changes nothing, on a key and a channel that nobody uses. SUBSCRIBE keeps a connection from all but its
# end. Beside these a URL with a database needs SELECT, and its client does without CLIENT SETINFO.
_TRIES: Final[Sequence[tuple[str, tuple[str | int, ...]]]] = (
    ("info", ("server",)),
    ("ping", ()),
    ("time", ()),
    ("script|load", ("return 0",)),
    ("evalsha", ("0" * 40, 0)),
    ("scan", (0, "COUNT", 1)),
    ("get", ("KEY",)),
    ("set", ("KEY", "", "XX")),
    ("del", ("KEY",)),
    ("pexpire", ("KEY", 1)),
    ("pttl", ("KEY",)),
    ("memory|usage", ("KEY",)),
    ("hget", ("KEY", "")),
    ("hincrby", ("KEY", "", "")),
    ("hdel", ("KEY", "")),
    ("xadd", ("KEY", "NOMKSTREAM", "*", "e", "")),
    ("xlen", ("KEY",)),
    ("xrange", ("KEY", "-", "+")),
    ("xrevrange", ("KEY", "+", "-")),
    ("xtrim", ("KEY", "MAXLEN", 0)),
    ("zadd", ("KEY", "XX", 0, "")),
    ("zrangebyscore", ("KEY", 0, 0)),
    ("zrem", ("KEY", "")),
    ("zscore", ("KEY", "")),
    ("publish", ("KEY", "")),
    ("pubsub|numsub", ("KEY",)),
    ("subscribe", ("KEY",)),
    ("unsubscribe", ("KEY",)),
)
_PLACES: Final = ("~assistream:*", "&assistream:*")
RULE: Final = " ".join([*_PLACES, *(f"+{name}" for name, _ in _TRIES), "+select"])
"""What a user must be allowed: keys, channels and commands, as ``ACL SETUSER`` takes them."""

_URL: Final = "in ASSISTREAM_REDIS_URL give"
_UNFIT: Final = f"a Redis Cluster, or a Sentinel, which assistream cannot use: {_URL} one Redis that runs by itself"
_ADVICE: Final[Sequence[tuple[str, str]]] = (
    (
        r"^NoPermissionError|: (The user executing the script can't|ACL failure)",
        f"its user is not allowed all that is needed: as its admin run `ACL SETUSER <user> {RULE}`",
    ),
    (r"^(Cluster\w*|Moved|Ask|TryAgain)Error|: SELECT is not allowed in cluster mode", f"it is {_UNFIT}"),
    (r"^ReadOnlyError", f"it is a replica, which takes no writes: {_URL} the primary's address"),
    (
        r": (@\S+ \d+: )?[uU]nknown (Redis )?command",
        f"it lacks commands that are needed: {_URL} a Redis that runs Lua scripts",
    ),
    (r"^OutOfMemoryError", "it is full: raise its maxmemory, or give assistream a Redis of its own"),
    (r": MISCONF", "it cannot save to its disk, and takes no writes: run it with `--save ''`, or make room there"),
    (
        "certificate verify failed",
        "its certificate is of no authority that is known here: add ?ssl_ca_certs=/path/of/ca.pem to "
        "ASSISTREAM_REDIS_URL",
    ),
    (
        r"^Authentication\w*Error",
        "it refuses the user or the password: correct ASSISTREAM_REDIS_URL and the password in it",
    ),
)


class UnfitRedisError(Exception):
    """A Redis that the log cannot use; the message says why, and what to do."""


def advice(error: BaseException) -> str:
    """Give what is wrong with the Redis that gave ``error``, and what to do, fit for the public; "" where that is not
    known."""
    if isinstance(error, UnfitRedisError):
        return str(error)
    said = f"{type(error).__name__}: {error}"
    return next((what for pattern, what in _ADVICE if re.search(pattern, said)), "")


def check(line: Any, key: str) -> str:
    """Try all that the log needs on ``line``, a connection of the client's in RESP2, with a ``key`` that is not
    there. It changes nothing. Give the ``run_id`` of that Redis.

    Raises :class:`UnfitRedisError`, after which the connection is of no use, and what the client raises where Redis is
    away.
    """
    # The client is an extra.
    from redis import ResponseError

    asked = [(*name.upper().split("|"), *(key if one == "KEY" else one for one in more)) for name, more in _TRIES]
    line.send_packed_command(line.pack_commands(asked))
    about: dict[str, str] = {}
    errors: list[tuple[str, Exception]] = []
    for name, _ in _TRIES:
        try:
            answer = line.read_response()
            if name == "info":
                about = dict(re.findall(r"^(\w+):(\S*)", answer.decode(), re.MULTILINE))
        except ResponseError as error:
            errors.append((name, error))
    if about.get("redis_mode", "standalone") != "standalone":
        raise UnfitRedisError(f"it is {_UNFIT}")
    if denied := dict.fromkeys(_right(*one) for one in errors if type(one[1]).__name__ == "NoPermissionError"):
        raise UnfitRedisError(f"its user lacks rights: as its admin run `ACL SETUSER <user> {' '.join(denied)}`")
    if known := next(filter(None, (advice(one) for _, one in errors)), ""):
        raise UnfitRedisError(known)
    return about["run_id"]


def _right(name: str, error: Exception) -> str:
    said = str(error)
    if "channel" in said:
        return _PLACES[1]
    return f"+{name}" if "command" in said else _PLACES[0]
