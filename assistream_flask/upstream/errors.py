"""What model servers say when they fail, told by a code of ours.

No two servers say it alike: the same failure is an HTTP status, an SSE event, a field of a chunk or a flat object, its
``code`` a word, a number or missing. So all values of what came are looked at: first the words made for programs
(``code``, ``type``, ``status``), then the sentences, then the HTTP status.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, Final

import httpx2
import openai
from pydantic_core import from_json

from ..errors import RunError
from ..events import Json, dumps

_DEEP: Final = 5
_LONGEST: Final = 8192
_MANY: Final = 10_000
_IDS: Final = ("code", "type", "status", "reason", "error_code", "status_code", "errorcode", "errortype", "__type")
_WORDS: Final = (
    *("detail", "details", "msg", "err", "err_msg", "error_msg", "error_message", "errormessage", "errors"),
    *("status_msg", "err_code", "error_code"),
)
_FINE: Final = frozenset({"0", "200", "ok", "success", "succeeded", "true", "running", "processing"})

# Of identifiers, without what parts their words; the first that is found counts.
_BY_ID: Final = (
    # DashScope's, who call it a quota in words.
    ("rate_limit_exceeded", "throttl"),
    (
        "insufficient_quota",
        "quota|billing|payment|arrear|balance|credit|insufficientfund|budget|overdue",
    ),
    (
        "context_length_exceeded",
        "contextlength|contextsize|contextwindow|exceedcontext|contextexceeded|toolong|toomanytokens|stringabovemax"
        "|tokenlimit|tokenslimitreached|maxprompttokens|maxinputtokens|requesttoolarge|contexttoolarge",
    ),
    ("rate_limit_exceeded", "ratelimit|toomanyrequests|overload|exhausted|concurren|busy|capacity|slowdown"),
    (
        "content_filter",
        "contentfilter|contentpolicy|filtered|moderation|safety|responsibleai|policyviolation|blocked|prohibited"
        "|sensitive|datainspection|invalidprompt|guardrail|jailbreak",
    ),
    ("upstream_unauthorized", "apikey|auth|permission|(?<!extra)forbidden|credential|accessdenied|accesstoken"),
)
# Of sentences. A limit of a time is no limit of the context, and a quota of a time is over soon.
_BY_WORDS: Final = (
    (
        "insufficient_quota",
        r"prepa(id|yment)|spend(ing)? (limit|cap)|usage cap|budget|key limit exceeded|overdue|unpaid"
        r"|expired.{0,40}(subscription|package|plan)|(subscription|package|plan).{0,20}expired|free tier limit|wallet"
        r"|额度|余额|欠费|充值",
    ),
    (
        "rate_limit_exceeded",
        r"rate.?limit|too many (concurrent )?requests|overload|throttl|(per|/) ?(second|minute|min|hour|day)\b"
        r"|\b[rt]p[md]\b|\bqps\b|(server|model|engine|service) (is )?(currently )?(too )?busy|(at|over) capacity"
        r"|(no|available|insufficient) (available )?capacity|(retry|try again) in [\d.]+ ?(m?s|sec|min)|\bconcurren"
        r"|hourly|weekly|\b\d+ ?hours?\b"
        r"|limit will reset|please wait before|no slot|queue (is )?full|high demand"
        r"|resource (has been |is )?exhausted|\b429\b",
    ),
    (
        "context_length_exceeded",
        r"context.{0,3}(length|size|window|limit)|max(imum)? (prompt|input|context|sequence|allowed)? ?(length|tokens)"
        r"|max(imum)?.(model|seq\w*).?len|(prompt|input|message|request|conversation|context|text)s? (is |are |was )?"
        r"too (long|large|big)|too many (input |prompt )?tokens|reduce the length"
        r"|(prompt|input) (token )?(length|count)"
        r"|range of input length|(prompt|input|request)\b.{0,40}\bexceed.{0,40}\b(token|limit|length|context)"
        r"|tokens?\b.{0,50}(exceeds?|more than|less than|the limit is) .{0,30}(limit|max|context|\d)"
        r"|must have less than \d+ tokens|number of tokens\b.{0,40}exceed|(sequence|token) (length|limit) .{0,20}exceed"
        r"|context is full|does not fit in the context|tokens? to keep from the initial prompt"
        r"|max_tokens must be at least 1, got -|inputs\W* tokens \+"
        r"|超长|超过.{0,6}(长度|限制)|长度超过|(上下文|输入)过长",
    ),
    (
        "insufficient_quota",
        r"quota|insufficient.{0,20}(balance|credit|fund)|billing|payment|out of credit|(credit|balance)s?\b.{0,30}"
        r"(exhaust|deplet|low|run out|used up|insufficient|negative)|(more|any|no|all available|enough) credits"
        r"|membership|usage limits?\b|top.?up|arrears|\b402\b",
    ),
    (
        "content_filter",
        r"content.{0,3}(filter|policy|management|moderation)|(was|been|were|prompt|input) (filtered|flagged|blocked)"
        r"|flagged|moderation|inappropriate|usage polic|violat\w* .{0,40}(polic|guideline|terms)|content exists risk"
        r"|high risk|risk control|safety (system|filter|reason|setting|check)|due to safety|sensitive"
        r"|guardrail|prohibited (content|use)|jailbreak|prompt injection|(unsafe|harmful) content|敏感|违规",
    ),
    (
        "upstream_unauthorized",
        r"api.?key|unauthori|not authori|authoriz|authenticat|permission|(?<!extra_)forbidden|access denied|credential"
        r"|invalid.{0,10} token|login fail",
    ),
)
_RATE: Final = "rate_limit_exceeded"
_QUOTA: Final = "insufficient_quota"
_BY_STATUS: Final = {
    401: "upstream_unauthorized",
    402: "insufficient_quota",
    403: "upstream_unauthorized",
    413: "context_length_exceeded",
    429: "rate_limit_exceeded",
    529: "rate_limit_exceeded",
}
_LOADING: Final = r"\bloading\b.{0,20}\bmodel|\bmodel\b.{0,200}\bloading\b"
# What trying again doesn't mend, whatever the status.
_TEMPLATE: Final = r"jinja|chat template|roles? must alternate|unexpected role|role not supported"
_REFUSED: Final = "invalid|notfound|unsupported|badrequest|unprocessable|notexist|validation"


def failure(error: Any, status: int | None = None) -> RunError:
    """Give the run's error for what a server said, in any form: an object, nested or flat, a list of such, or a text.

    ``status`` is the HTTP status, where there was one that tells of it.
    """
    return RunError(_code(error, status), said=error if isinstance(error, str) else dumps_safely(error))


def tells_failure(kind: str, data: Json) -> bool:
    """Tell whether an event that is none of its dialect says that a server failed, or a gateway before it.

    ``kind`` is its type or name, ``data`` what came: ``{"error": ...}``, or a flat object as vLLM's ``{"object":
    "error", "message": ...}``, FastAPI's ``{"detail": ...}`` or DashScope's ``{"code": ..., "message": ...}``.
    """
    if kind == "error" or data.get("error") or _has_inner_failure(data):
        return True
    if data.get("choices") or kind.startswith(("response.", "thread.")):
        return False
    told = {name.lower(): value for name, value in data.items()}
    states = [str(told[name]).lower() for name in ("code", "status", "status_code", "success") if name in told]
    if told.get("object") == "error" or told.get("error") or _status(data) or {"failed", "fail", "error"} & {*states}:
        return True
    if told.get("usage") or any(state in _FINE for state in states):
        return False
    found = isinstance(told.get("message"), str) and told["message"]
    # A notice of some gateway has a type of its own, and says what it is.
    if isinstance(told.get("type"), str) or isinstance(told.get("object"), str):
        return bool(found) and re.search("error|exception|fail|invalid|exceed|overload", kind.lower()) is not None
    return bool(found or any(told.get(name) for name in _WORDS))


def _has_inner_failure(data: Json) -> bool:
    """Tell whether it stands where MiniMax, and Groq, put it."""
    minimax, groq = data.get("base_resp"), data.get("x_groq")
    return bool(
        (isinstance(minimax, dict) and minimax.get("status_code")) or (isinstance(groq, dict) and groq.get("error"))
    )


def of_exception(error: Exception, otherwise: str) -> RunError:
    """Give the run's error for what the SDK, its transport or a stream's iterator raised; ``otherwise`` is the code
    for what is none of theirs."""
    said = f"{error!r}, from {error.__cause__!r}" if error.__cause__ is not None else repr(error)
    if isinstance(error.__cause__ or error, httpx2.PoolTimeout):
        # Nothing was sent: the client's connections are all taken.
        return RunError("server_busy", said=said)
    if isinstance(error, openai.APITimeoutError) or timed_out(error):
        # A time-out that came before there was a connection.
        early = isinstance(error.__cause__, httpx2.ConnectTimeout)
        return RunError("upstream_unreachable" if early else "upstream_stalled", said=said)
    if isinstance(error, openai.APIStatusError):
        if error.status_code < 400 and (to := error.response.headers.get("Location")):
            said = (
                f"HTTP {error.status_code} leads to {to[:300]}, and is not followed, as the thread would go there: "
                "where that is right, give it as OPENAI_BASE_URL or the client's base_url"
            )
            return RunError("upstream_redirected", said=said)
        # Of the body the SDK gives only what it has under "error".
        try:
            body: Any = from_json(error.response.content)
        except (ValueError, httpx2.HTTPError, RuntimeError):
            body = error.body if error.body not in (None, "") else error.message
        return RunError(_code(body, error.status_code), said=f"HTTP {error.status_code}: {dumps_safely(body)}")
    if isinstance(error, openai.APIConnectionError):
        return RunError("upstream_unreachable", said=said)
    if isinstance(error, openai.APIError):
        return failure(error.body if error.body is not None else error.message)
    if isinstance(error, openai.OpenAIError):
        return RunError("upstream_unauthorized", said=said)
    return RunError("upstream_malformed" if isinstance(error, ValueError) else otherwise, said=said)


def timed_out(error: Exception) -> bool:
    """Tell whether the transport gave up waiting for a byte."""
    return isinstance(error, httpx2.TimeoutException | TimeoutError)


def dumps_safely(value: Any) -> str:
    """Give ``value`` as text for the log, whatever it is."""
    try:
        return value if isinstance(value, str) else dumps(value)
    except (ValueError, TypeError, RecursionError):
        return repr(value)


def _code(error: Any, status: int | None) -> str:
    if isinstance(error, str):
        error = error[:_LONGEST]
    ids = " ".join(re.sub("[^a-z0-9]", "", value.lower()) for value in _values(error, _IDS) if " " not in value)
    ids = ids[:_LONGEST]
    words = " ".join(_values(error)).lower()[:_LONGEST]
    status = status or _status(error)
    if re.search(r"\b503\b", f"{status} {words}") and re.search(_LOADING, words):
        return "model_loading"
    found = _first(_BY_ID, ids)
    if found in (_RATE, _QUOTA):
        return _which(found, ids, words, status)
    found = found or _first(_BY_WORDS, words)
    if found is None and re.search(_TEMPLATE, words):
        return "upstream_rejected"
    if found is not None or status in _BY_STATUS:
        return found or _BY_STATUS[status or 0]
    if (status is not None and 400 <= status < 500) or (status is None and re.search(_REFUSED, ids)):
        return "upstream_rejected"
    return "upstream_error"


def _first(patterns: Sequence[tuple[str, str]], text: str) -> str | None:
    return next((code for code, pattern in patterns if re.search(pattern, text)), None)


def _which(found: str, ids: str, words: str, status: int | None) -> str:
    """Tell a quota that is used up from a limit of requests, which is over in a minute: each is called by the other's
    name."""
    if found == _QUOTA and re.search(_BY_WORDS[1][1], words):
        return found if re.search("insufficient|budget|billing", ids) or status == 402 else _RATE
    # OpenAI's Assistants API says so of an account without money.
    is_empty = "ratelimit" in ids and "plan and billing" in words and "retry" not in words
    return _QUOTA if is_empty or (found == _RATE and re.search(_BY_WORDS[0][1], words)) else found


def _status(error: Any) -> int | None:
    """Give the HTTP status that stands in what came."""
    for value in _values(error, _IDS):
        if re.fullmatch("[45][0-9]{2}", value):
            return int(value)
    return None


def _values(value: Any, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Give the texts and numbers in ``value`` as texts, those under ``names`` where there are any; the first of very
    many."""
    levels: list[Iterator[tuple[str, Any]]] = [iter([("", value)])]
    for _ in range(_MANY):
        if (found := next(levels[-1], None)) is None:
            levels.pop()
            if not levels:
                return
            continue
        name, one = found
        if isinstance(one, dict | list):
            if len(levels) <= _DEEP:
                levels.append(_pairs(one, name))
        elif isinstance(one, str | int) and not isinstance(one, bool) and (not names or name in names):
            yield str(one)[:_LONGEST]


def _pairs(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        return ((str(key).lower(), one) for key, one in value.items())
    return zip(repeat(name), value)
