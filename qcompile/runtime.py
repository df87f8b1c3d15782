"""The forward of an optimized model: every call finds its compiled program, or one is made."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import threading
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qcompile import _torch, calls
from qcompile.again import Again, Bound
from qcompile.caches import Heads, allocate, heads_of
from qcompile.config import Config
from qcompile.errors import CaptureError, StrictError, UnsupportedError
from qcompile.pipeline import Outcome, Pipeline
from qcompile.plan import Plan, example_inputs
from qcompile.program import Program, draft_call, preview_call
from qcompile.replay import Replay
from qcompile.shelf import Shelf

log = logging.getLogger(__name__)

# Dynamo's limit is 8 for one function. A program is made per kind of call and per set of fixed sizes (batch 1 or more,
# one token or more), so a healthy model has two to four; this many means that something varies that should not.
PROGRAM_LIMIT = 32
# Calls that are recognized when they come again, of those that came last: prompts of several lengths, and their steps.
KNOWN_CALLS = 16

# torch's compiler is not safe to enter from two threads, nor beside a thread that runs the modules; programs are safe.
_COMPILING = threading.RLock()


class Runner:
    """Replaces `model.forward` on the instance. `model.forward.original` is the forward it stands for.

    Calls in training, under autograd, autocast or another tracer, and calls whose arguments have no stable form run the
    original forward on unpacked weights; `eager` counts them by reason.
    """

    def __init__(self, model: nn.Module, config: Config, plan: Plan, example: Mapping[str, Any] | None = None):
        self.model = model
        self.config = config
        self.plan = plan
        self.example = example
        self.original = model.forward
        self.__signature__ = inspect.signature(self.original)
        self._reset()

    def _reset(self) -> None:
        self.programs: dict[Any, list[Program]] = {}
        self.eager: Counter[str] = Counter()
        self.recalled = 0  # programs that were on disk
        self.unkept: str | None = None  # why none are kept there
        self._agains: deque[Again] = deque(maxlen=KNOWN_CALLS)
        # Each submodule: where it is kept, under which name, itself, its attributes.
        self._structure: tuple[tuple[Any, ...], ...] | None = None
        # As long as this number stays, no hook was registered on anything.
        self._hooks = RemovableHandle.next_id
        parameters = self.__signature__.parameters.values()
        self._rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
        # `*args` and arguments without a name of their own cannot be said by name.
        self._nameless = any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters)
        self._defaults = {p.name for p in parameters if p.default is None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._nameless:
            self._note("its forward takes arguments that have no name")
            return self.original(*args, **kwargs)
        kwargs = self._by_name(args, kwargs)
        # Programs run side by side. Finding one, and running the modules themselves, must not meet another thread's
        # capture, which puts fake tensors into the modules while it lasts.
        with _COMPILING:
            if isinstance(bound := self._bound(kwargs), str):
                self._note(bound)
                return self.original(**kwargs)
        program, weights, tensors, caches, form = bound
        return program(weights, tensors, caches, form)

    def bind(self, kwargs: Mapping[str, Any]) -> Bound | str:
        """The program of a call with these arguments, made if there is none yet, with the tensors for it; or why the
        call would run uncompiled."""
        with _COMPILING:
            return self._bound(self._by_name((), kwargs))

    def _bound(self, kwargs: Mapping[str, Any]) -> Bound | str:
        if (reason := self._why_eager()) is not None:
            return reason
        try:
            self._check_structure()
            return self._recognized(kwargs) or self._find(kwargs)
        except (CaptureError, UnsupportedError) as error:
            return str(error)

    def _note(self, reason: str) -> None:
        """Count a call that runs uncompiled; warn at the first one that nobody asked for."""
        if self.config.strict and reason not in _ORDINARY:
            raise StrictError(f"this call would run uncompiled: {reason}")
        if reason not in self.eager and reason not in _ORDINARY:
            warnings.warn(f"qcompile: this call runs uncompiled: {reason}", stacklevel=4)
        self.eager[reason] += 1

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name without those left at None, so that every way of saying one call is one call.

        Raises TypeError, as Python does, for arguments that the forward does not take.
        """
        named = dict(kwargs)
        if args:
            bound = self.__signature__.bind(*args, **kwargs)
            named = {name: value for name, value in bound.arguments.items() if name != self._rest}
            named |= bound.arguments.get(self._rest, {})
        return {name: value for name, value in named.items() if value is not None or name not in self._defaults}

    def _why_eager(self) -> str | None:
        if self.model.training:
            return TRAINING
        if _torch.is_tracing():
            return TRACED
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            return AUTOGRAD
        return None

    def _recognized(self, kwargs: Mapping[str, Any]) -> Bound | None:
        for again in self._agains:
            if (bound := again(kwargs)) is not None:
                if again is not self._agains[0]:
                    self._agains.remove(again)
                    self._agains.appendleft(again)
                return bound
        return None

    def _find(self, kwargs: Mapping[str, Any]) -> Bound:
        """The program for a call, made if there is none yet, with the tensors for it."""
        flat, _ = calls.flatten(kwargs)
        if self._allocate(flat):
            flat, _ = calls.flatten(kwargs)
        program, weights = self._known(flat) or self._made(flat, kwargs)
        again = Again(program, kwargs, flat, weights)
        self._agains.appendleft(again)
        return program, weights, flat.tensors, flat.caches, again.form

    def _made(self, flat: calls.Flat, kwargs: Mapping[str, Any]) -> tuple[Program, Sequence[Tensor]]:
        if sum(map(len, self.programs.values())) >= PROGRAM_LIMIT:
            raise UnsupportedError(f"{PROGRAM_LIMIT} programs are compiled already, and no one fits this call")
        program = self._compiled(flat, kwargs)
        if self.config.strict:
            program.outcome.insist()
        if self.config.cuda_graphs and flat.tensors and all(tensor.is_cuda for tensor in flat.tensors):
            first, stay = len(program.weights), flat.cached | program.written
            moving = [first + index for index in range(len(flat.tensors)) if index not in stay]
            program = replace(program, replay=Replay(program.run, moving))
        self.programs.setdefault(tuple(flat.key), []).append(program)
        return program, program.gather()

    def _compiled(self, flat: calls.Flat, kwargs: Mapping[str, Any]) -> Program:
        """The program for a call: of a draft that was kept on disk, or of one that is made now and kept."""
        pipeline = self.pipeline()
        # A dump is written while the passes run.
        off = not self.config.disk_cache or pipeline.dump is not None
        shelf = Shelf("program", self.config.to_json(), self.model, self.original, list(kwargs), flat.key, off=off)
        self.unkept = shelf.why_not
        for draft in shelf.entries():
            if draft.accepts(flat.tensors):
                try:
                    program = draft.compile(self.model)
                except Exception as error:  # whatever is wrong with it, it can be made again
                    log.warning("qcompile: a program from the cache on disk does not compile: %s", error)
                    continue
                self.recalled += 1
                return program
        draft = shelf.as_read(draft_call(self.model, self.original, kwargs, pipeline))
        program = draft.compile(self.model)
        shelf.keep(draft)
        return program

    def _known(self, flat: calls.Flat) -> tuple[Program, Sequence[Tensor]] | None:
        for program in self.programs.get(tuple(flat.key), ()):
            weights = program.gather()
            if program.takes(weights, flat.tensors):
                return program, weights
        return None

    def release(self) -> None:
        """Give up what is kept of calls to repeat them as CUDA graphs."""
        for program in itertools.chain(*self.programs.values()):
            if program.replay is not None:
                program.replay.release()

    def outcomes(self) -> tuple[Outcome, ...]:
        """What the passes did to each program; before the first call, to the example's."""
        made = tuple(program.outcome for programs in self.programs.values() for program in programs)
        return made or self._preview

    @functools.cached_property
    def _preview(self) -> tuple[Outcome, ...]:
        example = self.example or example_inputs(self.model)
        if example is None:
            return ()
        try:
            return (preview_call(self.model, self.original, example, self.pipeline()),)
        except (CaptureError, UnsupportedError):
            return ()

    @functools.cached_property
    def heads(self) -> list[Heads] | None:
        """What each layer's cache keeps of a token; None, with a warning, without a plain key/value cache."""
        try:
            with _COMPILING:
                shelf = Shelf("heads", self.model, self.original, off=not self.config.disk_cache)
                return shelf.recall(lambda: heads_of(self.model, self.original))
        except UnsupportedError as error:
            warnings.warn(f"qcompile: generate() runs over transformers' own cache: {error}", stacklevel=4)
            return None

    def _allocate(self, flat: calls.Flat) -> bool:
        """Give static caches that are still empty their memory; whether there were any."""
        fresh = [cache for cache in flat.caches if calls.is_unallocated(cache)]
        if fresh and self.heads is None:
            raise UnsupportedError("a static cache for a model whose cache layout is unknown")
        for cache in fresh:
            assert self.heads is not None
            parameter = next(p for p in self.model.parameters() if p.is_floating_point())
            allocate(cache, self.heads, flat.tensors[0].shape[0], parameter.dtype, flat.tensors[0].device)
        return bool(fresh)

    def pipeline(self) -> Pipeline:
        return Pipeline.of(self.config)

    def _check_structure(self) -> None:
        """Forget all programs if a submodule was exchanged or hooked since they were made (PEFT does)."""
        if self._structure is not None:
            owners, names, children, states = self._structure
            hooks, self._hooks = self._hooks, RemovableHandle.next_id
            hooked = hooks != self._hooks and any(s["_forward_pre_hooks"] or s["_forward_hooks"] for s in states)
            if not hooked and all(map(is_, map(dict.get, owners, names), children)):
                return
        self.programs.clear()
        self.recalled = 0
        self._agains.clear()
        found = [
            (module._modules, name, child, vars(child))
            for module in self.model.modules()
            for name, child in module._modules.items()
            if child is not None and not child._forward_pre_hooks and not child._forward_hooks
        ]
        self._structure = tuple(zip(*found, strict=True)) or ((), (), (), ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        twin = self._bare()
        memo[id(self)] = twin
        twin.model = memo[id(self.model)]
        twin.original = type(twin.model).forward.__get__(twin.model)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "config": self.config, "plan": self.plan, "example": self.example}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.original = type(self.model).forward.__get__(self.model)
        self.__signature__ = inspect.signature(self.original)
        self._reset()

    def _bare(self) -> Runner:
        twin = Runner.__new__(Runner)
        twin.config, twin.plan, twin.example = self.config, self.plan, self.example
        twin.__signature__ = self.__signature__
        twin._reset()
        return twin


TRAINING = "the model is in training mode"
AUTOGRAD = "autograd is on and parameters require gradients"
TRACED = "torch is tracing the model"
# Eager by the caller's wish: counted, not warned about.
_ORDINARY = {TRAINING, AUTOGRAD, TRACED}


def runner_of(model: nn.Module) -> Runner | None:
    """The Runner of an optimized model, None for any other."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, Runner) else None
