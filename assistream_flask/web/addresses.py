"""Where a request comes from, as far as that tells one visitor from another. Knows no Flask."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

_TELLING: Final = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP")

PROXY_FIX: Final = (
    "app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1), from werkzeug.middleware.proxy_fix, where x_for is how many "
    "proxies stand before the app; each must add to X-Forwarded-For"
)


class Origin(NamedTuple):
    """``address`` is an IPv4 address, or an IPv6 network of 64 bits, which one visitor has as a whole. It is ``None``
    where there is none, as on a Unix socket, and where it ``is_a_proxys``: all visitors would have that one."""

    address: str | None
    is_a_proxys: bool = False


def origin(environ: Mapping[str, Any]) -> Origin:
    """Give where a request comes from, by its WSGI ``environ``."""
    told = environ.get("REMOTE_ADDR") or ""
    try:
        address = ipaddress.ip_address(told)
    except ValueError:
        return Origin(None)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if not address.is_global and _is_forwarded(environ) and not _is_forwarded_for(environ, told):
        return Origin(None, is_a_proxys=True)
    if isinstance(address, ipaddress.IPv6Address):
        return Origin(f"{ipaddress.IPv6Address(address.packed[:8] + bytes(8))}/64")
    return Origin(str(address))


def _is_forwarded(environ: Mapping[str, Any]) -> bool:
    # No browser speaks HTTP/1.0, which nginx does where it is told nothing.
    return environ.get("SERVER_PROTOCOL") == "HTTP/1.0" or any(
        name in _TELLING or name.startswith("HTTP_X_FORWARDED_") for name in environ
    )


def _is_forwarded_for(environ: Mapping[str, Any], address: str) -> bool:
    """Tell whether ProxyFix took the address from the header, as of a visitor in the proxy's own network."""
    fixed = environ.get("werkzeug.proxy_fix.orig")
    return fixed is not None and address in [one.strip() for one in environ.get("HTTP_X_FORWARDED_FOR", "").split(",")]
