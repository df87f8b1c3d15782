"""capture: torch.export and Dynamo, and what both give."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.errors import CaptureError
from qcompile.graph import capture
from qcompile.graph.match import aten, is_tensor, module_path, value
from qcompile.normal import normalize
from qcompile.ops.registry import known


class Block(nn.Module):
    """Attention and MLP with many spellings in them."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(0.1)
        self.act = nn.ReLU(inplace=True)
        self.gain = nn.Buffer(torch.ones(16))

    def forward(self, *tensors):
        (x,) = tensors
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        heads = [t.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).contiguous()
        x = x + self.dropout(self.out(y.flatten(2))).to(x.dtype)
        flat = x.reshape(-1, 16) * self.gain
        y = torch.addmm(self.down.bias, self.act(self.up(flat)), self.down.weight.t())
        return x + y.view(x.shape), x[:, -1], x[..., :8].float()


@pytest.fixture
def model():
    return Block().eval()


def calls(gm):
    normalize(gm.graph)
    counts = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
    counts.pop("aten.sym_size.int", None)  # Dynamo gives symbolic sizes as inputs
    return counts


def dynamo(model, *inputs, dynamic=True):
    """The graph of Dynamo in normal form, and the inputs that it is called with."""
    found = []

    def backend(gm, given):
        found.append((capture.retrace(gm), given))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    ((gm, given),) = found
    return gm, given


def test_both_entrances_give_one_normal_form(model):
    x = torch.randn(2, 5, 16)
    exported = calls(capture.export(model, [x]).gm)
    assert calls(dynamo(model, x)[0]) == exported
    assert exported["aten.linear.default"] == 4
    assert exported["aten.scaled_dot_product_attention.default"] == 1
    assert exported["aten.relu.default"] == 1
    assert not {op for op in exported if "view" in op or "chunk" in op or "addmm" in op or "dropout" in op}


def test_export_gives_the_numbers_of_the_model(model):
    captured = capture.export(model, [torch.randn(2, 5, 16)])
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    x = torch.randn(3, 4, 16)
    inputs = [x if given.user == 0 else named[given.path] for given in captured.inputs]
    with torch.no_grad():
        torch.testing.assert_close(tuple(captured.gm(*inputs)), model(x))


def test_retrace_gives_the_numbers_of_the_model(model):
    x = torch.randn(2, 5, 16)
    gm, given = dynamo(model, x)
    given = [size.node.hint if isinstance(size, torch.SymInt) else size for size in given]
    with torch.no_grad():
        torch.testing.assert_close(tuple(gm(*given)), model(x))


@pytest.mark.parametrize("entrance", ["export", "dynamo"])
def test_normal_form(model, entrance):
    x = torch.randn(2, 5, 16)
    gm = capture.export(model, [x]).gm if entrance == "export" else dynamo(model, x)[0]
    for node in gm.graph.nodes:
        assert node.op in ("placeholder", "call_function", "output"), "weights are inputs, not constants"
        if node.op == "call_function" and node.target is not aten._assert_tensor_metadata.default:
            assert node.meta.get("val") is not None, node
    paths = {module_path(node) for node in gm.graph.nodes}
    assert {"qkv", "out", "norm", "up", "act", ""} <= paths


def test_inputs_have_paths(model):
    captured = capture.export(model, [torch.randn(2, 5, 16)])
    nodes = captured.gm.graph.find_nodes(op="placeholder")
    paths = [given.path for given in captured.inputs]
    assert set(paths) == {*dict(model.named_parameters()), "gain", None}
    assert [node.meta.get("input_path") for node in nodes] == paths
    assert len(captured.fakes) == len(nodes) == len(captured.inputs)


def test_sizes_above_one_are_symbolic(model):
    fakes = capture.export(model, [torch.randn(1, 5, 16)]).fakes
    batch, length, width = fakes[-1].shape
    assert (known(batch), known(length), known(width)) == (1, None, 16)


def test_a_cache_has_the_sizes_of_what_is_copied_into_it():
    class Cache(nn.Module):
        def forward(self, *tensors):
            x, keys, position = tensors
            return keys.index_copy(-2, position, x.unflatten(-1, (2, 8)).transpose(1, 2)).exp()

    def sizes(gm):
        tensors = [value(node) for node in gm.graph.find_nodes(op="placeholder") if is_tensor(node)]
        return [tensor.shape for tensor in sorted(tensors, key=torch.Tensor.dim)]

    inputs = [torch.randn(4, 3, 16), torch.randn(4, 2, 6, 8), torch.arange(3)]
    exported = capture.export(Cache(), inputs).gm
    for _, x, keys in (sizes(exported), sizes(dynamo(Cache(), *inputs)[0])):
        assert str(keys[0]) == str(x[0]) and known(keys[0]) is None and known(keys[2]) is None
        assert (known(keys[1]), known(keys[3])) == (2, 8)


def test_what_does_not_fit_into_a_cache():
    class Cache(nn.Module):
        def forward(self, *tensors):
            return tensors[1].index_copy(1, torch.arange(3), tensors[0])

    with pytest.raises(CaptureError):
        capture.export(Cache(), [torch.randn(2, 3, 16), torch.randn(2, 6, 8)])


def test_prefix():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 4))

        def forward(self, *tensors):
            return self.model(*tensors) + 1

    captured = capture.export(Outer(), [torch.randn(2, 4)], prefix="model.")
    assert [given.path for given in captured.inputs] == ["0.weight", "0.bias", None]
    paths = [module_path(node) for node in captured.gm.graph.nodes if node.op == "call_function"]
    assert paths == ["0", ""]


def test_one_tensor_is_one_input():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, *tensors):
            return self.head(self.embed(tensors[0]))

    captured = capture.export(Tied(), [torch.tensor([1, 2, 3])])
    assert len(captured.inputs) == 2
    embedding, linear = (node for node in captured.gm.graph.nodes if node.op == "call_function")
    assert embedding.args[0] is linear.args[1]


def test_constants_are_inputs():
    table = torch.arange(4.0)

    class Constant(nn.Module):
        def forward(self, *tensors):
            return tensors[0] + table

    captured = capture.export(Constant(), [torch.randn(2, 4)])
    (constant,) = [given.constant for given in captured.inputs if given.constant is not None]
    assert torch.equal(constant, table)


def test_paths_of_a_sliced_module_list():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, *tensors):
            x = tensors[0]
            for layer in self.layers[:2]:
                x = layer(x)
            return x

    captured = capture.export(Layers(), [torch.randn(2, 4)])
    linears = captured.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [module_path(node) for node in linears] == ["layers.0", "layers.1"]


def test_what_cannot_be_captured():
    class Branch(nn.Module):
        def forward(self, *tensors):
            return tensors[0] if tensors[0].sum() > 0 else -tensors[0]

    with pytest.raises(CaptureError, match=r"Branch.forward could not be captured: .+"):
        capture.export(Branch(), [torch.randn(4)])


def test_inline():
    class Model(nn.Module):
        def forward(self, *tensors):
            return tensors[0].exp().sin()

    gm = capture.export(Model(), [torch.randn(2, 4)]).gm
    (exp,) = gm.graph.find_nodes(op="call_function", target=aten.exp.default)
    exp.meta["module_path"] = "here"
    made = capture.Inliner(gm).inline(exp, lambda x: x.relu().view(-1).view(x.shape) + torch.ones(4))
    gm.graph.lint()
    gm.recompile()
    assert made and all(module_path(node) == "here" and node.meta["val"] is not None for node in made)
    x = torch.randn(3, 4)
    torch.testing.assert_close(gm(x)[0], (x.relu() + 1).sin())


def test_inline_of_a_linear():
    class Model(nn.Module):
        def forward(self, *tensors):
            return F.linear(*tensors)

    gm = capture.export(Model(), [torch.randn(2, 3, 4), torch.randn(6, 4)]).gm
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    capture.Inliner(gm).inline(linear, F.linear)
    gm.recompile()
    x, weight = torch.randn(5, 2, 4), torch.randn(3, 4)
    torch.testing.assert_close(gm(x, weight)[0], F.linear(x, weight))


def test_inline_of_calls_that_share_a_trace():
    class Model(nn.Module):
        def forward(self, *tensors):
            return tensors[0].exp() * tensors[1].exp()

    inputs = torch.randn(2, 4), torch.randn(2, 4)
    gm = capture.export(Model(), inputs).gm
    inliner = capture.Inliner(gm)
    for exp in gm.graph.find_nodes(op="call_function", target=aten.exp.default):
        inliner.inline(exp, torch.sin)
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    inliner.inline(product, torch.sub)
    gm.recompile()
    torch.testing.assert_close(gm(*inputs)[0], inputs[0].sin() - inputs[1].sin())
