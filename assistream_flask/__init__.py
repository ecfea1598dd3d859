"""assistream: OpenAI streams as Server-Sent Events, for Flask under gunicorn and gevent.

Here is what an app imports, beside :mod:`assistream_flask.testing`; all else is the package's own.
"""

from .assistants import Assistant
from .errors import AssistreamError, ConfigurationError
from .fast.chunk_reader import lean
from .version import VERSION
from .web.blueprint import create_blueprint, event_response

__all__ = ["Assistant", "AssistreamError", "ConfigurationError", "create_blueprint", "event_response", "lean"]
__version__ = VERSION
