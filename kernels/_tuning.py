"""Tile sizes by shape class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemvTile:
    """rows of the weight and 16-byte chunks of each that a program takes a step."""

    rows: int
    chunks: int
    warps: int
    stages: int = 1
