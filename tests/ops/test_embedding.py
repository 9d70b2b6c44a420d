"""qembedding against NumPy, its errors, and embeddings from model to file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import Reason, numerics
from fxq.ops.embedding import qembedding, qembedding_norm

TABLE = torch.randint(-127, 128, (11, 6), dtype=torch.int8)
SCALES = torch.rand(11)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_against_numpy(on_isa, shape, dtype):
    ids = torch.randint(0, 11, shape, dtype=dtype)
    found = on_isa(qembedding, ids, TABLE, SCALES)
    assert np.array_equal(found.numpy(), numerics.dequantize_weight(TABLE.numpy(), SCALES.numpy())[ids.numpy()])
    torch.library.opcheck(qembedding, (ids, TABLE, SCALES))


@pytest.mark.parametrize("bad", [11, -1])
def test_ids_out_of_range_raise_what_torch_raises(bad):
    with pytest.raises(IndexError, match="out of range"):
        qembedding(torch.tensor([0, bad]), TABLE, SCALES)


def test_scales_of_another_length_are_refused():
    with pytest.raises((RuntimeError, ValueError), match="scales"):
        qembedding(torch.tensor([0]), TABLE, SCALES[:3])


def tables(k, *sizes):
    return [torch.randint(-127, 128, (v, k), dtype=torch.int8) for v in sizes], [torch.rand(v) for v in sizes]


@pytest.mark.parametrize("k", [1, 16, 65, 384])
@pytest.mark.parametrize("kind", list(numerics.NORMS))
@pytest.mark.parametrize("shapes", [[(2, 3)], [(2, 3), (3,), (1, 3)], [(2, 1), (1, 4)], [(), (0,)]], ids=str)
def test_the_sum_of_tables_normalised(on_isa, k, kind, shapes):
    rows, scales = tables(k, *range(5, 5 + len(shapes)))
    ids = [torch.randint(0, 5, shape, dtype=(torch.int64, torch.int32)[i % 2]) for i, shape in enumerate(shapes)]
    ids[0] = ids[0].t().contiguous().t() if ids[0].dim() == 2 else ids[0]
    for weight, factor in ((None, None), (torch.randn(k), torch.exp2(torch.randint(-5, 5, (k,)).float()))):
        operands = kind, weight, weight, 1e-5, 0.03, 7, factor
        found = on_isa(qembedding_norm, ids, rows, scales, *operands)
        arrays = [None if v is None else v.numpy() if isinstance(v, torch.Tensor) else v for v in operands]
        lists = [[t.numpy() for t in part] for part in (ids, rows, scales)]
        expected = numerics.qembedding_norm(*lists, *arrays)
        assert [t.dtype for t in found] == [torch.float32, torch.uint8]
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True))
    torch.library.opcheck(
        qembedding_norm, (ids, rows, scales, *operands), test_utils=("test_schema", "test_faketensor")
    )


def test_the_norm_of_a_sum_refuses_what_does_not_fit():
    (rows, scales), norm = tables(8, 5, 6), ("layer_norm", None, None, 1e-5, 0.03, 7)
    ids = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    with pytest.raises(IndexError, match="out of range"):
        qembedding_norm([ids[0], torch.tensor([0, 6])], rows, scales, *norm)
    with pytest.raises((RuntimeError, ValueError), match="tables"):
        qembedding_norm(ids, rows[:1], scales, *norm)
    with pytest.raises(RuntimeError, match="broadcast"):
        qembedding_norm([ids[0], torch.tensor([1, 2, 3])], rows, scales, *norm)


IDS = torch.randint(0, 50, (4, 7))


def model_with(recipe="w8a8"):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(50, 32, padding_idx=0), nn.LayerNorm(32), nn.Linear(32, 8)).eval()
    return model, fxq.quantize(model, IDS, recipe=recipe)


def test_a_table_becomes_int8(tmp_path):
    model, qmodel = model_with()
    assert [node.target for node in qmodel.graph.nodes].count(qembedding) == 1
    assert not [t for t in qmodel.state_dict().values() if t.dtype == torch.float32 and t.numel() >= 50 * 32]
    assert [d.form for d in fxq.report(qmodel).decisions if d.op == "embedding"] == ["int8"]
    assert fxq.report(qmodel).sqnr > 30
    ids = torch.randint(0, 50, (2, 3, 5))
    assert (fxq.golden(qmodel.requires_grad_(False))(ids.numpy()) == qmodel(ids).numpy()).all()
    (layer,) = [layer for layer in fxq.compare(model, qmodel, IDS).layers if layer.op == "fxq.qembedding"]
    assert layer.alone > 40
    fxq.save(qmodel, tmp_path / "m.fxq")
    assert torch.equal(fxq.load(tmp_path / "m.fxq")(ids), qmodel(ids))
    for wrong in (50, -1):
        with pytest.raises(IndexError):
            qmodel(torch.tensor([[wrong]]))
        with pytest.raises(fxq.InputError):
            fxq.golden(qmodel)(np.array([[wrong]]))


def test_one_scale_for_the_table():
    model, qmodel = model_with(fxq.Recipe(judge_tables=False, ops={"embedding": fxq.Rule(weight="per_tensor")}))
    assert [node for node in qmodel.graph.nodes if node.target is qembedding]
    assert fxq.compare(model, qmodel, IDS).output > 25


def test_the_recipe_keeps_it_float():
    _, qmodel = model_with(fxq.Recipe(modules={"0": fxq.FLOAT}))
    assert not [node for node in qmodel.graph.nodes if node.target is qembedding]
    (decision,) = [d for d in fxq.report(qmodel).decisions if d.op == "embedding"]
    assert decision.reason is Reason.USER_EXCLUDED


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: s.a(F.embedding(x, s.w * 2 + s.a(s.w))), Reason.DYNAMIC_WEIGHT),
        (lambda s, x: s.a(F.embedding(x, s.w.double()).float()), Reason.NOT_FLOAT32),
    ],
    ids=["computed", "float64"],
)
def test_refused(model_of, forward, reason):
    qmodel = fxq.quantize(model_of(forward, a=nn.Linear(8, 8), w=nn.Parameter(torch.randn(50, 8))), IDS)
    (decision,) = [d for d in fxq.report(qmodel).decisions if d.op == "embedding"]
    assert (decision.form, decision.reason) == ("float", reason)


def test_read_by_a_product_alone():
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 8)).eval()
    qmodel = fxq.quantize(model, IDS)
    assert [node for node in qmodel.graph.nodes if node.target is qembedding]
    assert fxq.compare(model, qmodel, IDS).output > 30
