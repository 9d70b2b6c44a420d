"""fuse_blocks: a transformer's layers are one call with the same bits, and everything still knows each of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.expansion import expand
from fxq.graph import SHARED, module_of
from fxq.ops.block import qblock
from fxq.quantized import weight_bytes
from passes import CONVERT, PREPARE, fuse_blocks

WITHOUT = (PREPARE, tuple(step for step in CONVERT if step is not fuse_blocks.PASS))
RECIPE = fxq.Recipe(judge_costs=False)


class Layer(nn.Module):
    def __init__(self, before):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.before = before

    def attend(self, x, mask):
        b, t, c = x.shape
        q, k, v = (layer(x).view(b, t, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, t, c))

    def forward(self, x, mask):
        if self.before:
            x = x + self.attend(self.first(x), mask)
            return x + self.down(F.gelu(self.up(self.second(x))))
        x = self.first(x + self.attend(x, mask))
        return self.second(x + self.down(F.gelu(self.up(x))))


class Model(nn.Module):
    def __init__(self, before=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(before) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return self.head(x[:, 0]), x


def inputs(b, t):
    mask = torch.rand(b, t) > 0.3
    mask[:, 0] = True
    return torch.randn(b, t, 32), mask


def test_a_block_belongs_to_the_module_that_holds_its_layers():
    qmodel = made(Model().eval())
    (block,) = qmodel.graph.find_nodes(op="call_function", target=qblock)
    assert (module_of(block), block.name) == ("layers", "layers_qblock")


def made(model, recipe=RECIPE, **options):
    data = [inputs(3, 6) for _ in range(4)]
    return fxq.quantize(model, data[0], calibration_data=data, recipe=recipe, **options)


def blocks(qmodel):
    return qmodel.graph.find_nodes(op="call_function", target=qblock)


def with_rows():
    """The second linear of each layer with scales by row: the two of a layer are a qfeed_forward then."""
    rule = fxq.Rule("w8a8-dynamic")
    return fxq.Recipe(modules={f"layers.{i}.down": rule for i in range(2)}, judge_costs=False)


@pytest.mark.parametrize(("before", "rows"), [(False, False), (True, False), (False, True)])
def test_layers_are_one_call(before, rows, tmp_path):
    torch.manual_seed(0)
    model = Model(before).eval()
    recipe = with_rows() if rows else RECIPE
    torch.manual_seed(1)
    qmodel = made(model, recipe, dump=tmp_path)
    torch.manual_seed(1)
    apart = made(model, recipe, passes=WITHOUT)
    assert any("qfeed_forward" in str(node.target) for node in apart.graph.nodes) == rows
    (block,) = blocks(qmodel)
    assert not blocks(apart)
    within = [node for node in qmodel.graph.nodes if node.op != "get_attr" and module_of(node).startswith("layers")]
    assert set(within) == {block, *block.users}, "no operation of a layer is left outside"
    for shape in ((3, 6), (1, 1), (5, 17), (2, 70)):
        args = inputs(*shape)
        for found, wanted in zip(qmodel(*args), apart(*args), strict=True):
            assert torch.equal(found, wanted)
    args = inputs(3, 6)
    golden = fxq.golden(qmodel, islands="torch")
    for found, wanted in zip(golden(*(a.numpy() for a in args)), qmodel(*args), strict=True):
        assert (found == wanted.numpy()).all()
    seen, known = (
        [(n.name, str(n.target)) for n in expand(m).graph.nodes if n.op != "get_attr"] for m in (qmodel, apart)
    )
    assert sorted(seen) == sorted(known)
    held, wanted = (dict(expand(m).state_dict()) for m in (qmodel, apart))
    assert held.keys() == wanted.keys() and all(torch.equal(held[path], wanted[path]) for path in held)
    inside = qmodel.get_buffer("layers.constants").untyped_storage()
    assert sum(tensor.untyped_storage().data_ptr() == inside.data_ptr() for tensor in held.values()) >= 40
    assert inside.nbytes() < sum(tensor.nbytes + 64 for tensor in held.values()), "views, and no second copy"
    assert {p for p in qmodel.state_dict() if p.startswith("layers")} == {"layers.constants", "layers.program"}
    rows = [[(r.module, r.op, r.alone) for r in fxq.compare(model, m, args).layers] for m in (qmodel, apart)]
    assert rows[0] == rows[1]
    assert qmodel.code.count("# layers_0_") == qmodel.code.count("# layers_1_") >= 6
    assert "4 heads" in qmodel.code and "32 -> 64, gelu" in qmodel.code
    fxq.save(qmodel, tmp_path / "m.fxq")
    for same in (fxq.load(tmp_path / "m.fxq"), copy.deepcopy(qmodel), torch.compile(qmodel, backend="eager")):
        assert torch.equal(same(*args)[0], qmodel(*args)[0])
    fxq.draw(qmodel, tmp_path / "m.dot")
    assert "qattention" in (tmp_path / "m.dot").read_text()
    assert "qattention" in str(fxq.profile(qmodel, args))
    assert fuse_blocks.PASS.run(qmodel, None) == 0, "idempotent"


def test_what_reads_rows_in_between_stays_outside():
    """A float operation on what a layer gives, whose result a later layer reads, parts one run from the next."""

    class Between(Model):
        def forward(self, x, mask):
            x = self.layers[0](x, mask[:, None, None])
            return self.layers[1](x * torch.sin(x).sum(-1, keepdim=True), mask[:, None, None])

    torch.manual_seed(0)
    model = Between().eval()
    torch.manual_seed(1)
    qmodel = made(model)
    torch.manual_seed(1)
    apart = made(model, passes=WITHOUT)
    assert len(blocks(qmodel)) == 2
    args = inputs(4, 9)
    assert torch.equal(qmodel(*args), apart(*args))


def test_rows_of_another_batch_are_no_part():
    """An addend that is broadcast has other rows, for all that the graph says."""

    class Positions(Model):
        def forward(self, x, mask):
            y = self.layers[0].down(F.gelu(self.layers[0].up(x))) + mask[:, :, None].float()
            return self.layers[0].second(y)

    qmodel = made(Positions().eval())
    assert not blocks(qmodel)


class Twice(Model):
    """Both parts are blocks, with one layer for both."""

    def forward(self, x, mask):
        x = self.layers[0](x, mask[:, None, None])
        return self.layers[0](x * torch.sin(x).sum(-1, keepdim=True), mask[:, None, None])


class Same(Model):
    """One layer twice in a block."""

    def forward(self, x, mask):
        for _ in range(2):
            x = self.layers[0](x, mask[:, None, None])
        return self.head(x[:, 0]), x


class ReadElsewhere(Model):
    """What multiplies the rows of a norm in a block multiplies others outside."""

    def forward(self, x, mask):
        y, x = super().forward(x, mask)
        return y, x * torch.sin(x).sum(-1, keepdim=True) * self.layers[0].second.weight


class Inner(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) if x.sum() > 0 else x


class ReadInALeaf(Model):
    """A norm of a block is called in code that nobody looks into, too."""

    def __init__(self):
        super().__init__()
        self.inner = Inner(self.layers[0].second)

    def forward(self, x, mask):
        y, x = super().forward(x, mask)
        return y, self.inner(x * torch.sin(x).sum(-1, keepdim=True))


class Written(Model):
    """A norm's weight is another one in each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(32))
        self.register_buffer("alias", self.factor.view(32))

    def forward(self, x, mask):
        self.factor.mul_(1.5)
        layer = self.layers[0]
        x = F.layer_norm(x + layer.attend(x, mask[:, None, None]), (32,), self.alias)
        return self.layers[1](x, mask[:, None, None])


@pytest.mark.parametrize(
    ("kind", "count", "outside"),
    [
        (Twice, 2, set()),
        (Same, 1, set()),
        (ReadElsewhere, 2, {"fxq.norm_and_quantize"}),
        (ReadInALeaf, 2, {"fxq.norm_and_quantize"}),
        (Written, 2, {"fxq.norm_and_quantize"}),
    ],
)
def test_constants_are_stored_once(kind, count, outside, tmp_path):
    torch.manual_seed(0)
    model = kind().eval()
    torch.manual_seed(1)
    qmodel = made(copy.deepcopy(model), on_low_sqnr="ignore", leaves=("inner",) if kind is ReadInALeaf else ())
    torch.manual_seed(1)
    apart = made(model, on_low_sqnr="ignore", leaves=("inner",) if kind is ReadInALeaf else (), passes=WITHOUT)
    assert len(blocks(qmodel)) == count
    assert outside <= {str(node.target).removesuffix(".default") for node in qmodel.graph.nodes}
    assert len({node.args[2].target for node in blocks(qmodel)}) == 1, "one tensor for all"
    held = qmodel.get_buffer(str(blocks(qmodel)[0].args[2].target))
    programs = sum(qmodel.get_buffer(str(node.args[1].target)).nbytes for node in blocks(qmodel))
    constants = len(expand(apart).state_dict())
    assert weight_bytes(qmodel) - programs <= weight_bytes(apart) + 64 * constants
    assert all(
        t is held or t.untyped_storage().data_ptr() != held.data_ptr()
        for t in qmodel.state_dict(keep_vars=True).values()
    )
    grown = []
    for m in (qmodel, apart):
        fxq.save(m, tmp_path / "m.fxq")
        grown.append(weight_bytes(fxq.load(tmp_path / "m.fxq", trust=True)) - weight_bytes(m))
    assert grown[0] == grown[1]
    for shape in ((3, 6), (2, 17)):
        args = inputs(*shape)
        for found, wanted in zip(qmodel(*args), apart(*args), strict=True):
            assert torch.equal(found, wanted)


def test_one_of_several_graphs_on_the_same_weights_has_no_blocks():
    apart = made(Model().eval(), passes=WITHOUT)
    apart.meta[SHARED] = True
    assert fuse_blocks.PASS.run(apart, None) == 0
    apart.meta[SHARED] = False
    assert fuse_blocks.PASS.run(apart, None) == 1


def test_few_steps_stay(model_of):
    torch.manual_seed(0)
    model = model_of(lambda self, x: self.down(F.gelu(self.up(x))), up=nn.Linear(32, 64), down=nn.Linear(64, 32))
    assert not blocks(fxq.quantize(model, torch.randn(3, 6, 32), recipe=RECIPE))
