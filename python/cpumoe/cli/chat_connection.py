"""The HTTP client for a server, with the environment's proxies, certificates and key."""

from __future__ import annotations

import ipaddress
import os
import ssl
from typing import TYPE_CHECKING

from cpumoe.cli.chat_backends import ChatError
from cpumoe.cli.options import KEY_VARIABLE

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 10.0

_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")


def open_client(url: str, api_key: str | None, timeout: float) -> httpx2.Client:
    """Returns an HTTP client for an API.

    Args:
        url: the API's address. Connections to this computer use no proxy.
        api_key: the key to send; None: no key.
        timeout: seconds that the server may be silent.

    Raises:
        ChatError: the URL, the key, or an environment variable is wrong; the message names it.
    """
    import httpx2

    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {_checked_key(api_key)}"
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ChatError(f"{url}: expected a server's address: {error}") from error
    if not address.host:
        raise ChatError(f"{url}: expected a server's address, got one without a host")
    here = _is_this_computer(address.host)
    # An unencrypted connection to this computer needs no certificates, so wrong ones do no harm.
    plain = here and address.scheme == "http"
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else _certificates()
    try:
        return httpx2.Client(
            base_url=url + "/",
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            verify=tls,
            trust_env=not here,
            # A server may close an idle connection between two questions; reusing it would fail.
            limits=httpx2.Limits(max_keepalive_connections=0),
            follow_redirects=True,
        )
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise ChatError(_wrong_proxy(tls) or str(error)) from error


def proxy_in_force(client: httpx2.Client) -> str | None:
    """Returns the variable that names the client's proxy, if any: a possible cause of failure."""
    if not client.trust_env:
        return None
    wanted = (f"{client.base_url.scheme}_proxy", "all_proxy")
    return next((name for name in _proxies() if name.lower() in wanted), None)


def _checked_key(key: str) -> str:
    """Returns the key if a header can hold it. No error message contains the key."""
    if key.isascii() and key.isprintable():
        return key
    source = KEY_VARIABLE if os.environ.get(KEY_VARIABLE) == key else "--api-key"
    at = next(i for i, c in enumerate(key) if not (c.isascii() and c.isprintable()))
    raise ChatError(
        f"{source}: expected a key of printable ASCII characters, got one whose character "
        f"{at + 1} is something else"
    )


def _is_this_computer(host: str) -> bool:
    """Whether a host is this computer. 0.0.0.0 counts: servers print it as their address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _certificates() -> ssl.SSLContext:
    import httpx2

    source = "the system's certificates"
    for variable, exists in (("SSL_CERT_FILE", os.path.isfile), ("SSL_CERT_DIR", os.path.isdir)):
        if path := os.environ.get(variable):
            source = f"{variable}={path}"
            if not any(map(exists, (path, *path.split(os.pathsep)))):
                kind = "file" if exists is os.path.isfile else "folder"
                raise ChatError(f"{source}: no such {kind}; correct it, or unset {variable}")
            break
    try:
        return httpx2.create_ssl_context()
    except OSError as error:
        raise ChatError(f"{source}: {error}") from error


def _proxies() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.lower() in _PROXY_VARIABLES and value
    }


def _wrong_proxy(tls: ssl.SSLContext) -> str | None:
    """Returns an error that names the variable with an unusable proxy; None: there is none."""
    import httpx2

    for name, value in _proxies().items():
        try:
            httpx2.HTTPTransport(proxy=value if "://" in value else f"http://{value}", verify=tls)
        except ImportError:
            return f"{name}: a SOCKS proxy needs socksio: pip install socksio, or unset {name}"
        except (ValueError, httpx2.InvalidURL) as error:
            return f"{name}: expected a proxy's address: {error}"
    return None
