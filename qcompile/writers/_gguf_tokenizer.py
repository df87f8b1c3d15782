"""A tokenizer as GGUF's metadata: byte-level BPE ("gpt2"), and SentencePiece's BPE with a fallback to bytes ("llama").

Keys and meanings are llama.cpp's (https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py and
src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the expressions that cut a text into words.
PRE = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}


def metadata(tokenizer: Any, size: int) -> dict[str, Any]:
    """The entries for a tokenizer of transformers', or those of a .gguf file; none without one. `size` is the number of
    rows of the embedding, which may be more than there are tokens."""
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, str | Path):
        return _copied(Path(tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = json.loads(backend.to_str()) if backend is not None else {}
    if said.get("model", {}).get("type") != "BPE":
        kind = said.get("model", {}).get("type") or type(tokenizer).__name__
        warnings.warn(f"qcompile: gguf: the tokenizer, {kind}, is not written; BPE is", stacklevel=2)
        return {}
    model = said["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens = {index: token for token, index in model["vocab"].items()}
    kinds = {index: BYTE if model.get("byte_fallback") and _is_byte(tokens[index]) else NORMAL for index in tokens}
    for added in said.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER
    if model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = UNKNOWN
    order = range(max(size, max(tokens) + 1))
    found: dict[str, Any] = {
        "tokenizer.ggml.tokens": [tokens.get(index, f"[PAD{index}]") for index in order],
        "tokenizer.ggml.token_type": [kinds.get(index, UNUSED) for index in order],
    }
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        # It merges the pair whose token has the highest score.
        scores = [-float(ranks.get(tokens.get(index, ""), len(merges))) for index in order]
        prepends = any("prepend" in str(said.get(part)).lower() for part in ("normalizer", "pre_tokenizer"))
        found |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
        found["tokenizer.ggml.add_space_prefix"] = prepends and "'never'" not in str(said.get("pre_tokenizer"))
    else:
        found |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(said.get("pre_tokenizer") or {})}
        found["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    return found | _special(tokenizer)


def _special(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = token
    text = tokenizer("a").input_ids
    found["tokenizer.ggml.add_bos_token"] = text[:1] == [tokenizer.bos_token_id]
    found["tokenizer.ggml.add_eos_token"] = text[-1:] == [tokenizer.eos_token_id]
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["tokenizer.chat_template"] = template
    return found


def _pre(said: Mapping[str, Any]) -> str:
    """The name of what cuts a text into words, which llama.cpp has a list of."""
    steps = said.get("pretokenizers", [said])
    kinds = [step.get("type") for step in steps]
    pattern = next((step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"), None)
    if pattern in PRE:
        return PRE[pattern]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    warnings.warn(
        "qcompile: gguf: llama.cpp has no name that qcompile knows for how this tokenizer cuts words; written as "
        "'default', which may cut others",
        stacklevel=3,
    )
    return "default"


def _is_byte(token: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None


def _copied(path: Path) -> dict[str, Any]:
    import gguf

    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
