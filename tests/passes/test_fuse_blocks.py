"""fuse_blocks: a transformer's layers are one call with the same bits, and everything still knows each of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.expansion import expand
from fxq.graph import module_of
from fxq.ops.block import qblock
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


def test_few_steps_stay(model_of):
    torch.manual_seed(0)
    model = model_of(lambda self, x: self.down(F.gelu(self.up(x))), up=nn.Linear(32, 64), down=nn.Linear(64, 32))
    assert not blocks(fxq.quantize(model, torch.randn(3, 6, 32), recipe=RECIPE))
