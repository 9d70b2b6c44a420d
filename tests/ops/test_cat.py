"""qcat: channels side by side, in one pass over channels-last memory; `order_channels` puts it there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
import fxq.ops
from fxq.expansion import expand_blocks
from fxq.layout import channels_last
from fxq.ops.cat import qcat
from passes import order_channels

OPTIONS = {"recipe": fxq.Recipe(judge_costs=False)}


@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 3), (0, 2, 2), (2, 2, 3, 4), (1, 1, 1)])
def test_the_bytes_of_a_concatenation(on_isa, shape):
    batch, *sizes = shape
    parts = [torch.randint(0, 256, (batch, c, *sizes), dtype=torch.uint8) for c in (5, 1, 33)]
    for own in (parts, [channels_last(part) for part in parts], [channels_last(parts[2])[:, 3:9], parts[0].flip(-1)]):
        found = on_isa(qcat, own)
        assert torch.equal(found, torch.cat(own, 1))
        assert found.movedim(1, -1).is_contiguous()


def test_what_does_not_fit(on_isa):
    x = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    for other in (torch.zeros(1, 2, 4, 5, dtype=torch.uint8), torch.zeros(1, 2, 4, dtype=torch.uint8), x.float()):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            on_isa(qcat, [x, other])


def test_opcheck():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    torch.library.opcheck(qcat, ([x, channels_last(x)],), test_utils=("test_schema", "test_faketensor"))


def joined(self, x):
    y = F.relu(self.stem(x))
    return self.head(torch.cat([torch.cat([y, self.other(y)], 1), y], 1))


def joined_rows(self, x):
    y = F.relu(self.stem(x))
    return self.head(torch.cat([y, self.other(y)], 2))


def joined_with_a_move(self, x):
    y = F.relu(self.stem(x))
    return self.head(torch.cat([y, self.other(y).transpose(2, 3)], 1))


def model_and_input(model_of, forward, channels):
    torch.manual_seed(0)
    layers = {"other": nn.Conv2d(6, 6, 3, padding=1), "head": nn.Conv2d(channels, 4, 1)}
    return model_of(forward, stem=nn.Conv2d(3, 6, 3, padding=1), **layers), torch.randn(4, 3, 9, 9)


def count(qmodel, target):
    return sum(node.target is target for node in expand_blocks(qmodel).graph.nodes)


def test_concatenations_of_images_are_one_pass(model_of, tmp_path):
    model, x = model_and_input(model_of, joined, 18)
    qmodel = fxq.quantize(model, x, **OPTIONS)
    assert (count(qmodel, qcat), count(qmodel, torch.cat)) == (2, 0)
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()
    assert "fxq.qcat" in {layer.op for layer in fxq.compare(model, qmodel, x).layers}
    fxq.draw(qmodel, tmp_path / "m.dot")
    fxq.save(qmodel, tmp_path / "m.fxq")
    for other in (fxq.load(tmp_path / "m.fxq"), torch.compile(qmodel, backend="eager")):
        assert torch.equal(other(x), qmodel(x))
    assert order_channels.PASS.run(qmodel, None) == 0, "idempotent"


def test_a_process_that_loads_files_knows_every_op():
    """Without the passes, which a process that only loads and calls never imports."""
    files = {path.stem for path in Path(fxq.ops.__file__).parent.glob("*.py")} - {"__init__"}
    code = "import fxq.ops, sys; print(*(name for name in sys.modules if name.startswith('fxq.ops.')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.removeprefix("fxq.ops.") for name in found} >= files


@pytest.mark.parametrize(("forward", "channels"), [(joined_rows, 6), (joined_with_a_move, 12)])
def test_others_stay(model_of, forward, channels):
    model, x = model_and_input(model_of, forward, channels)
    assert count(fxq.quantize(model, x, **OPTIONS), qcat) == 0
