"""What C++ does with memory that it was given once: when it is called, or behind each call of a chain."""

from __future__ import annotations

import ctypes
import weakref


class Follower:
    """`bound`, made by one of the functions bind_… of cpu/likeliest.h, in memory that `kept` keeps alive."""

    def __init__(self, op: ctypes.CDLL, bound: int, kept: object):
        self.op, self.bound, self.kept = op, bound, kept
        weakref.finalize(self, op.release_follower, bound)
