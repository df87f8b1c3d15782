"""Static scales of key/value caches: read by load(), executed by generate(), kept by save()."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompile
from qcompile.caches import KeptCaches, cache_codes
from qcompile.errors import CheckpointError
from qcompile.load import load
from qcompile.quantized_layer import QuantizedStaticLayer
from qcompile.stores import CacheScales

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
ATTENTION = "model.layers.0.self_attn"
NAMES = {
    "ct-fp8-static-kvcache": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
    "quark-fp8-kvcache": (f"{ATTENTION}.k_proj.output_scale", f"{ATTENTION}.v_proj.output_scale"),
}
each_checkpoint = pytest.mark.parametrize("name", NAMES)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """To float8 by a static scale, in float32 as everybody does it."""
    return (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale.to(x.dtype)


def reference(model: Any, tokens: Tensor, scales: list[Tensor]) -> Tensor:
    """Logits in float64 over a cache that rounds what it gets."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(rounded(keys, scales[0]), rounded(values, scales[1]), *args, **kwargs)

    with torch.no_grad():
        return model.double()(tokens, past_key_values=Rounding()).logits


def generate(model: Any, x: Tensor, **options: Any) -> Any:
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None) | options
    options |= dict(return_dict_in_generate=True, output_logits=True, attention_mask=torch.ones_like(x))
    return model.generate(x, **options)


def opened(folder: Path, **options: Any) -> Any:
    return load(str(folder), dtype=torch.float32, quantize_inputs=False, progress=False, **options)


@each_checkpoint
def test_logits(name: str) -> None:
    """Those of each step, over scales that the checkpoint has and with many numbers beyond the largest code."""
    model = qcompile.optimize(opened(CHECKPOINTS / name), progress=False)
    x = torch.randint(3, 200, (2, 8))
    out = generate(model, x)
    (layer,) = out.past_key_values.layers
    assert type(layer) is QuantizedStaticLayer and layer.keys is not None and layer.keys.dtype == torch.uint8
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    scales = [tensors[tensor].float() for tensor in NAMES[name]]
    assert (layer.key_scales == scales[0]).all() and (layer.value_scales == scales[1]).all()
    plain = opened(CHECKPOINTS / name).double()
    want = reference(plain, out.sequences, scales)[:, 7:-1]
    got = torch.stack(out.logits, 1)
    # A number between two codes falls to either side.
    assert (got - want).norm() <= 1e-2 * want.norm()
    assert (want - plain(out.sequences).logits[:, 7:-1]).norm() > 2 * (got - want).norm()
    report = qcompile.explain(model)
    assert report.kv_cache == "fp8_e4m3, static scales" and "keys and values as fp8_e4m3, static scales" in str(report)
    assert not report.eager


def test_the_config_says_otherwise(interpreted: None) -> None:
    x = torch.randint(3, 200, (1, 4))
    for said, dtype in (("i8", torch.int8), ("none", torch.float32)):
        model = qcompile.optimize(opened(CHECKPOINTS / "ct-fp8-static-kvcache"), kv_cache=said, progress=False)
        (layer,) = generate(model, x, max_new_tokens=2).past_key_values.layers
        assert layer.keys.dtype == dtype and not getattr(layer, "fixed", False)
        says = {"i8": "i8, a scale for each token and head", "none": None}[said]
        assert qcompile.explain(model).to_dict()["kv_cache"] == says


@each_checkpoint
@pytest.mark.parametrize("format", ["qcompile", "compressed-tensors"])
def test_saved(tmp_path: Path, name: str, format: str) -> None:
    model = opened(CHECKPOINTS / name)
    qcompile.save(model, tmp_path / "saved", format, requantize=True, progress=False)
    again = opened(tmp_path / "saved")
    one, other = (m.get_submodule(f"{ATTENTION}.cache_scales") for m in (model, again))
    assert isinstance(other, CacheScales) and other.element == "fp8_e4m3"
    assert all(torch.equal(getattr(one, side), getattr(other, side)) for side in ("key", "value"))


def test_formats_without_them_say_so(tmp_path: Path) -> None:
    model = opened(CHECKPOINTS / "ct-fp8-static-kvcache")
    with pytest.warns(UserWarning, match="float cannot say how keys and values are cached"):
        qcompile.save(model, tmp_path / "saved", "float", requantize=True, progress=False)
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "scale" in name]


def test_a_scale_for_each_head(tmp_path: Path, tiny_llama: Callable[..., Any], interpreted: None) -> None:
    """Written and read as compressed-tensors has them."""
    model: Any = tiny_llama(vocab_size=100)
    for number, layer in enumerate(model.model.layers):
        heads = torch.arange(1.0, 1 + model.config.num_key_value_heads)[:, None, None]
        layer.self_attn.cache_scales = CacheScales("i8", heads * 0.01, heads * (0.02 + number))
    qcompile.optimize(model, "i8/row/sym", progress=False)
    qcompile.save(model, tmp_path, "compressed-tensors", progress=False)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (said["num_bits"], said["type"], said["strategy"]) == (8, "int", "attn_head")
    again = qcompile.optimize(opened(tmp_path), progress=False)
    out = generate(again, torch.randint(3, 100, (2, 6)), max_new_tokens=2)
    for number, layer in enumerate(out.past_key_values.layers):
        assert layer.keys.dtype == torch.int8
        assert torch.equal(layer.value_scales[1, :, 7], (heads * (0.02 + number)).flatten())
        assert torch.equal(layer.key_scales[0, :, 0], (heads * 0.01).flatten())


def with_scales(model: Any, **changes: Any) -> Any:
    """A model whose layers have scales of their caches, the last one other ones or another number."""
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.cache_scales = CacheScales("i8", torch.tensor([0.5]), torch.tensor([0.25]))
    layers[-1].self_attn.cache_scales.element = changes.get("element", "i8")
    layers[-1].self_attn.layer_idx = changes.get("number", len(layers) - 1)
    return model


@pytest.mark.parametrize("changes", [{"element": "fp8_e4m3"}, {"number": 0}, {"number": None}], ids=str)
def test_scales_of_no_telling_which_cache(tiny_llama: Callable[..., Any], changes: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="cached as they are: the checkpoint's scales are of caches"):
        assert cache_codes(with_scales(tiny_llama(), **changes), None) is None
    assert cache_codes(with_scales(tiny_llama()), None) is not None


def test_a_kept_cache_gets_the_scales_of_today() -> None:
    caches = KeptCaches()
    form = ([(2, 16, 16)] * 2, 8, 1, torch.float32, torch.device("cpu"), torch.int8)
    scales = [(torch.full((1,), 0.5 + number), torch.full((1,), 0.25)) for number in range(2)]
    cache = caches.take(*form, scales)
    caches.give(cache, 1)
    scales[1][0].fill_(7.0)
    assert caches.take(*form, scales) is cache
    first, second = cache.layers
    assert first.key_scales.eq(0.5).all() and second.key_scales.eq(7.0).all() and second.value_scales.eq(0.25).all()


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of ct-fp8-static-kvcache with other tensors beside its attention, and another configuration."""

    def make(tensors: dict[str, Tensor | None], **scheme: Any) -> Path:
        folder = shutil.copytree(CHECKPOINTS / "ct-fp8-static-kvcache", tmp_path / "model")
        found = load_file(folder / "model.safetensors")
        found |= {f"{ATTENTION}.{name}": tensor for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] |= scheme
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def test_other_names(changed: Callable[..., Path]) -> None:
    tensors = {"k_scale": None, "v_scale": None, "k_proj.k_scale": torch.tensor(2.0), "v_proj.v_scale": torch.ones(1)}
    model = opened(changed({**tensors, "k_proj.k_zero_point": torch.zeros(1)}))
    scales: Any = model.get_submodule(f"{ATTENTION}.cache_scales")
    assert (scales.key, scales.value) == (torch.tensor([2.0]), torch.ones(1))


@pytest.mark.parametrize(
    ("tensors", "scheme"),
    [
        ({}, {"dynamic": True}),
        ({}, {"symmetric": False}),
        ({}, {"num_bits": 4}),
        ({"v_scale": None}, {}),
        ({"k_zero_point": torch.ones(1)}, {}),
    ],
)
def test_what_is_not_used_is_said(changed: Callable[..., Path], tensors: Any, scheme: Any) -> None:
    with pytest.warns(UserWarning, match=r"has \d scales of a quantized KV cache, which are not used"):
        model = opened(changed(tensors, **scheme))
    assert not any(isinstance(module, CacheScales) for module in model.modules())


@pytest.mark.parametrize("scale", [torch.tensor(-1.0), torch.tensor(float("nan")), torch.ones(3)])
def test_no_scale(changed: Callable[..., Path], scale: Tensor) -> None:
    with pytest.raises(
        CheckpointError, match=r"self_attn\.v_scale is \[.*\], not one positive float, nor one for each"
    ):
        opened(changed({"v_scale": scale}))
