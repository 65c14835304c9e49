"""Redaction of secrets in URLs (a password, a token, a signed query).

They stay out of logs, rows and errors.
"""

from __future__ import annotations

import json
import logging
import os
import re
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

MASK = "***"
URL = re.compile(r"[A-Za-z][\w+.:-]*://[^\s'\"<>]+")
SHORTEST = 3  # least characters of a password that is masked outside its URL: a shorter one would match within any word
TOKEN = 16  # characters from which a user name without a password is taken for a token


def redact(text: str, *urls: str | None) -> str:
    """Return a message without the secrets of URLs.

    These are the given URLs, $ERASEBENCH_STORE, and any URL in the message.
    """
    for url in filter(None, (*urls, os.environ.get("ERASEBENCH_STORE"))):
        text = text.replace(url, masked(url))
        for secret in sorted(_secrets(url), key=len, reverse=True):
            text = re.sub(re.escape(secret), MASK, text, flags=re.IGNORECASE)  # %2F or %2f
    return URL.sub(lambda found: masked(found[0]), text)


def masked(url: str) -> str:
    """Return a URL without user, password, and the values of its query."""
    scheme, login, rest = _parts(url)
    place, mark, more = _divided(rest)
    return f"{scheme}{MASK + '@' if login else ''}{place}{mark}{MASK if more else ''}"


class Formatter(logging.Formatter):
    """A log formatter that removes secrets of URLs from lines and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _parts(url: str) -> tuple[str, str, str]:
    """Split a URL -> (scheme with ://, user and password, the rest).

    A password may hold any character, even one that a URL may not.
    """
    before, at, after = url.rpartition("@")
    scheme, separator, login = before.rpartition("://")
    authority = re.split(r"[/?#]", login, maxsplit=1)[0]
    if at and (not separator or authority == login or "@" in authority or ":" in authority):
        return scheme + separator, login, after
    scheme, separator, rest = url.rpartition("://")
    return scheme + separator, "", rest


def _divided(rest: str) -> tuple[str, str, str]:
    """Split the rest of a URL -> (place, ? or #, remainder)."""
    place, *found = re.split(r"([?#])", rest, maxsplit=1)
    return (place, *found) if found else (place, "", "")


def _secrets(url: str) -> set[str]:
    """Return every form of the URL's secrets in library messages."""
    _, whole, rest = _parts(url)
    plain: set[str] = set()
    for login in (whole, whole.partition("@")[0]):  # a later @ may belong to the path
        user, colon, password = login.partition(":")
        plain |= {login if colon else "", password, user if len(user) >= TOKEN else ""}
    more = _divided(rest)[2]
    plain |= {more, *(value for _, value in parse_qsl(more))}
    plain |= {form(secret) for secret in plain for form in (unquote, unquote_plus)}
    forms = (str, quote, quote_plus, lambda s: quote(s, ""), lambda s: repr(s)[1:-1], lambda s: json.dumps(s)[1:-1])
    return {made for secret in plain for form in forms if len(made := form(secret)) >= SHORTEST}
