"""fuse_embeddings: sums of tables behind a norm become one op with the same bits, and nothing else does."""

import pytest
import torch
from torch import nn

import fxq
from fxq.ops.embedding import qembedding, qembedding_norm
from passes import CONVERT, PREPARE, fuse_embeddings

INT8_TABLES = fxq.Recipe(judge_tables=False)
IDS = torch.randint(0, 20, (3, 7))


def members():
    torch.manual_seed(3)
    words, places, kinds = nn.Embedding(20, 32), nn.Embedding(9, 32), nn.Embedding(2, 32)
    ids = {"index": torch.arange(9), "zeros": torch.zeros(9, dtype=torch.int64)}
    return ids | {"words": words, "places": places, "kinds": kinds, "norm": nn.LayerNorm(32), "out": nn.Linear(32, 32)}


def bert(self, ids):
    places = self.places(self.index[None, : ids.shape[1]])
    x = self.norm(places + (self.words(ids) + self.kinds(self.zeros[: ids.shape[1]])))
    return x + self.out(x)


def targets(qmodel):
    return [node.target for node in qmodel.graph.nodes if node.target in (qembedding, qembedding_norm)]


def test_three_tables_become_one_op(model_of, tmp_path):
    model = model_of(bert, **members())
    without = tuple(step for step in CONVERT if step is not fuse_embeddings.PASS)
    qmodel, apart = (
        fxq.quantize(model, IDS, recipe=INT8_TABLES),
        fxq.quantize(model, IDS, recipe=INT8_TABLES, passes=(PREPARE, without)),
    )
    assert targets(qmodel) == [qembedding_norm]
    assert targets(apart) == [qembedding] * 3
    for ids in (IDS, torch.randint(0, 20, (1, 9)), torch.randint(0, 20, (2, 1))):
        assert torch.equal(qmodel(ids), apart(ids))
        assert (fxq.golden(qmodel)(ids.numpy()) == qmodel(ids).numpy()).all()
    (node,) = [node for node in qmodel.graph.nodes if node.target is qembedding_norm]
    assert [table.target.split(".")[0] for table in node.args[1]] == ["words", "kinds", "places"]
    adds = [d for d in fxq.report(qmodel).decisions if d.op == "add" and "embedding" in d.detail]
    assert len(adds) == 2
    fxq.save(qmodel, tmp_path / "m.fxq")
    assert torch.equal(fxq.load(tmp_path / "m.fxq")(IDS), qmodel(IDS))
    fxq.draw(qmodel, tmp_path / "m.dot")
    assert fxq.compare(model, qmodel, IDS).output > 30
    with pytest.raises(IndexError, match="out of range"):
        qmodel(IDS + 20)


def read_twice(self, ids):
    x = self.words(ids) + self.places(ids % 9)
    y = self.norm(x)
    return self.out(y) + y + x


def other_addend(self, ids):
    y = self.norm(self.words(ids) + torch.cos(ids.float())[..., None])
    return self.out(y) + y


def two_sums(self, ids):
    y = self.norm((self.words(ids) + self.places(ids % 9)) + (self.words(ids + 1) + self.kinds(ids % 2)))
    return self.out(y) + y


def no_quantize(self, ids):
    return self.norm(self.words(ids) + self.places(ids % 9)) + self.out(self.words(ids))


@pytest.mark.parametrize("forward", [read_twice, other_addend, two_sums, no_quantize])
def test_others_stay(model_of, forward):
    ids = IDS % 18
    qmodel = fxq.quantize(model_of(forward, **members()), ids, recipe=INT8_TABLES)
    assert qembedding_norm not in targets(qmodel)
    assert qembedding in targets(qmodel)


def token_types(self, ids, sizes=None):
    places = self.index[None, : ids.shape[1]]
    kinds = torch.gather(self.zeros[None].expand(places.shape[0], -1), 1, places)
    x = self.norm(self.words(ids) + self.kinds(kinds.expand(*(ids.shape if sizes is None else sizes))))
    return x + self.out(x)


@pytest.mark.parametrize(("sizes", "changed", "found"), [(None, False, 1), ((3, 7), False, 0), (None, True, 0)])
def test_ids_that_are_one_number(model_of, sizes, changed, found):
    """Repeated to the size of other ids they are a constant; to sizes of their own, or of two numbers, they stay."""
    own = members()
    own["zeros"][5] += changed
    model = model_of(lambda s, ids: token_types(s, ids, sizes), **own)
    qmodel = fxq.quantize(model, IDS, recipe=INT8_TABLES)
    (node,) = [node for node in qmodel.graph.nodes if node.target is qembedding_norm]
    assert [i.op for i in node.args[0]].count("get_attr") == found
    assert fxq.compare(model, qmodel, IDS).output > 30
    if sizes is None:
        ids = torch.randint(0, 20, (5, 6 + found))
        assert fxq.compare(model, qmodel, ids).output > 30
