"""Fetching images from the few places that a server was told it may fetch from."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from dyvte.errors import ConfigError
from dyvte.serving.errors import RequestError

_CHUNK = 1 << 16


class Fetcher:
    """Gets URLs that begin with an allowed prefix: no redirects, and no more bytes and time than allowed.

    Parameters
    ----------
    prefixes
        ``https://host/folder/``; a URL must have the same scheme, host and port, and a path below the folder.
    max_bytes, seconds
        Of one fetch.

    Raises
    ------
    ConfigError
        If a prefix is no http(s) URL of a host.
    """

    def __init__(self, prefixes: Sequence[str], max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self._allowed = []
        for prefix in prefixes:
            try:
                origin, path = _parts(prefix)
            except ValueError as error:
                raise ConfigError(
                    f"allow_url_prefix {prefix!r}: {error}; expected https://host/ or https://host/folder/"
                ) from error
            self._allowed.append((origin, path if path.endswith("/") else f"{path}/"))
        self._opener = urllib.request.build_opener(_NoRedirects)

    def get(self, url: str, path: str) -> bytes:
        """What lies at a URL.

        Parameters
        ----------
        path
            Where the URL stands in the request, for messages.

        Raises
        ------
        RequestError
            If it is not allowed, too large, too slow or not there.
        """
        if not self._allowed:
            raise _refused(path, "images are taken as data: URLs only; this server fetches none")
        try:
            origin, below = _parts(url)
        except ValueError as error:
            raise _refused(
                path, f"{error}; expected a data: URL, or one that this server may fetch"
            ) from None
        if not any(origin == allowed and below.startswith(folder) for allowed, folder in self._allowed):
            raise _refused(path, "this server may not fetch from there (--allow-url-prefix)")
        try:
            return self._read(url)
        except _TooLarge:
            raise RequestError(
                f"{path}: more than {self.max_bytes} bytes", status=413, code="image_too_large", param=path
            ) from None
        except urllib.error.HTTPError as error:
            what = "a redirect, which is not followed" if 300 <= error.code < 400 else f"status {error.code}"
            raise _refused(path, f"the image's server answered with {what}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _refused(path, f"cannot be fetched ({type(error).__name__})") from None

    def _read(self, url: str) -> bytes:
        until = time.monotonic() + self.seconds
        parts: list[bytes] = []
        size = 0
        with self._opener.open(urllib.request.Request(url), timeout=self.seconds) as answer:
            while chunk := answer.read1(_CHUNK):
                size += len(chunk)
                if size > self.max_bytes:
                    raise _TooLarge
                if time.monotonic() > until:
                    raise TimeoutError
                parts.append(chunk)
        return b"".join(parts)


class _TooLarge(Exception):
    pass


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _parts(url: str) -> tuple[tuple[str, str, int], str]:
    """((scheme, host, port), path) of an http(s) URL without anything that could mean another place.

    Raises
    ------
    ValueError
        Saying what it holds.
    """
    if any(ord(sign) <= 32 or ord(sign) >= 127 or sign == "\\" for sign in url):
        raise ValueError("a URL with white space, backslashes or signs beyond ASCII")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"no http(s) URL: {parts.scheme[:20]!r}" if parts.scheme else "no URL")
    if not parts.hostname or "@" in parts.netloc:
        raise ValueError("a URL without a host, or with a user name")
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    path = parts.path or "/"
    # Until nothing is left to decode: a server beyond may decode more than once.
    decoded, before = path, None
    while decoded != before:
        decoded, before = urllib.parse.unquote(decoded), decoded
    if "\\" in decoded or any(step in (".", "..") for step in decoded.split("/")):
        raise ValueError("a URL with steps in its path (..)")
    return (parts.scheme, parts.hostname.lower(), port), path


def _refused(path: str, what: str) -> RequestError:
    return RequestError(f"{path}: {what}", code="image_not_available", param=path)
