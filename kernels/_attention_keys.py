"""Which keys a part of attention has that is made by warps with keys of their own.

`masks` are where the mask of the first key lies, how far the next one's is, how many keys there are, and which of them
is new and not in the cache yet, or None. Blocks of keys go to the parts in turn: for each step one of all warps, KEYS
keys for each; or, where all is IN_ONE step, one of each warp, so that a cache that is filled in part is work for all
programs.
"""

from __future__ import annotations

from qcompile.kernels._attention import is_attended
from qcompile.kernels._gluon import gl, gluon
from qcompile.kernels._tiles import fetch


@gluon.jit
def mask_of(masks, n, CACHED: gl.constexpr):
    """The mask of keys n, and which of them are attended to and lie in the cache already."""
    mask_ptr, mask_column, keys, new = masks
    inside = n < keys
    # The mask is not to wait for the number of the new key, which is read as well.
    in_cache = inside if new is None else inside & (n != new)
    if mask_ptr is None:
        return inside, in_cache
    else:
        mask = gl.load(mask_ptr + n.to(gl.int64) * mask_column, mask=inside, other=0, cache_modifier=CACHED)
        return mask, is_attended(mask) & in_cache


@gluon.jit
def part_of(n, KEYS: gl.constexpr, SPLITS: gl.constexpr, IN_ONE: gl.constexpr):
    """Whose part key n is in."""
    return n // (KEYS if IN_ONE else KEYS * gl.num_warps()) % SPLITS


@gluon.jit
def key_of(i, part, KEYS: gl.constexpr, SPLITS: gl.constexpr, IN_ONE: gl.constexpr):
    """The i-th key of a part."""
    BLOCK: gl.constexpr = KEYS if IN_ONE else KEYS * gl.num_warps()
    return (i // BLOCK * SPLITS + part) * BLOCK + i % BLOCK


@gluon.jit
def places(L: gl.constexpr, SPLITS: gl.constexpr, IN_ONE: gl.constexpr):
    """(warps, keys): the places of a step's keys behind its first."""
    P: gl.constexpr = gl.SliceLayout(2, L)
    APART: gl.constexpr = L.shape[1] * SPLITS if IN_ONE else L.shape[1]
    warp = gl.arange(0, L.shape[0], layout=gl.SliceLayout(1, P))
    return warp[:, None] * APART + gl.arange(0, L.shape[1], layout=gl.SliceLayout(0, P))[None, :]


@gluon.jit
def fetch_ahead(
    k_ptr, v_ptr, masks, part, K_ROW: gl.constexpr, V_ROW: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    SPLITS: gl.constexpr, IN_ONE: gl.constexpr, PIECE: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """Begin to bring this part's first keys and values to the L2 cache, those that are attended to by the mask as it is
    by now: the kernel before may have yet to write it. PIECE keys at a time, the next when these have come: what others
    read would wait behind all of them."""
    LINES: gl.constexpr = D // 64
    L: gl.constexpr = gl.BlockedLayout([1, 1], [16 // LINES, 2 * LINES], [gl.num_warps(), 1], [1, 0])
    # Where a piece has fewer keys than there are threads for, some have nothing to fetch.
    ROOM: gl.constexpr = max(PIECE, 16 // LINES * gl.num_warps())
    i = gl.arange(0, ROOM, layout=gl.SliceLayout(1, L))
    line = gl.arange(0, 2 * LINES, layout=gl.SliceLayout(0, L))[None, :]
    seen = ()
    for piece in gl.static_range(PIECES):  # past the L1 cache, in which nothing is to find it later
        in_cache = mask_of(masks, key_of(piece * PIECE + i, part, KEYS, SPLITS, IN_ONE), ".cg")[1]
        seen += (in_cache & (i < PIECE),)
    came = gl.full([ROOM, 2 * LINES], 0, gl.int32, L)
    for piece in gl.static_range(PIECES):
        n = key_of(piece * PIECE + i, part, KEYS, SPLITS, IN_ONE).to(gl.int64)[:, None]
        of_k, of_v = k_ptr + (n * K_ROW + line % LINES * 64), v_ptr + (n * V_ROW + line % LINES * 64)
        at = gl.where(line < LINES, of_k.to(gl.int64), of_v.to(gl.int64))
        # Two numbers that no compiler knows to be nearly always so: it is to wait for them.
        wanted = seen[piece][:, None] & (came != 0x7FC12345)
        fetch(at, wanted)
        if piece + 1 < PIECES:
            came = gl.load(at.to(gl.pointer_type(gl.int32), bitcast=True), mask=wanted, other=0, cache_modifier=".cg")


@gluon.jit
def own_steps(masks, part, steps, KEYS: gl.constexpr, SPLITS: gl.constexpr, IN_ONE: gl.constexpr):
    """For each thread the first of this part's steps in which it sees a key, and the one behind the last."""
    COUNT: gl.constexpr = 512 * gl.num_warps()
    BLOCK: gl.constexpr = gl.num_warps() * KEYS
    L: gl.constexpr = gl.BlockedLayout([16], [32], [gl.num_warps()], [0])
    lowest = gl.full([COUNT], 0, gl.int32, L) + steps
    highest = gl.full([COUNT], 0, gl.int32, L)
    i = gl.arange(0, COUNT, layout=L)
    for start in range(0, steps * BLOCK, COUNT):
        step = (start + i) // BLOCK
        _, seen = mask_of(masks, key_of(start + i, part, KEYS, SPLITS, IN_ONE), "")
        seen &= step < steps
        lowest = gl.where(seen, gl.minimum(lowest, step), lowest)
        highest = gl.where(seen, gl.maximum(highest, step + 1), highest)
    return lowest, highest
