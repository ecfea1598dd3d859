"""assistream: OpenAI streams as Server-Sent Events, for Flask under gunicorn and gevent.

Here is what an app imports, beside :mod:`assistream_flask.testing`; all else is the package's own. A public name's
module is imported when the name is first asked for: so `assistream_flask.testing`, and whoever needs only that, does
without Flask, SQLAlchemy and the OpenAI SDK, which take more than a second of CPU to import.
"""

from typing import TYPE_CHECKING

from .version import VERSION

__all__ = [
    "Assistant",
    "Assistream",
    "AssistreamError",
    "Commands",
    "ConfigurationError",
    "McpServer",
    "NotFoundError",
    "Page",
    "RequestError",
    "RunList",
    "Tool",
    "ToolArgumentsError",
    "ToolContext",
    "WaitTimeoutError",
    "create_blueprint",
    "current_assistream",
    "event_response",
    "lean",
    "message_created",
    "page_tool",
    "run_ended",
    "run_started",
    "tool",
    "tool_called",
]
__version__ = VERSION

if TYPE_CHECKING:
    from .assistants import Assistant
    from .errors import AssistreamError, ConfigurationError, NotFoundError, RequestError, WaitTimeoutError
    from .extension import (
        Assistream,
        Commands,
        Page,
        current_assistream,
        message_created,
        run_ended,
        run_started,
        tool_called,
    )
    from .fast.chunk_reader import lean
    from .mcp import McpServer
    from .runs.run_list import RunList
    from .tools import Tool, ToolArgumentsError, ToolContext, page_tool, tool
    from .web.blueprint import create_blueprint
    from .web.routes_events import event_response
else:
    # Type checkers don't see it: to them a module that has a __getattr__ has every name there is.
    _MODULES = {
        "Assistant": "assistants",
        "Assistream": "extension",
        "AssistreamError": "errors",
        "Commands": "extension",
        "ConfigurationError": "errors",
        "McpServer": "mcp",
        "NotFoundError": "errors",
        "Page": "extension",
        "RequestError": "errors",
        "RunList": "runs.run_list",
        "Tool": "tools",
        "ToolArgumentsError": "tools",
        "ToolContext": "tools",
        "WaitTimeoutError": "errors",
        "create_blueprint": "web.blueprint",
        "current_assistream": "extension",
        "event_response": "web.routes_events",
        "lean": "fast.chunk_reader",
        "message_created": "extension",
        "page_tool": "tools",
        "run_ended": "extension",
        "run_started": "extension",
        "tool": "tools",
        "tool_called": "extension",
    }

    def __getattr__(name):
        """Import a public name's module, and keep the name here."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return found

    def __dir__():
        return sorted({*globals(), *__all__})
