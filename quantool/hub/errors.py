"""What goes wrong between the Hub and a push, in our words. Neither tokens nor signed addresses enter a message."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from quantool.errors import PublicationError
from quantool.hub.client import LOG_IN, HubSilentError
from quantool.runtime.progress import Progress

KEPT = "what is uploaded already is kept and not sent again"
ADVICE = {
    400: "the Hub does not accept the content; its words above say why",
    401: f"the token is not valid (any more), or there is no such repository: check repo_id; {LOG_IN}",
    402: "the account's plan or storage does not allow it; see the billing page of the account",
    403: "the token may not do this: give it write access to this repository, or ask the organization's admin",
    404: "no such repository, branch or collection, or this token cannot see it: check the names and HF_ENDPOINT",
    409: f"another operation on this repository is under way: run again in a minute; {KEPT}",
    412: f"somebody pushed meanwhile, nothing of it was overwritten: look at the branch, then run again; {KEPT}",
    413: "the Hub takes no files or commits of this size: ask for max_shard_size, or fewer levels a repository",
    422: f"the Hub received other bytes than were sent: run again; {KEPT}",
    429: f"the Hub limits how often it is asked: wait some minutes, then run again; {KEPT}",
    507: f"the storage of the account is full: free some or see its billing page, then run again; {KEPT}",
}
"""What to do, by status."""
TROUBLE = f"the Hub has trouble of its own: run again later; {KEPT}"
UNREACHABLE = f"check the network and HF_ENDPOINT, then run again; {KEPT}"
SHOWN = 300  # characters of the Hub's own words
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
"""Variables of the environment whose values are shown to nobody."""


class HubRefusedError(PublicationError):
    """The Hub answered with a status that says no."""

    def __init__(self, message: str, *, hint: str, status: int) -> None:
        super().__init__(message, hint=hint)
        self.status = status


@contextmanager
def hub_call(what: str) -> Iterator[None]:
    """Turn all that can come of asking the Hub into PublicationError: ``what`` did not work.

    Inside stand calls of the client, and code that takes its answers apart: an answer of another shape than the
    client knows shows as an error of its parsing. RuntimeError is what it and hf_xet raise for refused uploads.
    """
    from huggingface_hub.errors import HTTPError, OIDCError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OIDCError, OSError, RuntimeError, ValueError) as error:
        raise _explained(error, what) from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise unreadable(what) from error


def unreadable(what: str) -> PublicationError:
    """The error for an answer that says nothing of what was asked."""
    return PublicationError(
        f"{what}: the Hub's answer cannot be read",
        hint=f"check HF_ENDPOINT and the proxy, which may have answered in its place; {TROUBLE}",
    )


def _explained(error: BaseException, what: str) -> PublicationError:
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's in 1.x, httpx2's in 2.x

    while (
        isinstance(error, RuntimeError) and error.__cause__ is not None
    ):  # how the client wraps failed uploads
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        words = scrub(error.server_message or "")
        hint = ADVICE.get(status, TROUBLE if status >= 500 else "")
        return HubRefusedError(
            f"{what}: the Hub answers {status}{words and f' ({words})'}", hint=hint, status=status
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PublicationError(f"{what}: there is no token", hint=LOG_IN)
    if isinstance(error, HubSilentError):
        return PublicationError(
            f"{what}: {error}", hint=f"publish.read_timeout (--read-timeout) sets how long; {UNREACHABLE}"
        )
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return PublicationError(f"{what}: the connection failed ({type(error).__name__})", hint=UNREACHABLE)
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError)):
        return unreadable(what)
    return PublicationError(f"{what}: {scrub(str(error)) or type(error).__name__}", hint=f"run again; {KEPT}")


def scrub(text: str) -> str:
    """One short line without tokens and without the query part of addresses, which may be signed."""
    for own in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(own, "…")
    text = re.sub(r"\b(?:hf_|api_org_|eyJ)[\w.-]{8,}", "…", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


@contextmanager
def client_warnings(progress: Progress) -> Iterator[None]:
    """Let the client's warnings (retries, remarks on the card) reach the user through ``progress`` alone.

    Its own bars are left to terminals.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    class Forwarding(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            progress.warn(scrub(record.getMessage()))

    logger = logging.getLogger("huggingface_hub")
    handlers, handler = list(logger.handlers), Forwarding(logging.WARNING)
    silenced = not progress.terminal and not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: progress.warn(scrub(str(message)))
        logger.handlers[:] = [handler]
        if silenced:
            disable_progress_bars()
        try:
            yield
        finally:
            logger.handlers[:] = handlers
            if silenced:
                enable_progress_bars()
