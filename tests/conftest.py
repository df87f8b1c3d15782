"""Fixtures that every test may use: fixed seeds, golden texts, shared test data; and the marker `cuda`."""

import copy
import difflib
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# What torch keeps of operators on fake tensors pays in models of many like layers, not in graphs as small as here.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _each_test_starts_alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QCOMPILE_CACHE", "0")
    random.seed(0)
    torch.manual_seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    yield
    # Past a number of recompilations Dynamo runs eagerly without an error: count for each test from zero.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """`golden("passes/fuse_siblings", text)` compares with tests/golden/passes/fuse_siblings.txt."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if os.environ.get("QCOMPILE_ACCEPT") == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        label = path.relative_to(ROOT).as_posix()
        if not path.exists():
            pytest.fail(f"{label} does not exist; QCOMPILE_ACCEPT=1 writes it. The text is:\n{text}", pytrace=False)
        if (want := path.read_text(encoding="utf-8")) != text:
            diff = difflib.unified_diff(want.splitlines(), text.splitlines(), label, "this run", lineterm="")
            hint = f"{label} differs; if the change is meant, QCOMPILE_ACCEPT=1 rewrites it."
            pytest.fail("\n".join([hint, *diff]), pytrace=False)

    return check


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and models, kept beside the repository and not in it."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with checkpoints and models")
    return SHARED


@pytest.fixture
def refused() -> Callable[..., AbstractContextManager[None]]:
    """`with refused("a pattern"):` what is in it is a CheckpointError, within two seconds and little memory."""
    from qcompile.errors import CheckpointError

    @contextmanager
    def check(message: str = ".") -> Iterator[None]:
        memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(CheckpointError, match=message):
            yield
        assert time.process_time() - start < 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB

    return check


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs node by node instead of compiling them: everything but code generation, in a tenth of the time."""
    from qcompile import _torch

    monkeypatch.setattr(_torch, "inductor", lambda gm, fakes, patches=None: gm)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a tokenizer with a chat template, as save_pretrained writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-chat")
    special = ["<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}<s>"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """`tiny_llama(**fields)`: a Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**fields: object) -> torch.nn.Module:
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
        config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 256, **fields})
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="module")
def twins() -> Iterator[Callable[..., tuple[Any, Any]]]:
    """`twins(*include)`: an optimized model, of which these parts are quantized, too, and a float model of the same
    weights in transformers' loop. What is captured stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import qcompile
    from qcompile import _torch

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)

    def make(*include: str) -> tuple[Any, Any]:
        torch.manual_seed(0)
        reference = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=256)).eval()
        model = qcompile.optimize(copy.deepcopy(reference), "u4/g32/asym", include=include, progress=False)
        reference.load_state_dict(qcompile.dequantize(model))
        return model, reference

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "inductor", lambda gm, fakes, patches=None: gm)
        yield make
