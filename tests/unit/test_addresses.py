"""Which requests come from one visitor, as far as their addresses tell."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, request
from werkzeug.middleware.proxy_fix import ProxyFix

from assistream_flask.web.addresses import Origin, origin

PROXYS = Origin(None, is_a_proxys=True)
FOR = "HTTP_X_FORWARDED_FOR"


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ("93.184.216.34", "93.184.216.34"),
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:93.184.216.34", "93.184.216.34"),
        ("2600:1406:bc00:53::b81e:94ce", "2600:1406:bc00:53::/64"),
        ("2600:1406:bc00:53:1::", "2600:1406:bc00:53::/64"),
        ("2600:1406:bc00:54::1", "2600:1406:bc00:54::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", None),
        ("unix:", None),
        ("1.2.3.4:5678", None),
    ],
)
def test_a_visitor_is_an_ipv4_address_or_an_ipv6_network_of_64_bits(told: str, address: str | None) -> None:
    assert origin({"REMOTE_ADDR": told, "SERVER_PROTOCOL": "HTTP/1.1"}) == Origin(address)
    assert origin({}) == Origin(None)


@pytest.mark.parametrize("told", ["127.0.0.1", "10.1.2.3", "172.18.0.1", "100.64.0.2", "::1", "fd00::1"])
@pytest.mark.parametrize(
    "sign",
    [
        {FOR: "93.184.216.34"},
        {FOR: "127.0.0.1, 10.1.2.3"},
        {"HTTP_FORWARDED": "for=93.184.216.34"},
        {"HTTP_X_REAL_IP": "93.184.216.34"},
        {"HTTP_X_FORWARDED_PROTO": "https"},
        {"HTTP_VIA": "1.1 Caddy"},
        {"SERVER_PROTOCOL": "HTTP/1.0"},
    ],
    ids=str,
)
def test_a_proxys_own_address_is_nobodys(told: str, sign: dict[str, str]) -> None:
    assert origin({"REMOTE_ADDR": told, **sign}) == PROXYS


def test_a_visitor_who_says_they_are_a_proxy_is_still_a_visitor() -> None:
    assert origin({"REMOTE_ADDR": "93.184.216.34", FOR: "1.1.1.1"}) == Origin("93.184.216.34")


@pytest.mark.parametrize(
    ("chain", "proxies", "found"),
    [
        ("93.184.216.34", 1, Origin("93.184.216.34")),
        ("1.1.1.1, 93.184.216.34", 1, Origin("93.184.216.34")),
        # Their own network is the proxy's.
        ("10.0.0.7", 1, Origin("10.0.0.7")),
        ("127.0.0.1", 1, Origin("127.0.0.1")),
        ("93.184.216.34, 10.0.0.1", 2, Origin("93.184.216.34")),
        # It says that there are more than there are.
        ("93.184.216.34", 2, PROXYS),
    ],
)
def test_what_proxy_fix_takes_from_the_header_is_the_visitors(chain: str, proxies: int, found: Origin) -> None:
    seen: list[Any] = []
    app = Flask("app")
    app.before_request(lambda: seen.append(origin(request.environ)))
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies)  # type: ignore[method-assign]
    app.test_client().get("/", headers={"X-Forwarded-For": chain}, environ_base={"REMOTE_ADDR": "10.0.0.1"})
    assert seen == [found]
