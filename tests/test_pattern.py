"""Patterns match a tree, or say at which node and why they do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxq.pattern import Any, Cause, Const, Match, Miss, OneOf, Op


@pytest.fixture
def graph():
    """x, w: a placeholder and a constant; call(target, *args, **kwargs): one more node."""
    graph = fx.Graph()

    class Built:
        x = graph.placeholder("x")
        w = graph.get_attr("w")

        @staticmethod
        def call(target, *args, **kwargs):
            return graph.call_function(target, args, kwargs)

    fx.GraphModule(nn.Module(), fx.Graph())
    graph.owning_module = nn.Module()
    Built.owner = graph
    return Built


LINEAR = Op({F.linear}, Any("x"), Const("w"), Any("b"), name="linear")
TREE = Op({torch.relu, torch.neg}, LINEAR)


def test_match_binds_by_name(graph):
    linear = graph.call(F.linear, graph.x, graph.w, None)
    relu = graph.call(torch.relu, linear)
    match = TREE.match(relu)
    assert isinstance(match, Match)
    assert match.root is relu
    assert match.bound == {"x": graph.x, "w": graph.w, "b": None, "linear": linear}
    assert match.node("x") is match["x"] is graph.x
    with pytest.raises(AssertionError):
        match.node("b")


def miss(pattern, node):
    found = pattern.match(node)
    assert isinstance(found, Miss)
    return found.cause, found.node


def test_misses_name_the_node(graph):
    linear = graph.call(F.linear, graph.x, graph.w, None)
    assert miss(TREE, linear) == (Cause.OTHER_OP, linear)
    assert miss(TREE, graph.x) == (Cause.OTHER_OP, graph.x)
    assert miss(TREE, None) == (Cause.OTHER_OP, None)
    assert miss(TREE, graph.call(torch.relu, graph.x)) == (Cause.OTHER_OP, graph.x)
    computed = graph.call(F.linear, graph.x, graph.x, None)
    assert miss(LINEAR, computed) == (Cause.NOT_CONSTANT, graph.x)
    short = graph.call(F.linear, graph.x, graph.w)
    assert miss(LINEAR, short) == (Cause.ARITY, short)
    named = graph.call(F.linear, graph.x, graph.w, None, bias=None)
    assert miss(LINEAR, named) == (Cause.ARITY, named)


def test_an_inner_value_that_others_read(graph):
    linear = graph.call(F.linear, graph.x, graph.w, None)
    relu, _ = graph.call(torch.relu, linear), graph.call(torch.neg, linear)
    assert miss(TREE, relu) == (Cause.SHARED_INTERMEDIATE, linear)
    shared = Op({torch.relu}, Op({F.linear}, Any("x"), Const("w"), Any("b"), shared=True))
    assert isinstance(shared.match(relu), Match)


def test_the_root_may_have_any_readers(graph):
    linear = graph.call(F.linear, graph.x, graph.w, None)
    graph.call(torch.relu, linear)
    graph.call(torch.neg, linear)
    assert isinstance(LINEAR.match(linear), Match)


def test_the_same_name_twice_is_the_same_value(graph):
    twice = Op({torch.add}, Any("a"), Any("a"))
    assert isinstance(twice.match(graph.call(torch.add, graph.x, graph.x)), Match)
    assert miss(twice, graph.call(torch.add, graph.x, graph.w)) == (Cause.OTHER_VALUE, graph.w)
    assert isinstance(twice.match(graph.call(torch.add, 2, 2)), Match)


def test_a_placeholder_named_like_a_target_does_not_match():
    graph = fx.Graph()
    assert isinstance(Op({"relu"}, Any("x")).match(graph.placeholder("relu")), Miss)


def test_one_of_several_binds_what_the_first_match_has(graph):
    either = Op({torch.neg}, OneOf(Op({torch.relu}, Any("x"), name="relu"), Op({torch.clamp}, Any("x"), Any("low"))))
    relu, clamp = graph.call(torch.relu, graph.x), graph.call(torch.clamp, graph.x, 0)
    assert either.match(graph.call(torch.neg, relu)).bound == {"x": graph.x, "relu": relu}
    assert either.match(graph.call(torch.neg, clamp)).bound == {"x": graph.x, "low": 0}
    assert miss(either, graph.call(torch.neg, clamp)) == (Cause.SHARED_INTERMEDIATE, clamp)
    assert miss(either, graph.call(torch.neg, graph.x)) == (Cause.OTHER_OP, graph.x)


def test_an_alternative_that_failed_leaves_nothing_bound(graph):
    halfway = OneOf(Op({torch.add}, Any("a"), Const("w")), Op({torch.add}, Any("b"), Any("c")))
    assert halfway.match(graph.call(torch.add, graph.w, graph.x)).bound == {"b": graph.w, "c": graph.x}
