"""fuse_images: a convolutional network is one call with the same bits, and everything still knows each layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.expansion import expand
from fxq.graph import module_of
from fxq.ops.images import qimages
from passes import CONVERT, PREPARE, fuse_images

WITHOUT = (PREPARE, tuple(step for step in CONVERT if step is not fuse_images.PASS))
RECIPE = fxq.Recipe(judge_costs=False)


class Gate(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, 4, 1), nn.ReLU(), nn.Conv2d(4, n, 1), nn.Hardsigmoid()
        )

    def forward(self, x):
        return x * self.squeeze(x)


class Network(nn.Module):
    """A stem, a residual block, a gate, a skip connection over a transposed convolution, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), Gate(16))
        self.down, self.up = nn.Conv2d(16, 24, 3, 2, 1), nn.ConvTranspose2d(24, 16, 2, 2)
        self.last, self.head = nn.Conv2d(32, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(F.interpolate(x, scale_factor=2.0))
        x = x + self.body(x)
        x = torch.cat([x, self.up(F.relu(self.down(x)))], 1)
        x = F.max_pool2d(F.relu(self.last(x)), 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def images(batch, height=16, width=12):
    return torch.randn(batch, 3, height, width)


def made(model, **options):
    torch.manual_seed(1)
    data = [(images(3),) for _ in range(3)]
    return fxq.quantize(model, data[0], calibration_data=data, recipe=RECIPE, on_low_sqnr="ignore", **options)


def networks(qmodel):
    return qmodel.graph.find_nodes(op="call_function", target=qimages)


def test_a_network_is_one_call(tmp_path):
    torch.manual_seed(0)
    model = Network().eval()
    qmodel, apart = made(model, dump=tmp_path), made(model, passes=WITHOUT)
    (network,) = networks(qmodel)
    assert not networks(apart)
    left = [node for node in qmodel.graph.nodes if str(node.target).startswith("fxq.q") and node is not network]
    assert left == [] and module_of(network) == ""
    for shape in ((3, 16, 12), (1, 16, 12), (0, 16, 12), (2, 40, 24), (1, 16, 12)):
        x = images(*shape)
        assert torch.equal(qmodel(x), apart(x))
    x = images(3)
    golden = fxq.golden(qmodel, islands="torch")
    assert (golden(x.numpy()) == qmodel(x).numpy()).all()
    seen, known = (
        [(n.name, str(n.target)) for n in expand(m).graph.nodes if n.op != "get_attr"] for m in (qmodel, apart)
    )
    assert sorted(seen) == sorted(known)
    rows = [[(r.module, r.op, r.alone) for r in fxq.compare(model, m, (x,)).layers] for m in (qmodel, apart)]
    assert rows[0] == rows[1]
    assert "qconv_act_quantize 3 -> 16, 3x3 stride 2 pad 1, hardswish" in qmodel.code
    assert "qgate 16 -> 16, hardsigmoid" in qmodel.code and "qlinear_float 8 -> 5" in qmodel.code
    fxq.save(qmodel, tmp_path / "m.fxq")
    for same in (fxq.load(tmp_path / "m.fxq"), copy.deepcopy(qmodel), torch.compile(qmodel, backend="eager")):
        assert torch.equal(same(x), qmodel(x))
    fxq.draw(qmodel, tmp_path / "m.dot")
    assert "qconv_transpose 24 -> 16" in (tmp_path / "m.dot").read_text()
    assert "qgate" in str(fxq.profile(qmodel, x))
    assert fuse_images.PASS.run(qmodel, None) == 0, "idempotent"


def test_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    qmodel = made(Network().eval())
    x = images(2, 96, 96)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = qmodel(x)
        for count in (2, 3, 1, 4):
            torch.set_num_threads(count)
            assert torch.equal(qmodel(x), wanted)
    finally:
        torch.set_num_threads(threads)


def test_what_is_float_in_between_stays_outside():
    """A float operation on what a layer gives, whose result a later layer reads, parts one run from the next."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Network(), Network()
            self.widen = nn.Linear(5, 3 * 8 * 8)

        def forward(self, x):
            y = self.one(x)
            y = self.widen(y * torch.sin(y).sum(1, keepdim=True)).view(-1, 3, 8, 8)
            return self.two(torch.sin(y))

    torch.manual_seed(0)
    model = Between().eval()
    qmodel, apart = made(model), made(model, passes=WITHOUT)
    assert len(networks(qmodel)) == 2
    x = images(2, 32, 64)
    assert torch.equal(qmodel(x), apart(x))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_few_operations_stay(count):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(count))).eval()
    qmodel = made(model)
    assert len(networks(qmodel)) == (count + 1 >= fuse_images.LEAST)  # with the quantize, the last one gives float


def test_written_memory_is_no_part():
    torch.manual_seed(0)
    apart = made(Network().eval(), passes=WITHOUT)
    first = next(node for node in apart.graph.nodes if "quantize_channels_last" in str(node.target))
    first.meta["aliases"] = "input"
    assert fuse_images.PASS.run(apart, None) == 1
    (network,) = networks(apart)
    left = [node.name for node in apart.graph.nodes if str(node.target).startswith("fxq.q") and node is not network]
    assert left[0] == first.name and len(left) > 1, "what reads it is no part either"
