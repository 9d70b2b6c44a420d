"""carry: moving integers is moving the numbers that they stand for."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxq import qdq
from fxq.family import Claim
from fxq.graph import Value
from fxq.ops.carry import FAMILY
from fxq.spelling import MAX_POOLS, MOVES, max_pool1d

ARGUMENTS = {
    torch.reshape: ((4, 4),),
    torch.flatten: (1, -1),
    torch.unflatten: (0, (1, 2)),
    torch.squeeze: (),
    torch.unsqueeze: (1,),
    torch.transpose: (0, 2),
    torch.permute: ((2, 0, 1),),
    torch.movedim: (0, 2),
    torch.narrow: (2, 1, 2),
    torch.select: (1, 1),
    torch.flip: ((0, 2),),
    torch.tile: ((2, 1),),
    F.pixel_shuffle: (2,),
    F.pixel_unshuffle: (2,),
    torch.channel_shuffle: (2,),
    F.pad: ((1, 1), "reflect"),
    F.interpolate: (None, 2),
    max_pool1d: (2, 1, 1, 1, True),
    torch.max_pool2d: ((2, 2), (1, 2), (1, 1), (1, 1), False),
    torch.max_pool3d: ((1, 2, 2), (1, 1, 1), (0, 1, 0), (1, 1, 1), True),
}
SHAPES = {F.pixel_shuffle: (1, 8, 2, 3), F.pixel_unshuffle: (1, 2, 4, 6), torch.max_pool3d: (1, 2, 2, 4, 4)}


def test_each_move_is_tested():
    assert set(ARGUMENTS) == MOVES | MAX_POOLS


@pytest.mark.parametrize("move", ARGUMENTS, ids=lambda move: move.__name__)
@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_moves_of_integers(move, zero_point):
    q = torch.randint(0, 256, SHAPES.get(move, (2, 2, 4)), dtype=torch.uint8)
    x = qdq.dequantize(q, 0.5, zero_point)
    moved = move(q, *ARGUMENTS[move])
    assert moved.dtype == torch.uint8
    assert torch.equal(qdq.dequantize(moved, 0.5, zero_point), move(x, *ARGUMENTS[move]))


def call(target, *args, dtype=torch.float32, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["value"] = Value(dtype, (4, 4))
    size = graph.call_method("size", (x, 0))
    size.meta["value"] = 4
    flag = graph.call_method("is_contiguous", (x,))
    flag.meta["value"] = True
    constant = graph.get_attr("w")
    constant.meta["value"] = x.meta["value"]
    names = {"x": x, "size": size, "flag": flag, "w": constant}

    def resolve(value):
        if isinstance(value, str):
            return names[value]
        if isinstance(value, list | tuple):
            return type(value)(map(resolve, value))
        return value

    node = graph.call_function(target, tuple(map(resolve, args)), kwargs)
    node.meta["value"] = x.meta["value"]
    return fx.GraphModule(nn.Module(), fx.Graph()), node, x


GETITEM = operator.getitem


@pytest.mark.parametrize(
    ("args", "claimed"),
    [
        ((torch.reshape, "x", (2, -1)), True),
        ((torch.cat, ["x", "x"], 1), True),
        ((torch.cat, ["x", "w"], 1), False),
        ((torch.cat, [], 1), False),
        ((GETITEM, "x", 2), True),
        ((GETITEM, "x", (None, ..., slice(1, 3))), True),
        ((GETITEM, "x", "size"), True),
        ((GETITEM, "x", "flag"), False),
        ((GETITEM, "x", "x"), False),
        ((GETITEM, "x", [0, 1]), False),
        ((GETITEM, ["x"], 0), False),
        ((torch.chunk, "x", 2, 0), True),
        ((torch.roll, "x", 1), False),
        ((torch.cumsum, "x", 1), False),
    ],
)
def test_claims(args, claimed):
    gm, node, x = call(*args)
    found = FAMILY.claim(gm, node)
    assert (found is not None) == claimed
    if claimed:
        assert found == Claim("carry", (x, x) if args[0] is torch.cat else (x,))


def test_what_normalize_did_not_spell_or_is_not_float_is_left_alone():
    gm, node, _ = call(torch.flip, "x", dims=(0,))
    assert FAMILY.claim(gm, node) is None
    gm, node, _ = call(torch.reshape, "x", (2, -1), dtype=torch.int64)
    assert FAMILY.claim(gm, node) is None
