"""With _guards.py the one place that touches private parts of torch. Checked on torch 2.11, 2.13 and 2.14."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves


@contextmanager
def tracing_in_this_thread() -> Iterator[None]:
    """While torch traces, modules of other threads keep their own methods, and nodes get no stack traces.

    Tracers replace nn.Module.__call__ and __getattr__ for the whole process, so that any module called in another
    thread meanwhile would be recorded, and break the trace and the call. One thread at a time may be inside.
    Stack traces are a sixth of the time that a capture takes, and nobody reads them.
    """
    from torch.fx import proxy
    from torch.fx._symbolic_trace import _Patcher

    tracer: Any = proxy
    owner, patch_method = threading.get_ident(), _Patcher.patch_method

    def patch_here(self: Any, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        old = getattr(cls, name)

        @functools.wraps(old)
        def method(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if threading.get_ident() == owner else old)(*args, **kwargs)

        patch_method(self, cls, name, method, deduplicate)

    if patch_method.__name__ == patch_here.__name__:  # entered already, further up
        yield
        return
    _Patcher.patch_method, traceback = patch_here, tracer.CapturedTraceback

    def extract(*args: Any, **kwargs: Any) -> Any:
        return _NoTraceback if threading.get_ident() == owner else traceback.extract(*args, **kwargs)

    tracer.CapturedTraceback = SimpleNamespace(extract=extract)
    try:
        yield
    finally:
        _Patcher.patch_method, tracer.CapturedTraceback = patch_method, traceback


class _NoTraceback:
    """A captured traceback of nothing."""

    @staticmethod
    def summary() -> tuple[()]:
        return ()


@contextmanager
def without_reports() -> Iterator[None]:
    """Of ops that fail on fake tensors torch prints tracebacks, besides raising: not while an error is expected."""
    reports = logging.getLogger("torch._subclasses.fake_tensor")
    before, reports.disabled = reports.disabled, True
    try:
        yield
    finally:
        reports.disabled = before


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode behind the first fake tensor among `values`, or None."""
    return next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)


@contextmanager
def _faking(values: Sequence[Any]) -> Iterator[None]:
    """Ops take these values, among which there may be fake tensors with symbolic sizes."""
    from torch._dispatch.python import enable_python_dispatcher

    mode = fake_mode_of(values)
    if mode is None:
        yield
        return
    # In torch 2.11 the C++ of ops such as linear asks for sizes as numbers, their Python twins do not.
    with mode, enable_python_dispatcher():
        yield


def in_one_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are views of one storage."""
    return torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]


def call_on_fakes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` where some arguments, or what is nested in them, may be fake tensors."""
    with _faking(tree_leaves((args, kwargs))):
        return function(*args, **kwargs)


def inductor(gm: GraphModule, fakes: Sequence[Any], patches: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile an inference graph whose placeholders are described by `fakes`; the result takes the same inputs.

    What it is given is not checked: the caller has.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx

    if not any(isinstance(fake, torch.Tensor) and fake.is_cuda for fake in fakes):
        know_processor()
    context = TracingContext.try_get() or TracingContext(fake_mode_of(fakes))
    with torch.no_grad(), tracing(context), tracing_in_this_thread(), _mended_inductor():
        return cast(
            Callable[..., Any], compile_fx(gm, list(fakes), config_patches={"size_asserts": False} | (patches or {}))
        )


_WATCHING = threading.Lock()
# What the Python that Inductor writes does beside calling C++ of its own.
_MAKES_TENSORS = {"size", "stride", "clear", "empty_strided_cpu", "reinterpret_tensor", "torch"}


def kernel_call(
    compiled: Callable[..., Any], args: Sequence[Any]
) -> tuple[Callable[[], Any], Sequence[torch.Tensor]] | None:
    """What `inductor` compiled, on these arguments for ever: the call of C++ that it consists of, and the tensors in
    which that leaves its results. None where it is more than one such call.

    That is a few microseconds of Python; with what surrounds it, where little is in the processor's caches, fifty.
    """
    from torch._inductor.output_code import CompiledFxGraph

    owner, original = threading.get_ident(), CompiledFxGraph.__call__
    seen: list[tuple[Any, list[Any], Any]] = []

    def watched(self: Any, inputs: Sequence[Any]) -> Any:
        if threading.get_ident() != owner:
            return original(self, inputs)
        given = list(inputs)  # the call clears its list
        seen.append((self.current_callable, given, made := original(self, inputs)))
        return made

    with _WATCHING:
        CompiledFxGraph.__call__ = watched  # type: ignore[method-assign]
        try:
            results = compiled(*args)
        finally:
            CompiledFxGraph.__call__ = original  # type: ignore[method-assign]
    if len(seen) != 1:
        return None
    ((call, given, made),) = seen
    function = getattr(call, "__func__", call)
    names = set(getattr(getattr(function, "__code__", None), "co_names", ()))
    kernels = [name for name in names if name.startswith("cpp_fused")]
    dtypes = {name for name in names if isinstance(getattr(torch, name, None), torch.dtype)}
    # Results are the call's own, not views of them or of inputs that are made behind it.
    is_whole = list(map(id, results)) == list(map(id, made))
    if len(kernels) != 1 or names.difference(kernels, dtypes, _MAKES_TENSORS) or not is_whole:
        return None
    calls: list[Callable[[], Any]] = []
    kernel = function.__globals__[kernels[0]]

    def noted(*arguments: Any) -> Any:
        calls.append(functools.partial(kernel, *arguments))
        return kernel(*arguments)

    scope = function.__globals__ | {kernels[0]: noted}
    twin = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    outputs = twin(*(() if function is call else (call.__self__,)), given)
    return (calls[0], outputs) if len(calls) == 1 else None


def inductor_training(gm: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph of Dynamo's as it is, forward and backward."""
    from torch._inductor.compile_fx import compile_fx

    with _mended_inductor():
        return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=patches))


@contextmanager
def _mended_inductor() -> Iterator[None]:
    """Inductor with our mend, and apart in its cache from what it compiled without."""
    _mend_loop_split()
    tag = f"{torch.compiler.config.cache_key_tag}+qcompile"
    with torch.compiler.config.patch(cache_key_tag=tag):  # pyright: ignore[reportAttributeAccessIssue]
        yield


@functools.cache
def _mend_loop_split() -> None:
    """Keep Inductor's C++ from leaving out ends of loops.

    Where an index is x // 48, it makes two loops of the one over x, the inner one of 48 rounds; without asking whether
    48 divides the rounds of x, as scales of tiles that are cut off do not (torch 2.11 to 2.14). Here it asks.
    """
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.virtualized import V
    from torch.utils._sympy.functions import FloorDiv

    split = getattr(CppScheduling, "try_loop_split", None)
    if split is None:  # a later torch that splits no loops
        return

    def divides(node: Any) -> bool:
        _, body, _ = node.node.get_default_sizes_body()
        expressions = [expression for expression in body.indexing_exprs.values() if hasattr(expression, "find")]
        quotients = [quotient.args for expression in expressions for quotient in expression.find(FloorDiv)]
        known = V.graph.sizevars.statically_known_multiple_of
        return all(known(body.var_ranges[x], number) for x, number in quotients if x in body.var_ranges)

    def try_loop_split(self: Any, nodes: list[Any]) -> list[Any]:
        return split(self, nodes) if all(divides(node) for node in nodes) else nodes

    CppScheduling.try_loop_split = try_loop_split  # type: ignore[method-assign]


def dumps(value: Any) -> bytes:
    """Pickle what holds graphs and fake tensors. Raises whatever pickle does where it cannot."""
    from torch.fx._graph_pickler import GraphPickler, Options

    options = Options(ops_filter=None, node_metadata_key_filter=lambda key: key == "val")
    return GraphPickler.dumps(value, options)


def loads(data: bytes) -> Any:
    """What `dumps` made bytes of, over symbolic sizes of its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return GraphPickler.loads(data, FakeTensorMode(shape_env=ShapeEnv()))


def cache_root() -> str | None:
    """The folder of Inductor's caches on disk; None where caches are off."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else cache_dir()


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a mode of torch.compile."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode not in (None, "default") else {}


def source_name(node: Node) -> str:
    """Where an input of a Dynamo graph comes from, such as L['self']._modules['fc']._parameters['weight']."""
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return node.name
    name = source.name
    return str(name() if callable(name) else name)


def trace(function: Callable[..., Any], fakes: Sequence[Any], pre_dispatch: bool = False) -> GraphModule:
    """The ATen graph of `function` on tensors, fake ones with possibly symbolic sizes; every node has meta["val"]."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    with torch.no_grad(), preserve_node_meta(), _faking(fakes), tracing_in_this_thread():
        return make_fx(function, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*fakes)


def run_fake(function: Callable[[], Any]) -> Any:
    """Run `function` without computing: every tensor in it, parameters too, is turned into a fake one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        return function()


def dynamo_fakes(gm: GraphModule) -> list[Any]:
    """The fake inputs that Dynamo traced a graph with."""
    return [node.meta.get("example_value", node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder")]


def cpp_library(source: str) -> ctypes.CDLL:
    """C++ built by Inductor's builder, from its cache on disk if it was built before."""
    from torch._inductor.codecache import CppCodeCache

    know_processor()
    return CppCodeCache.load(source)


_KNOWING = threading.Lock()


def know_processor() -> None:
    """Let Inductor find out what the processor can do, which it remembers, in one thread at a time.

    In two at once it mistakes the flags of one trial for the next one's base: it would compile with other flags than
    another process, and find nothing of that one's in its cache (torch 2.11 to 2.14).
    """
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    with _KNOWING:
        valid_vec_isa_list()


@functools.cache
def compiler_available() -> str | None:
    """None if Inductor can build C++ here, else the reason why not."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler: {error}"
    return None


def is_tracing() -> bool:
    """Whether torch is tracing the program that calls this: torch.compile, torch.export, make_fx."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or get_proxy_mode() is not None
