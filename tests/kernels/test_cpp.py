"""_cpp: our own C++ through Inductor's compiler."""

import threading

import pytest

from qcompile.kernels._cpp import compile_ahead, load_cpp


def test_what_the_compiler_says() -> None:
    with pytest.raises(RuntimeError, match=r"^[^\n]*error: [^\n]*$"):
        load_cpp("int f( { return 0; }")


def test_what_is_compiled_ahead() -> None:
    done: list[str] = []
    compile_ahead([lambda name=name: done.append(f"{name} in {threading.current_thread().name}") for name in "ab"])
    for thread in threading.enumerate():
        if thread.name == "qcompile-cpp":
            thread.join()
    assert done == ["a in qcompile-cpp", "b in qcompile-cpp"]
