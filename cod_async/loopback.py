"""Whether a host is this machine itself: what every rule on keys and on who may listen turns on."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, as in a URL (an IPv6 address without brackets), is this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
