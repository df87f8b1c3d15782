"""Tile sizes of the attention kernels by shape class: numbers that were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompile.kernels._clusters import MOST, has_clusters
from qcompile.kernels._tiles import cdiv, power_of_two
from qcompile.kernels._tuning import Device, floor_power


@dataclass(frozen=True)
class AttentionTile:
    """What a program of attention_decode makes: `rows` query rows, from every splits-th block of `keys` keys, of which
    `beside` warps take a share each; powers of two. Its programs are a `cluster` or leave their parts in memory."""

    splits: int
    rows: int
    keys: int
    warps: int
    stages: int
    beside: int = 1
    cluster: bool = False


@dataclass(frozen=True)
class WarpsTile:
    """What programs of attention_warps make: `splits` of them read every splits-th block of keys each. They are a
    `cluster` or leave their parts in memory. The kernel behind starts when they do, or when they have read all keys.
    So many `pieces` of keys and values are fetched to the L2 cache, one behind the other, while the kernel before is
    not done, of so many keys a `piece`; and in shared memory is room for so many steps `ahead`."""

    splits: int
    cluster: bool
    early: bool
    pieces: int
    ahead: int = 1
    piece: int = 64


def warps_tile(pairs: int, keys: int, device: Device) -> WarpsTile:
    """For `pairs` sequences and key/value heads.

    NOTE: µs on an H100, calls behind one another: 8 pairs over 513 of 1024 keys 3.9 in clusters, 5.8 if the next kernel
    starts at once; 8192 keys 13.6, 14.4 by four pieces of 64 keys, in clusters of 8 parts 18.1 to 22.3; 128 pairs over
    513 of 1024 keys 14.1, 17.1 if the next kernel starts behind the keys, 15.8 with three steps ahead.
    """
    # A cluster reads all in one step, also where some of its programs find no keys.
    splits = power_of_two(cdiv(keys, 128))
    cluster = has_clusters(device) and 1 < splits <= MOST and 2 * pairs * splits <= device.processors
    if not cluster:
        splits = floor_power(min(cdiv(keys, 128), device.processors // pairs, 64))
    if keys <= 128 * splits:
        return WarpsTile(splits, cluster, not cluster, 1)
    pieces, piece = (4, 64) if splits == 1 else (8, 32)
    return WarpsTile(splits, cluster, not cluster, pieces, 2, piece)


def step_tile(pairs: int, keys: int, device: Device) -> WarpsTile | None:
    """As warps_tile, of attention_warps_into_cache; None where attention_tile is taken.

    NOTE: a layer of Llama-3-8B over 513 of 1024 keys, H100: 47.9 µs in clusters, 52.2 if the next kernel starts behind
    the keys; by attention_tile 48.9. Of parts that lie in memory 8192 keys 60.4 to 62.9 µs, by attention_tile 62.2, but
    513 of 8192 keys 52.0 to 53.3 and 50.7.
    """
    tile = warps_tile(pairs, keys, device)
    return replace(tile, early=True) if tile.splits == 1 or tile.cluster else None


def attention_tile(pairs: int, rows: int, keys: int, columns: int, itemsize: int, device: Device) -> AttentionTile:
    """For `pairs` sequences and key/value heads, with `rows` query rows for each; keys and values of `columns` columns.

    How many of the keys a mask leaves is not known here: programs share out what there is.
    """
    room = device.shared_bytes - (16 << 10)
    if itemsize > 2 or not device.tensor_cores:
        # Products of rows, keys and columns are in registers.
        block, warps, stages = 16, 4, 1
        tile_rows = min(power_of_two(rows), max(1, 8192 // (block * columns)))
    else:  # keys and values of all stages but one are in shared memory
        tile_rows = max(16, min(power_of_two(rows), 8192 // columns))
        block, warps, stages = 32 if tile_rows > 32 else 64, 4, 3
        if tile_rows == 16:
            block, warps = 128 if 2 * 128 * 2 * columns * itemsize <= room else 64, 8
    programs = pairs * cdiv(rows, tile_rows)
    splits = floor_power(min(cdiv(keys, block), device.processors // programs, 64))
    narrow = tile_rows == 16 and columns <= 128 and itemsize == 2  # more would be more sums than registers
    beside = 1
    if narrow and splits == 1 and keys <= 4096:
        # NOTE: a layer of Llama-3-8B at batch 16 over 513 of 1024 keys, H100: 95.5 µs with four warps side by side and
        # 64 keys, 96.4 with eight that share their sums and 128; over 8192 keys attention alone 189 and 183.
        block, warps, beside = 64, 4, 4
    one_step = keys <= block * splits
    while stages > 1 and (stages - 1) * block * 2 * columns * itemsize > room:
        stages -= 1
    if one_step:  # nothing to fetch ahead, but values while keys are awaited
        stages = min(stages, 2 if narrow and beside == 1 else 1)
    # NOTE: a layer of Llama-3-8B at batch 1 over 513 of 1024 keys, H100: 53.4 µs with `_combine`, warps side by side
    # and values read behind keys, 52.5 with both on their way at once, 51.7 when it is a cluster, too; four warps and
    # two steps of 64 keys 54.1. Over 8192 keys attention alone 17.3 µs with `_combine` and 16 parts, 19.7 to 27.4 in
    # clusters of 8 or 16.
    small = 2 * programs * splits <= device.processors
    cluster = has_clusters(device) and narrow and one_step and small and 1 < splits <= MOST
    return AttentionTile(splits, tile_rows, block, warps, stages, beside, cluster)


def codes_tile(pairs: int, rows: int, keys: int, columns: int, itemsize: int, device: Device) -> AttentionTile:
    """As attention_tile, for codes; the itemsize is that of queries. Programs beside one another on a multiprocessor
    hide each other's reading.

    NOTE: 32 heads over 8 of 128 columns, i8, H100, each timed once: 64 keys and four warps, two programs side by side,
    17.5, 48.9, 47.8 and 172 µs over 8192 and 32768 keys and at batch 16 over 2048 and 8192; 32 keys and two warps, four
    programs, which was the best of nine, 17.2, 46.1, 45.4 and 161. But over 513 of 1024 keys at batch 1, where each has
    one step, 8.3 and 11.0.
    """
    if itemsize > 2 or not device.tensor_cores:
        return attention_tile(pairs, rows, keys, columns, itemsize, device)
    tile_rows = max(16, min(power_of_two(rows), 32))
    programs, few = pairs * cdiv(rows, tile_rows), tile_rows * columns <= 2048

    def tile(block: int, warps: int, together: int) -> AttentionTile:
        splits = floor_power(min(cdiv(keys, block), together * device.processors // programs, 64))
        return AttentionTile(splits, tile_rows, block, warps, 1)

    if few and keys >= 4 * 32 * (small := tile(32, 2, 4)).splits:
        return small
    return tile(64 if columns <= 128 else 32, 4 if few else 8, 2)


def prompt_tile(columns: int, itemsize: int, device: Device) -> AttentionTile | None:
    """For many query rows; None without tensor cores for numbers of this size.

    NOTE: a causal prompt of 2048 tokens, 32 heads over 8 of 128 columns, H100: 127 µs; 128 rows by 64 keys, three
    stages, 132, by 128 keys 159; torch with the mask 220, with is_causal, which no cache has, 84.
    """
    if itemsize != 2 or not device.tensor_cores:
        return None
    rows, keys, warps, stages = 64, 32, 4 if columns <= 128 else 8, 2
    while (rows + stages * 2 * keys) * columns * itemsize > device.shared_bytes - (16 << 10):
        if stages > 1:
            stages = 1
        elif rows > 16:
            rows //= 2
        else:
            return None
    return AttentionTile(1, rows, keys, warps, stages)


def prompt_splits(programs: int, steps: int, device: Device) -> int:
    """Into how many parts the keys of as many programs are split, so that none of the processors is idle."""
    return floor_power(min(device.processors // programs, steps // 4, 16))
