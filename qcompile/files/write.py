"""Writing a folder so that at every moment it is either the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

# Files of a checkpoint, which the new one replaces as a whole. Everything else in the folder stays.
WEIGHTS = ("model*.safetensors", "*.index.json", "pytorch_model*.bin", "model*.gguf", "qmodel.pt", "quanto_qmap.json")
CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")

EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
AT_FDCWD = -100


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends; if it fails, nothing changes.

    On Linux the two are exchanged in one step of the file system, so that a process killed at any time leaves the old
    or the new one whole. Elsewhere the old one is moved aside first. Files that are no part of a checkpoint move on.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    fresh = Path(tempfile.mkdtemp(prefix=_prefix(folder, os.getpid()), dir=folder.parent))
    fresh.chmod(0o777 & ~_umask())
    try:
        yield fresh
        for file in sorted(fresh.rglob("*")):
            _sync(file)
        if folder.exists():
            _keep_others(folder, fresh)
        _sync(fresh)
        _swap(fresh, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # the old one by now, or what was begun


def write_shards(
    folder: Path, tensors: Mapping[str, Callable[[], Tensor]], largest: int, metadata: Mapping[str, str]
) -> None:
    """Write tensors as model.safetensors, or as shards of at most `largest` bytes with an index, in the order given.

    Each tensor is made when its shard is written, so that one shard is in memory at a time.
    """
    shards: list[dict[str, Tensor]] = [{}]
    names: list[list[str]] = [[]]
    size, written = 0, []
    for name, make in tensors.items():
        tensor = make().detach().contiguous().cpu()
        if names[-1] and size + tensor.nbytes > largest:
            written.append(_shard(folder, len(written) + 1, shards.pop(), metadata))
            shards.append({})
            names.append([])
            size = 0
        # safetensors takes no two tensors over one memory; siblings are rows of one.
        shards[-1][name] = tensor.clone()
        names[-1].append(name)
        size += tensor.nbytes
    written.append(_shard(folder, len(written) + 1, shards.pop(), metadata))
    if len(written) == 1:
        written[0].rename(folder / "model.safetensors")
        return
    total = sum(file.stat().st_size for file in written)
    places = {}
    for number, (file, own) in enumerate(zip(written, names, strict=True), start=1):
        final = f"model-{number:05}-of-{len(written):05}.safetensors"
        file.rename(folder / final)
        places.update(dict.fromkeys(own, final))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shard(folder: Path, number: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    path = folder / f"shard-{number:05}"
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    return path


def _prefix(folder: Path, pid: int) -> str:
    return f".{folder.name}.saving-{pid}-"


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside the folder."""
    for path in folder.parent.glob(f".{folder.name}.saving-*"):
        found = re.match(re.escape(f".{folder.name}.saving-") + r"(\d+)-", path.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _keep_others(old: Path, new: Path) -> None:
    for path in old.iterdir():
        replaced = any(fnmatchcase(path.name, pattern) for pattern in (*WEIGHTS, *CONFIGS))
        if replaced or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _sync(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`; afterwards `fresh` names the old one, if there was one."""
    if not folder.exists():
        fresh.rename(folder)
        return
    if _exchange(fresh, folder):
        return
    aside = fresh.with_name(fresh.name + "-old")
    folder.rename(aside)
    fresh.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0
