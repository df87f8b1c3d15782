"""Times of linears on a GPU: one product done in several ways, on random weights that have to come from memory.

Kernels are compiled before, in processes of their own: one that hangs or takes the GPU's context down with it is left
out, and nothing else happens.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels._ways import TILES, Choice, Product
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_cuda import KERNELS
from qcompile.kernels.linear_dot import Around, dot
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Weights rotate through so many bytes, more than caches hold.
ROTATE_BYTES = 320e6
# How long a kernel may take to compile, in seconds.
PATIENCE = 120
# A process that compiles has a context on the GPU, and may hold a large weight.
PROCESSES, PROCESS_BYTES = 12, 2 << 30

Trial = tuple[Product, Choice]


class Bench:
    """Products of one GPU. Methods raise what a launch raises, torch.OutOfMemoryError too."""

    def __init__(self, device: torch.device, copies: int | None = None):
        self.device, self.copies = device, copies
        self.held: tuple[Any, list[Weight]] = None, []
        self.known: dict[Any, bool] = {}  # do kernels compile?
        self.idle: list[subprocess.Popen[str]] = []  # processes that wait for some

    def us(self, product: Product, choice: Choice) -> float:
        """The median time of one product. `dot` has a norm in front every other time, as in a decoding step."""
        x, (way, tile) = self._x(product), choice
        calls: list[Callable[[], Any]] = []
        around = Around(norm_weight=self._x(product._replace(rows=1))[0], eps=1e-5)
        for index, weight in enumerate(self._weights(product)):
            if way == "dot" and index % 2:
                calls.append(lambda weight=weight: dot(x, weight, None, around, tile))  # type: ignore[arg-type]
            else:
                calls.append(lambda weight=weight: KERNELS[way](x, weight, None, None, tile))
        with torch.cuda.device(self.device):
            return median_us(calls)

    def agree(self, product: Product, one: Choice, other: Choice) -> bool:
        """Do both give the same, within rounding, and again each time?"""
        x, weight = self._x(product), self._weights(product)[0]
        want = KERNELS[one.way](x, weight, None, None, one.tile).double()
        for _ in range(3):
            got = KERNELS[other.way](x, weight, None, None, other.tile).double()
            if not (got - want).norm() < 0.01 * want.norm():
                return False
        return True

    def run(self, product: Product, choice: Choice) -> None:
        """Compile what this choice launches."""
        KERNELS[choice.way](self._x(product), self._weights(product)[0], None, None, choice.tile)
        torch.cuda.synchronize(self.device)

    def check(self) -> None:
        """Raises what is wrong with the GPU's context."""
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give up the weights' memory."""
        self.held = None, []
        torch.cuda.empty_cache()

    def close(self) -> None:
        """End the processes that compile."""
        while self.idle:
            _end(self.idle.pop())

    def compile(self, trials: Sequence[Trial], tick: Callable[[], object]) -> set[Trial]:
        """Those that compile and launch. `tick` is called for each."""
        new = {key: trial for trial in trials if (key := _kernel(*trial)) not in self.known}
        self.release()  # its memory is theirs
        free, _ = torch.cuda.mem_get_info(self.device)
        count = max(1, min(PROCESSES, len(new), (os.cpu_count() or 2) - 1, len(self.idle) + free // PROCESS_BYTES))
        todo: queue.SimpleQueue[tuple[Any, Trial]] = queue.SimpleQueue()
        for item in new.items():
            todo.put(item)
        with ThreadPoolExecutor(count) as pool:
            try:
                for part in pool.map(lambda _: dict(_compile_apart(todo, self.device, self.idle, tick)), range(count)):
                    self.known |= part
            finally:  # where somebody interrupts it, nothing more is begun
                with suppress(queue.Empty):
                    while True:
                        todo.get_nowait()
        for _ in range(len(trials) - len(new)):
            tick()
        return {trial for trial in trials if self.known[_kernel(*trial)]}

    def _x(self, product: Product) -> Tensor:
        return torch.randn(product.rows, product.inputs, device=self.device, dtype=product.dtype)

    def _weights(self, product: Product) -> list[Weight]:
        key = product.spec, product.outputs, product.inputs
        if self.held[0] != key:
            self.held = None, []
            self.held = key, _random_weights(*key, product.dtype, self.device, self.copies)
        return self.held[1]


def median_us(calls: Sequence[Callable[[], Any]], at_least: int = 24) -> float:
    """Median time of one call, in a graph that makes all of them as often as it takes to have `at_least`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = max(1, math.ceil(at_least / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    graph.replay()
    torch.cuda.synchronize()
    began = time.time()
    while len(times) < 7 or (len(times) < 40 and time.time() - began < 0.015):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return sorted(times)[len(times) // 2] * 1e3 / (rounds * len(calls))


def _random_weights(
    spec: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device, copies: int | None
) -> list[Weight]:
    """Equal weights at places of their own, of finite numbers; a row times normal ones is about 1."""
    # Scales that are quantized themselves are unpacked before the kernel.
    parsed = replace(QSpec.parse(spec), scale_spec=None, zero_spec=None)
    element, groups, some = parsed.element, parsed.scale_shape(rows, columns), min(rows, 1024)
    numbers = element.decode(torch.arange(element.levels, dtype=torch.uint8, device=device), torch.float32)
    finite = numbers.isfinite()
    codes = torch.randint(0, element.levels, (some, columns), dtype=torch.uint8, device=device)
    codes = torch.where(finite[codes.int()], codes, 1)
    size = 1 / (numbers[finite].square().mean().sqrt() * columns**0.5)
    scale = ((torch.rand(groups, device=device) + 0.25) * size).to(dtype)
    zero = None
    if parsed.zero is Zero.INT:
        zero = torch.randint(0, element.levels, groups, dtype=torch.uint8, device=device)
    elif parsed.zero is not Zero.NONE:
        most = element.levels if parsed.zero is Zero.FLOAT else columns**-0.5
        zero = (torch.rand(groups, device=device) * most).to(dtype)
    data = QTensor.from_codes(parsed, codes, *_sides_of(parsed, some, columns, scale, zero)).data
    data = data[torch.arange(rows, device=device) % some]
    count = copies or max(2, min(160, math.ceil(ROTATE_BYTES / data.nbytes)))
    parts = [(data, scale, zero)]
    parts += [(data.clone(), scale.clone(), None if zero is None else zero.clone()) for _ in range(count - 1)]
    return [Weight.of(*part, spec, columns) for part in parts]


def _sides_of(spec: QSpec, rows: int, columns: int, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of the first rows."""
    count = spec.scale_shape(rows, columns)[0]
    return scale[:count], None if zero is None else zero[:count]


# Kernels compiled by other processes


def _kernel(product: Product, choice: Choice) -> tuple[Any, ...]:
    """What a launch is compiled for: a kernel's constants, and what Triton finds out about its sizes."""
    way, tile = choice
    counts = {name: count > 1 if name in ("splits", "parts") else count for name, count in vars(tile).items()}
    sizes = [(size % 16 == 0, size == 1) for size in (product.rows, product.outputs, product.inputs)]
    exact = (product.inputs, product.rows) if way in ("dot", "gemv") else product.inputs % 1024
    return product.spec, product.dtype, way, *counts.values(), *sizes, exact


def _compile_apart(
    todo: queue.SimpleQueue[tuple[Any, Trial]],
    device: torch.device,
    idle: list[subprocess.Popen[str]],
    tick: Callable[[], object],
) -> Iterator[tuple[Any, bool]]:
    """Have a process, an idle one if there is any, compile what there is to do: could it?"""
    process = None
    while True:
        try:
            key, trial = todo.get_nowait()
        except queue.Empty:
            break
        process = process or _any_of(idle) or _start(device)
        answer = _ask(process, trial)
        if not answer:  # it has ended
            _end(process)
            process = None
        # What it has no memory for is not what cannot be compiled.
        yield key, answer in ("compiled", torch.OutOfMemoryError.__name__)
        tick()
    if process is not None:
        idle.append(process)


def _any_of(idle: list[subprocess.Popen[str]]) -> subprocess.Popen[str] | None:
    try:
        return idle.pop()
    except IndexError:
        return None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def _start(device: torch.device) -> subprocess.Popen[str]:
    code = f"from qcompile.timing import serve; serve({str(device)!r})"
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


def _ask(process: subprocess.Popen[str], trial: Trial) -> str:
    """What the process says of it, within its time; nothing if it ended over it."""
    product, (way, tile) = trial
    assert process.stdin is not None and process.stdout is not None
    sizes = [*product[:4], str(product.dtype).removeprefix("torch."), product.integers]
    watch = threading.Timer(PATIENCE, process.kill)
    watch.start()
    try:
        process.stdin.write(json.dumps([sizes, way, vars(tile)]) + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()
    except OSError:  # it did not even begin
        return ""
    finally:
        watch.cancel()


def serve(device: str) -> None:
    """Compile what standard input asks for, one line each. A process whose context is broken ends."""
    bench = Bench(torch.device(device), copies=1)
    for line in sys.stdin:
        (spec, rows, outputs, inputs, dtype, integers), way, counts = json.loads(line)
        product = Product(spec, rows, outputs, inputs, getattr(torch, dtype), integers)
        try:
            bench.run(product, Choice(way, TILES[way](**counts)))
            print("compiled", flush=True)
        except Exception as error:  # whatever it is, this choice is none
            torch.cuda.synchronize(device)
            print(type(error).__name__, flush=True)
