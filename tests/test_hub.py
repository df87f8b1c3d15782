import logging
import socket
import sys

import pytest
from transformers.utils import logging as theirs

from qcompile import hub
from qcompile.errors import LoadError, SpecError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("no address")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_a_name_or_a_proxy_is_needed(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hub.resolves()
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert hub.resolves()
    monkeypatch.delenv("https_proxy")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [("127.0.0.1", 443)])
    assert hub.resolves()


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("could not connect to it", "a/b is not in the local cache and the hub cannot be reached; go online, or give a "
                                    "directory or a .gguf file; or pip install it"),
        ("a/b is not a valid model identifier", "the hub has no model a/b, or it is private; look at its spelling"),
        ("401 Repository Not Found for url", "the hub has no model a/b, or it is private"),
        ("access to a/b is gated", "a/b is gated; accept its terms on the hub and run: hf auth login"),
        ("\nthe first line\nand more", "a/b does not load: the first line$"),
        ("", "a/b does not load: ValueError$"),
    ],
)  # fmt: skip
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, text: str, explanation: str) -> None:
    monkeypatch.setattr(hub, "resolves", lambda: True)
    with pytest.raises(LoadError, match=f"^{explanation}"), hub.explained("a/b", hint="pip install it"):
        raise ValueError(text)


def test_whatever_fails_offline_is_for_want_of_the_hub(offline: None) -> None:
    with pytest.raises(LoadError, match=r"cannot be reached; go online, or give a directory or a \.gguf file$"):
        with hub.explained("a/b"):
            raise KeyError("x")


def test_local_files_are_not_the_hubs_business(offline: None) -> None:
    with pytest.raises(LoadError, match=r"^folder does not load: cannot connect tensors$"):
        with hub.explained("folder", local=True):
            raise ValueError("cannot connect tensors")


def test_our_own_errors_stay() -> None:
    with pytest.raises(SpecError, match=r"^u9$"), hub.explained("a/b"):
        raise SpecError("u9")


@pytest.mark.parametrize("local", [True, False])
def test_quiet(capfd: pytest.CaptureFixture[str], local: bool) -> None:
    logger, before = logging.getLogger("huggingface_hub"), theirs.get_verbosity()
    level, bars = logger.level, theirs.is_progress_bar_enabled()
    with pytest.raises(KeyError), hub.quiet(local):
        assert (logger.level, theirs.get_verbosity()) == (logging.ERROR, logging.ERROR)
        assert not theirs.is_progress_bar_enabled()
        print("advice", file=sys.stderr)
        raise KeyError
    assert (logger.level, theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == (level, before, bars)
    assert ("advice" in capfd.readouterr().err) is not local
