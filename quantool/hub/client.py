"""The session through which huggingface_hub asks the Hub: how long it waits, and how large an answer may be."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from quantool import __version__

LOG_IN = "set HF_TOKEN or run `hf auth login`"
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0  # s
MAX_ANSWER = 64 << 20
"""Bytes that the answer to one question may have; files are fetched as streams and not counted."""
MAX_PAGES = 200
"""Times that one address is read for one publication: a listing names its next page itself."""
XET = {"HF_XET_CLIENT_CONNECT_TIMEOUT": "connect", "HF_XET_CLIENT_READ_TIMEOUT": "read"}
"""Variables that hf_xet, which has connections of its own, reads when its session begins (hf-xet 1.8)."""


class HubSilentError(TimeoutError):
    """The Hub took a request and did not answer in time. None of the client's retries is made for it."""


@dataclass(frozen=True)
class Patience:
    """How long a request may take, in s: to connect, and of silence afterwards.

    ``publishing`` is for questions that must end: their whole answer may take ``read``, silence is an error at once,
    and a longer wait than that is not sat out. Downloads go on where they stopped, which the client does by itself.
    """

    connect: float = CONNECT_TIMEOUT
    read: float = READ_TIMEOUT
    publishing: bool = False

    def extended(self, given: dict[str, float | None] | None) -> dict[str, float | None]:
        """Time-outs as the client's HTTP library has them: those given, ours where there is none."""
        ours = {"connect": self.connect, "read": self.read, "write": self.read, "pool": self.connect}
        return {name: (given or {}).get(name) or seconds for name, seconds in ours.items()}


def headers() -> dict[str, str]:
    """What a request of ours carries: the token, looked up now, since that of a long run may be renewed."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return dict(build_hf_headers(token=True, library_name="quantool", library_version=__version__))


@contextmanager
def publishing(connect: float, read: float) -> Iterator[None]:
    """Let every request inside end in time."""
    environment = {
        name: f"{round({'connect': connect, 'read': read}[key] * 1000)}ms" for name, key in XET.items()
    }
    own = {name: value for name, value in environment.items() if name not in os.environ}
    os.environ.update(own)
    limit_waiting(Patience(connect, read, publishing=True))
    try:
        yield
    finally:
        limit_waiting()
        for name in own:
            os.environ.pop(name, None)


def limit_waiting(patience: Patience = Patience()) -> None:
    """Have huggingface_hub make its sessions with time-outs; as they come from it, they have none.

    Many of its calls ask for None, which means for ever: only the session can tell otherwise.
    """
    from huggingface_hub import get_session, set_client_factory

    session: Any = get_session()
    if getattr(session, "patience", None) == patience:
        return
    kind = getattr(session, "unlimited", type(session))
    hooks, limited = session.event_hooks, _limited(kind, patience)
    set_client_factory(lambda: limited(event_hooks=hooks, follow_redirects=True))


def _limited(kind: type[Any], limits: Patience) -> type[Any]:
    """The client's kind of session (httpx's with huggingface_hub 1.x, httpx2's with 2.x), with limits."""
    library: Any = import_module(kind.__module__)

    class LimitedStream(library.SyncByteStream):  # type: ignore[misc]
        """The bytes of an answer, as long as they come in time and are not too many."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[bytes]:
            until, size = time.monotonic() + limits.read, 0
            for block in self.inner:
                size += len(block)
                if size > MAX_ANSWER:
                    raise ValueError(f"the answer has more than {MAX_ANSWER} bytes")
                if time.monotonic() > until:
                    raise HubSilentError(f"no whole answer within {limits.read:g} s")
                yield block

        def close(self) -> None:
            self.inner.close()

    pages: Counter[str] = Counter()

    class LimitedClient(kind):  # type: ignore[misc]
        patience, unlimited = limits, kind

        def send(self, request: Any, *, stream: bool = False, **settings: Any) -> Any:
            request.extensions["timeout"] = limits.extended(request.extensions.get("timeout"))
            if not limits.publishing:
                return super().send(request, stream=stream, **settings)
            pages[request.url.path] += request.method == "GET"
            if pages[request.url.path] > MAX_PAGES:
                raise ValueError(f"{request.url.path} has pages without end")
            try:
                response = super().send(request, stream=True, **settings)
                if not stream:
                    response.stream = LimitedStream(response.stream)
                    try:
                        response.read()
                    finally:
                        response.close()
            except library.ConnectTimeout:
                raise
            except library.TimeoutException as error:
                raise HubSilentError(f"no answer within {limits.read:g} s") from error
            _forget_long_waits(response.headers, limits.read)
            return response

    return LimitedClient


def _forget_long_waits(headers: Any, longest: float) -> None:
    """Take out how long a refusal asks to wait where that is longer: the client would sleep so long, up to five times."""
    limits = re.findall(r";\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    if any(int(seconds) > longest for seconds in limits):
        del headers["ratelimit"]
    wait = headers.get("retry-after", "").strip()
    if wait.isdigit() and int(wait) > longest:
        del headers["retry-after"]
