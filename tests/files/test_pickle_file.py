"""pickle_file and unpickle: what torch.save writes reads back, and nothing in a file runs."""

import dataclasses
import enum
import io
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.files.pickle_file import PickleFile

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
]


def saved(path: Path, state: Any, **options: Any) -> PickleFile:
    torch.save(state, path / "x.bin", **options)
    return PickleFile(path / "x.bin")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves(tmp_path: Path, protocol: int) -> None:
    big = torch.arange(60).reshape(6, 10)
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    state |= {"view": big[1:3, 2:5], "transposed": big.t(), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    state |= {"parameter": nn.Parameter(torch.ones(3)), "one": big, "same": big}
    file = saved(tmp_path, state, pickle_protocol=protocol)
    assert list(file.tensors) == list(state)
    for name, want in state.items():
        got = file.read(name)
        assert torch.equal(got.double(), want.detach().double()), name
        assert got.dtype == want.dtype
        assert got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes
        assert (file.tensors[name].dtype, file.tensors[name].shape) == (want.dtype, tuple(want.shape))


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    file = saved(tmp_path, model.state_dict())
    assert set(file.tensors) == set(model.state_dict())
    assert torch.equal(file.read("0.weight"), model[0].weight)


def test_nested_mappings_are_named_by_their_path(tmp_path: Path) -> None:
    inner = {"W_q": torch.ones(2), "nbits": 4, "shape": torch.Size([2, 3]), "dtype": torch.float16, "bias": None}
    file = saved(tmp_path, {"a.b": {**inner, "meta": {"scale": torch.zeros(1), "on": {1, 2}}}})
    assert list(file.tensors) == ["a.b.W_q", "a.b.meta.scale"]
    assert {name: json.loads(text) for name, text in file.metadata.items()} == {
        "a.b.nbits": 4,
        "a.b.shape": [2, 3],
        "a.b.dtype": {"_type": "torch.dtype", "_data": "float16"},
        "a.b.bias": None,
        "a.b.meta.on": [1, 2],
    }


def test_torchao_is_flattened_as_in_its_safetensors_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torchao.quantization")

    class Mapping(enum.Enum):
        SYMMETRIC = 1

    @dataclasses.dataclass
    class Rule:
        dtype: torch.dtype
        mapping: Mapping

    class Int8Tensor(Tensor):
        @staticmethod
        def __new__(cls, qdata: Tensor, *_: Any) -> Any:
            return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.bfloat16)

        def __init__(self, qdata: Tensor, scale: Tensor, rule: Rule):
            self.qdata, self.scale, self.zero_point, self.rule, self.block_size = qdata, scale, None, rule, [1, 4]

        @classmethod
        def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    for kind in (Mapping, Rule, Int8Tensor):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    qdata, scale = torch.arange(8, dtype=torch.int8).reshape(2, 4), torch.ones(2, 1)
    weight = Int8Tensor(qdata, scale, Rule(torch.bfloat16, Mapping.SYMMETRIC))
    file = saved(tmp_path, {"up.weight": weight, "norm.weight": torch.ones(1)})

    assert list(file.tensors) == ["up._weight_qdata", "up._weight_scale", "norm.weight"]
    assert torch.equal(file.read("up._weight_qdata"), qdata)
    described = json.loads(file.metadata["up.weight"])
    assert described["_type"] == "Int8Tensor"
    assert described["_tensor_data_names"] == ["qdata", "scale"]
    data = described["_data"]
    assert (data["block_size"], data["shape"], data["zero_point"]) == ([1, 4], [2, 4], None)
    assert data["dtype"] == {"_type": "torch.dtype", "_data": "bfloat16"}
    member = data["rule"]["_data"].pop("mapping")
    assert data["rule"] == {"_type": "Rule", "_data": {"dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}}
    assert member["_type"] == "Mapping" and member["_data"] in ("SYMMETRIC", 1)


class Evil:
    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path / "x.bin", "w", compression) as file:
        file.writestr("x/data.pkl", pickled)
        for name, data in entries.items():
            file.writestr(f"x/data/{name}", data)
    return path / "x.bin"


def tensor(size: Any, stride: Any, offset: Any = 0, count: int = 4) -> bytes:
    """A pickle of {"w": a float32 tensor in storage "0"}."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if obj == "THE STORAGE" else None

    rebuild = torch._utils._rebuild_tensor_v2
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Evil(rebuild, ("THE STORAGE", offset, size, stride, False, {}))})
    return buffer.getvalue()


def test_nothing_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for call in [(open, (str(ran), "w")), (eval, (f"open({str(ran)!r}, 'w')",)), (getattr, (Path, "cwd"))]:
        with pytest.raises(CheckpointError, match=r"x\.bin: it asks for .*nothing of it was run"):
            PickleFile(archive(tmp_path, pickle.dumps({"w": Evil(*call)}, 2)))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((5,), (1,), 0), ((2, 2), (3, 2), 0), ((4,), (1,), 1), ((1 << 40,), (0,), 0), ((2,), (-1,), 1), ((4,), (), 0)]
    + [((4.0,), (1,), 0), ((True,), (1,), 0), (("4",), (1,), 0)],
)
def test_tensors_outside_their_storage(tmp_path: Path, size: Any, stride: Any, offset: Any) -> None:
    path = archive(tmp_path, tensor(size, stride, offset), **{"0": bytes(16)})
    with pytest.raises(CheckpointError, match=r"x\.bin: w: .*(does not fit into the 4 elements|is no tensor)"):
        PickleFile(path)


def test_unaligned_storage(tmp_path: Path) -> None:
    want = torch.arange(4, dtype=torch.float32)
    for pad in range(4):
        file = archive(tmp_path, tensor((4,), (1,)), **{"p" * (pad + 1): b"", "0": want.numpy().tobytes()})
        assert torch.equal(PickleFile(file).read("w"), want)


def _cycle() -> dict[str, Any]:
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    return cycle


def _laughs(item: Any) -> Any:
    for _ in range(19):
        item = {"a": item, "b": item, "c": item}
    return item


def _laughing_list() -> dict[str, Any]:
    item: Any = [1]
    for _ in range(18):
        item = [item, item, item]
    return {"a": item}


@pytest.mark.parametrize("made", [_cycle(), _laughs(1), _laughing_list(), {"n" * 2000: 1}])
def test_endless_entries(tmp_path: Path, made: Any) -> None:
    with pytest.raises(CheckpointError, match="without end"):
        PickleFile(archive(tmp_path, pickle.dumps(made, 2)))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickle.dumps([1]), "holds a list, not a mapping"),
        (pickle.dumps({1: 2}), "has the key 1, not a name"),
        (pickle.dumps({(1,): 2}), "a tuple is the key"),
        (b"\x80\x02}", "."),
        (b"\x80\x02}q\x00", "."),
        (b"\x80\x02t.", "."),
        (b"\x80\x02h\x07.", "."),
        (b"\x80\x02X\xff\xff\xff\xffab.", "."),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02K\x01)R.", "calls a int"),
        (b"\x80\x02K\x01}b.", "sets attributes of a int"),
        (b"\x80\x02K\x01Q.", "a int is no storage"),
        (b"", "."),
    ],
)
def test_pickles_that_are_none(tmp_path: Path, pickled: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PickleFile(archive(tmp_path, pickled))


def test_archives_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"x\.bin: it is no zip archive"):
        PickleFile(path)
    with pytest.raises(CheckpointError, match="compressed"):
        PickleFile(archive(tmp_path, pickle.dumps({"w": "n" * 1000}), zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="w: its storage '0' is missing"):
        PickleFile(archive(tmp_path, tensor((4,), (1,))))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/other", b"")
    with pytest.raises(CheckpointError, match="0 files"):
        PickleFile(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"}.")
        file.writestr("x/byteorder", b"big")
    with pytest.raises(CheckpointError, match="endian"):
        PickleFile(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_are_checkpoint_errors(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    torch.save({"a": {"w": torch.ones(2, 3), "n": 4}, "b": nn.Parameter(torch.ones(3))}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 10]))])
    try:
        file = PickleFile(path)
        for name in file.tensors:
            file.read(name)
    except CheckpointError as error:
        assert "x.bin" in str(error)


def test_open_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin\.index\.json"):
        open_checkpoint(tmp_path)
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({}, tmp_path / "training_args.bin")
    shards = {name: f"pytorch_model-0000{n}-of-00002.bin" for n, name in enumerate("ab", 1)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert open_checkpoint(tmp_path).read("b").shape == (2,)
    save_file({"c": torch.ones(3)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["c"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(CheckpointError, match="no file of weights in the folder"):
        open_checkpoint(tmp_path)


def test_files_by_names_of_their_own(tmp_path: Path) -> None:
    save_file({"c": torch.ones(3)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    torch.save({}, tmp_path / "other.bin")
    assert list(open_checkpoint(tmp_path).tensors) == ["c"]
    shards = {"c": "gptq_model-4bit-128g.safetensors"}
    (tmp_path / "gptq_model-4bit-128g.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    save_file({"d": torch.ones(3)}, tmp_path / "other.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["c"]
    torch.save({"e": torch.ones(3)}, tmp_path / "qmodel.pt")  # a usual name
    assert list(open_checkpoint(tmp_path).tensors) == ["e"]


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors, \.bin or \.pt file"):
        open_checkpoint(tmp_path)
    for name in ("x.pt", "y.pt"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 \.pt files"):
        open_checkpoint(tmp_path)
    (tmp_path / "y.pt").unlink()
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
