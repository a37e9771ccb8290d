"""Federated training over a network, by Flower (extra `federated`): `jaxcl serve` and `jaxcl join`.

Flower moves messages between one SuperLink, at the server, and a SuperNode at each client, over TLS. Everything else is
that of `jaxcl federate`: `jaxcl.flower.grid` is another way in which the server reaches its clients.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.flower import grid, join, link, pairing, serve

__all__ = [
    "grid",
    "join",
    "link",
    "pairing",
    "serve",
]
