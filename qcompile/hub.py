"""The hub, and transformers, as a user meets them: is it there, what do its errors mean, what need not be said."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator

from qcompile.errors import LoadError, QCompileError


def resolves() -> bool:
    """Whether the hub has an address here; with a proxy that is the proxy's business."""
    from huggingface_hub import constants

    url = urllib.parse.urlsplit(constants.ENDPOINT)
    if url.scheme in urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(url.hostname, url.port or 443))
    except OSError:
        return False


@contextlib.contextmanager
def explained(name: str, local: bool = False, hint: str = "") -> Iterator[None]:
    """Other people's exceptions about the model `name` as one LoadError that says what to do, among it `hint` where the
    hub cannot be reached. A configuration with a value of the wrong type may raise any."""
    try:
        yield
    except QCompileError:
        raise
    except Exception as error:
        raise LoadError(_explanation(name, local, hint, error)) from error


def _explanation(name: str, local: bool, hint: str, error: Exception) -> str:
    text = str(error)
    first = text.strip().partition("\n")[0] or type(error).__name__
    if local:
        return f"{name} does not load: {first}"
    if "connect" in text or "local_files_only" in text or "cached" in text or not resolves():
        return (
            f"{name} is not in the local cache and the hub cannot be reached; "
            f"go online, or give a directory or a .gguf file{hint and '; or ' + hint}"
        )
    if "not a valid model identifier" in text or "Repository Not Found" in text:
        return f"the hub has no model {name}, or it is private; look at its spelling, or run: hf auth login"
    if "gated" in text:
        return f"{name} is gated; accept its terms on the hub and run: hf auth login"
    return f"{name} does not load: {first}"


@contextlib.contextmanager
def quiet(local: bool) -> Iterator[None]:
    """Without progress bars and advice while a local file is read; a download keeps its bar."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext():
            yield
    finally:
        theirs.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            theirs.enable_progress_bar()
