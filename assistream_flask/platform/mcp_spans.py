"""Has the package ``mcp`` make no spans of its own where instrumentation is suppressed, which it does not heed."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from . import reliances

SUPPRESSED: Final = "suppress_instrumentation"
"""The key of OpenTelemetry's context that instrumentation heeds."""
_MODULE: Final = "mcp.shared._otel"


class _Tracer:
    """Makes what another does, but where that is suppressed."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def start_as_current_span(self, *given: Any, **options: Any) -> AbstractContextManager[Any]:
        from opentelemetry import context, trace

        if context.get_value(SUPPRESSED):
            return nullcontext(trace.INVALID_SPAN)
        found: AbstractContextManager[Any] = self._inner.start_as_current_span(*given, **options)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def heed_suppression() -> None:
    """Have it heed that. Idempotent; what the app does with the package elsewhere is left alone."""
    try:
        module: Any = importlib.import_module(_MODULE)
        inner = module._tracer
    except (ImportError, AttributeError):
        missing = reliances.Missing("mcp", f"{_MODULE}._tracer")
        reliances.miss("mcp_spans", missing, "a sampler that heeds no parent has spans with what MCP servers say")
        return
    if not isinstance(inner, _Tracer):
        module._tracer = _Tracer(inner)
