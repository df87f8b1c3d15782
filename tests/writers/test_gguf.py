"""gguf. The package's reader and transformers read the file; llama.cpp's own blocks are in tests/checkpoints."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import qcompile
from qcompile import algorithms
from qcompile.errors import UnsupportedError
from qcompile.formats._gguf_blocks import SIZES, TYPES, unpack
from qcompile.load import load
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.storage import Parameter, put
from qcompile.writers import ActivationRounding, Contents, Weight
from qcompile.writers._gguf_blocks import blocks
from qcompile.writers._gguf_tokenizer import PRE, metadata
from qcompile.writers.gguf import Gguf

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
SPECS = {
    "i4/g32/sym": "Q4_0",
    "i3/g64/sym": "Q4_0",
    "i4/row/sym": "Q4_0",
    "i5/g32/sym": "Q5_0",
    "i8/g32/sym": "Q8_0",
    "i6/g64/sym": "Q8_0",
    "u4/g32/shift": "Q4_1",
    "u2/g64/shift": "Q4_1",
    "u5/g64/shift": "Q5_1",
    "u4/g32/asym_int": "Q5_0",  # code - zero, since zero * scale is no fp16
    "u3/g32/asym_int": "Q4_0",
    "u5/g32/asym_int": "Q8_0",
    "iq4/g32/sym": "IQ4_NL",
    "ternary/g32/sym": "Q4_0",
}


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize(("spec", "kind"), SPECS.items())
def test_round_trip(packed: Callable, resaved: Callable, tmp_path: Path, spec: str, kind: str) -> None:
    resaved(packed(spec, embed_tokens="i8/g32/sym"), "gguf")
    found = types(tmp_path / "one")
    assert {found["token_embd.weight"], found["output.weight"], found["blk.0.attn_norm.weight"]} == {
        "Q8_0",
        "F16",
        "F32",
    }
    assert {kind for name, kind in found.items() if name.startswith("blk.") and "norm" not in name} == {kind}


NAMES = ["q4_0", "q5_0", "q8_0", "iq4_nl", "q2_k", "q4_k", "q5_k", "mix-q4_k_m"]


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_s_blocks_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    given = CHECKPOINTS / f"gguf-{name}"
    qcompile.save(load(str(given), dtype="stored", progress=False), tmp_path, format="gguf")
    before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(place / "model.gguf").tensors} for place in (given, tmp_path)
    )
    assert before.keys() == after.keys()
    for tensor, own in before.items():
        assert own.tensor_type == after[tensor].tensor_type and np.array_equal(own.data, after[tensor].data), tensor


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_blocks_go_back(kind: str) -> None:
    """Blocks of random bytes, read by the format's reader; TQ1_0 comes back as TQ2_0."""
    elements, size = SIZES[kind]
    rows = torch.randint(0, 256, (5, 1024 // elements, size), dtype=torch.uint8)
    for at in SCALES.get(kind, (0,)):
        rows[..., at + 1] &= 0xBF  # no infinite scales
    if kind in ("MXFP4", "NVFP4"):
        rows[..., : 1 if kind == "MXFP4" else 4] &= 0x3F
    given = unpack(kind, rows.flatten(1))
    made = blocks(Weight("model.layers.0.mlp.up_proj.weight", given, torch.float16))
    if kind == "TQ1_0":
        assert made.kind == "TQ2_0" and torch.equal(unpack("TQ2_0", made.make()).dequantize(), given.dequantize())
        return
    assert made.kind == kind and made.factor is None
    if kind == "TQ2_0":
        assert torch.equal(unpack(kind, made.make()).dequantize(), given.dequantize())  # code 3 is no ternary
    else:
        assert torch.equal(made.make(), rows.flatten(1))


SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)}
SCALES |= {"Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": ()}


def test_nvfp4_with_a_factor() -> None:
    spec = QSpec.parse("fp4_e2m1/g16/sym/scale(fp8_e4m3/tensor/sym)")
    scale = QTensor.from_codes(spec.scale_spec, torch.full((4, 8), 60, dtype=torch.uint8), torch.tensor([[0.3]]), None)
    tensor = QTensor.from_codes(spec, torch.randint(0, 16, (4, 128), dtype=torch.uint8), scale, None)
    made = blocks(Weight("model.layers.0.mlp.up_proj.weight", tensor, torch.float16))
    assert made.kind == "NVFP4" and made.factor.tolist() == pytest.approx([0.3])
    assert torch.equal(unpack("NVFP4", made.make()).dequantize() * 0.3, tensor.dequantize())


@pytest.mark.parametrize(
    ("spec", "fields", "reason"),
    [
        ("u4/g32/asym", {}, "its zero points are floats, such as"),
        ("u8/g32/asym_int", {}, "about their zero points; it holds 8 bits"),
        ("i4/g16/sym", {}, "groups of 16 inputs; a block holds 32"),
        ("i4/row/sym", {"columns": 48}, "48 inputs; a block holds 32"),
        ("nf4/g32/sym", {}, "nf4 codes are not integers"),
        ("i4/g32/sym", {"dtype": torch.float32}, "are no float16"),
        ("u4/g32/shift", {"dtype": torch.float32}, "are no float16"),
        ("u8/g32/shift", {}, "u8 codes with minimums"),
        ("i4/g32/sym", {"input": ActivationRounding("i8/token/dynamic")}, "its inputs are rounded as"),
        ("i4/g32/sym", {"kind": "other"}, "linears and embeddings only"),
    ],
)
def test_refusals(weight: Callable, spec: str, fields: dict, reason: str) -> None:
    assert reason in (Gguf().refuses(weight(spec, **fields)) or "")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Whether transformers reads all of it; it knows no biases of llama and no scaled rotary embeddings.
MODELS = {
    "llama": ({}, True),
    "llama-tied-biases": ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, False),
    "llama-wide-heads": ({"head_dim": 32}, True),
    "llama-llama3": ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}}, False),
    "llama-linear": ({"rope_parameters": LINEAR}, False),
    "llama-yarn": ({"rope_parameters": YARN}, False),
    "mistral": ({"sliding_window": None}, True),
    "qwen2": ({}, True),
    "qwen3": ({"head_dim": 32}, False),
}


def model_of(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = AutoConfig.for_model(name.partition("-")[0], **sizes, **heads, **MODELS[name][0])
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).half()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(1, 0.2)
    for path, module in list(model.named_modules()):
        if path.endswith("_proj"):
            tensor = algorithms.quantize(module.weight, QSpec.parse("i4/g32/sym"), "rtn")
            put(model, [Parameter((f"{path}.weight",), tuple(module.weight.shape), torch.float32)], [tensor])
    return model.float().eval()


@pytest.mark.parametrize("name", MODELS)
def test_architectures(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = model_of(name), torch.arange(8)[None]
    qcompile.save(model, tmp_path, format="gguf")
    loaded = load(str(tmp_path), dtype=torch.float32, progress=False)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
    if MODELS[name][1]:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "gemma"}, "gguf is written for llama, mistral, qwen2, qwen3, not for gemma"),
        ({"hidden_act": "gelu"}, "llama models have silu, this one has gelu"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "default, linear, yarn and llama3"),
        ({"rope_parameters": {**YARN, "mscale": 2.0}}, "yarn with mscale is not written"),
        ({"layer_types": ["sliding_attention"]}, "no sliding window"),
    ],
)
def test_models_that_it_does_not_know(changed: dict, reason: str) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(UnsupportedError, match=reason):
        Gguf().check(Contents({**config, **changed}, []))
    with pytest.raises(UnsupportedError, match=r"the architecture llama has no model\.vision\.weight"):
        Gguf().check(Contents(config, [], {"model.vision.weight": torch.ones(1)}))


def test_tokenizer(packed: Callable, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "te", "st", "test"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "e"), ("s", "t"), ("te", "st")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages }}"
    qcompile.save(packed("i4/g32/sym", vocab_size=300), tmp_path / "one", format="gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(tmp_path / "one" / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 300 and tokens[0] == "<s>" and tokens[-1] == "[PAD299]"
    assert fields["tokenizer.ggml.token_type"].contents()[:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.merges"].contents() == ["t e", "s t", "te st"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "one", gguf_file="model.gguf")
    text = "It's a test: 123!"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    # A .gguf file that was loaded gives its tokenizer on.
    loaded = load(str(tmp_path / "one"), dtype="stored", progress=False)
    qcompile.save(loaded, tmp_path / "two", format="gguf")
    again = gguf.GGUFReader(tmp_path / "two" / "model.gguf").fields
    assert {name for name in fields if name.startswith("tokenizer.")} == {
        name
        for name, field in again.items()
        if name.startswith("tokenizer.") and field.contents() == fields[name].contents()
    }


def test_tokenizer_of_the_folder(tiny_chat: Path, tmp_path: Path) -> None:
    model = load(str(tiny_chat), dtype=torch.float16, progress=False)
    model = qcompile.optimize(model, "i8/g32/sym", progress=False)
    qcompile.save(model, tmp_path, format="gguf")
    assert "tokenizer.ggml.tokens" in gguf.GGUFReader(tmp_path / "model.gguf").fields


def test_tokenizer_with_bytes_to_fall_back_on() -> None:
    """SentencePiece's BPE: what is merged first has the highest score."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    bpe = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("a", "b"), ("▁", "ab")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.ByteFallback()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = metadata(fast, 264)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]))
    assert scores["ab"] > scores["▁ab"] > scores["a"]


@pytest.mark.parametrize(
    ("pattern", "name"), [(pattern, name) for pattern, name in PRE.items()] + [(r"\w+|\d", "default")]
)
def test_how_words_are_cut(pattern: str, name: str) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    warned = pytest.warns(UserWarning, match="written as 'default'") if name == "default" else contextlib.nullcontext()
    with warned:
        assert metadata(fast, 2)["tokenizer.ggml.pre"] == name


def test_tokenizers_of_other_kinds() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.warns(UserWarning, match="the tokenizer, WordLevel, is not written; BPE is"):
        assert metadata(fast, 1) == {}
