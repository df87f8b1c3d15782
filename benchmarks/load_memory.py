"""Memory of loading a sharded checkpoint of about 1 GiB, made of random numbers.

    python -m benchmarks.load_memory [--format awq qcompile float] [--gib 1] [--device cpu]

Each loads in a process of its own. "resident" are the bytes of the loaded model's tensors, "peak" is what the process
held at most until every page of the model was touched, less what it held after the imports, and "largest" is the
largest tensor of the files. Loading may take resident + 2 x largest + 512 MiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor

from benchmarks.record import record

HIDDEN, WIDE, VOCABULARY, GROUP = 2048, 8192, 32000, 128
LAYERS_A_SHARD = 6
MIB = 1 << 20
FORMATS = ("awq", "gptq", "qcompile", "float")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--load", type=Path, help="load this folder here, and print the figures as JSON")
    args = parser.parse_args()
    if args.load:
        print(json.dumps(measure(args.load, args.device)))
        return
    rows = []
    for kind in args.format:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), kind, args.gib)
            command = [sys.executable, "-m", "benchmarks.load_memory", "--load", folder, "--device", args.device]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(run.stdout.splitlines()[-1])
        allowed = figures["resident"] + 2 * figures["largest"] + 512 * MIB
        rows.append({"format": kind, **{name: round(size / MIB) for name, size in figures.items()}})
        rows[-1] |= {"allowed": round(allowed / MIB), "": "" if figures["peak"] <= allowed else "too much"}
        print(rows[-1], flush=True)
    body = (
        f"A Llama of {HIDDEN} x {WIDE} in shards of {LAYERS_A_SHARD} layers, about {args.gib:g} GiB, in MiB. What a\n"
        "process holds counts the pages of files that it has mapped.\n\n"
    )
    record("load-memory", "Memory of loading", body + tabulate(rows, headers="keys", tablefmt="github"), args.device)


def measure(folder: Path, device: str) -> dict[str, int]:
    import transformers.models.llama.modeling_llama  # noqa: F401

    from qcompile.files.checkpoint import open_checkpoint
    from qcompile.load import load

    before = _held("VmRSS")
    model = load(str(folder), device=device, dtype=torch.bfloat16, progress=False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.flatten()[::1024].any()  # every page, also of what is mapped from the files
    peak = _held("VmHWM") - before
    tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    checkpoint = open_checkpoint(folder)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    files = sum(file.path.stat().st_size for file in checkpoint.files)
    return {"files": files, "resident": sum(tensors.values()), "largest": largest, "peak": peak}


def _held(what: str) -> int:
    """Bytes in memory, now (VmRSS) or at most (VmHWM): getrusage would count the parent's before exec too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) * 1024


def build(folder: Path, kind: str, gib: float) -> None:
    """Write the checkpoint layer by layer, so that no more than a shard is in memory."""
    generator = torch.Generator().manual_seed(0)
    tables = {name: _float(VOCABULARY, HIDDEN, generator) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tables["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    one = sum(tensor.nbytes for tensor in dict(_layer(0, kind, generator)).values())
    layers = max(1, round((gib * 2**30 - sum(tensor.nbytes for tensor in tables.values())) / one))
    shards = [
        tables,
        *(range(start, min(start + LAYERS_A_SHARD, layers)) for start in range(0, layers, LAYERS_A_SHARD)),
    ]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = shard if isinstance(shard, dict) else dict(t for n in shard for t in _layer(n, kind, generator))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": WIDE, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    spec = {"spec": f"u4/g{GROUP}/asym_int"}
    paths = [(f"model.layers.{n}.{name}.weight", shape) for n in range(layers) for name, shape in LINEARS.items()]
    said = {
        "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
        "qcompile": {
            "quant_method": "qcompile",
            "version": 1,
            "weights": {path: {**spec, "shape": list(shape)} for path, shape in paths},
        },
    }.get(kind)
    (folder / "config.json").write_text(json.dumps(config if said is None else {**config, "quantization_config": said}))


LINEARS = {
    **dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], (HIDDEN, HIDDEN)),
    **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], (WIDE, HIDDEN)),
    "mlp.down_proj": (HIDDEN, WIDE),
}


def _layer(number: int, kind: str, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{number}.{norm}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    for name, (rows, columns) in LINEARS.items():
        path, groups = f"model.layers.{number}.{name}", columns // GROUP
        match kind:
            case "float":
                yield f"{path}.weight", _float(rows, columns, generator)
            case "qcompile":
                yield f"{path}.weight.data", _bytes(rows, columns // 2, generator)
                yield f"{path}.weight.scale", _float(rows, groups, generator).abs()
                yield f"{path}.weight.zero", _bytes(rows, groups, generator) & 15
            case "awq":
                yield f"{path}.qweight", _bytes(columns, rows // 2, generator).view(torch.int32)
                yield f"{path}.qzeros", _bytes(groups, rows // 2, generator).view(torch.int32)
                yield f"{path}.scales", _float(groups, rows, generator).half()
            case _:
                yield f"{path}.qweight", _bytes(columns // 8, rows * 4, generator).view(torch.int32)
                yield f"{path}.qzeros", _bytes(groups, rows // 2, generator).view(torch.int32)
                yield f"{path}.scales", _float(groups, rows, generator).half()
                yield f"{path}.g_idx", (torch.arange(columns) // GROUP).int()


def _float(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, columns, generator=generator).mul_(0.01).bfloat16()


def _bytes(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)


if __name__ == "__main__":
    main()
