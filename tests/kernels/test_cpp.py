"""_cpp: our own C++ through Inductor's compiler."""

import logging
import threading

import pytest

from qcompile.kernels._cpp import compile_ahead, load_cpp


def test_what_the_compiler_says() -> None:
    with pytest.raises(RuntimeError, match=r"^[^\n]*error: [^\n]*$"):
        load_cpp("int f( { return 0; }")


def test_what_is_compiled_ahead() -> None:
    done: list[str] = []
    compile_ahead([lambda name=name: done.append(f"{name} in {threading.current_thread().name}") for name in "ab"])
    _wait()
    assert done == ["a in qcompile-cpp", "b in qcompile-cpp"]


def test_what_cannot_be_compiled_ahead(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    with caplog.at_level(logging.DEBUG, "qcompile"):
        compile_ahead([lambda: load_cpp("int f( { return 0; }"), lambda: done.append("b")])
        _wait()
    assert done == ["b"] and "Traceback" not in capfd.readouterr().err
    assert [r.levelno for r in caplog.records if "not compiled ahead" in r.message] == [logging.DEBUG]


def _wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "qcompile-cpp":
            thread.join()
