"""Attention in whole models: what people write, other lengths and batches, padding, files, NumPy, torch.compile."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.expansion import expand
from fxq.ops.attention import qattention, qattention_float
from fxq.ops.linear_dynamic import qlinear_dynamic


def linear(n=16, m=16):
    return nn.Linear(n, m)


class Attention(nn.Module):
    """Self-attention as it is often written, with a causal mask in a buffer and padding as an argument."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = linear(16, 48), linear()
        self.register_buffer("past", torch.tril(torch.ones(1, 1, 32, 32)))

    def forward(self, x, seen):
        b, t, c = x.size()
        q, k, v = (part.view(b, t, 4, c // 4).transpose(1, 2) for part in self.qkv(x).split(c, 2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(self.past[:, :, :t, :t] == 0, float("-inf"))
        scores = scores.masked_fill(~seen[:, None, None, :], -1e9)
        y = F.dropout(F.softmax(scores, dim=-1), 0.1, self.training) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


def inputs(b, t):
    return torch.randn(b, t, 16), torch.arange(t) < torch.randint(t // 2, t + 1, (b, 1))


def calls(qmodel, *targets):
    return [node for node in expand(qmodel).graph.nodes if node.target in targets]


@pytest.fixture(scope="module")
def written_by_hand():
    torch.manual_seed(0)
    model = Attention().eval()
    data = [inputs(4, 10) for _ in range(8)]
    return model, fxq.quantize(model, data[0], calibration_data=data, check=True)


@pytest.mark.parametrize(("b", "t"), [(4, 10), (1, 10), (3, 1), (2, 31), (9, 7)])
def test_other_lengths_and_batches(written_by_hand, b, t):
    model, qmodel = written_by_hand
    assert len(calls(qmodel, qattention)) == 1
    assert [d.form for d in qmodel.report.decisions if d.op == "attention"] == ["int8"]
    args = inputs(b, t)
    assert fxq.compare(model, qmodel, args).output > 25


def test_padding_changes_no_bit_of_the_rest(written_by_hand):
    _, qmodel = written_by_hand
    x, _ = inputs(2, 9)
    alone = qmodel(x, torch.ones(2, 9, dtype=torch.bool))
    padded = qmodel(torch.cat([x, torch.randn(2, 20, 16)], 1), torch.arange(29).expand(2, 29) < 9)
    assert torch.equal(padded[:, :9], alone)


class Uneven(Attention):
    """Some tokens are a hundred times larger than the rest behind the activation, as a transformer's may be."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = linear(16, 64), linear(64, 16)

    def forward(self, x, seen):
        y = super().forward(x, seen)
        wide = F.gelu(self.widen(y))
        return y + self.narrow(torch.where(x[..., :1] > 1.2, 100 * wide, wide))


def test_rows_with_scales_of_their_own_at_other_lengths_and_padded():
    torch.manual_seed(0)
    model, data = Uneven().eval(), [inputs(4, 10) for _ in range(8)]
    qmodel = fxq.quantize(model, data[0], calibration_data=data)
    assert len(calls(qmodel, qlinear_dynamic)) == 1
    for b, t in ((1, 10), (2, 31), (9, 3)):
        assert fxq.compare(model, qmodel, inputs(b, t)).output > 20
    x, _ = inputs(2, 9)
    alone = qmodel(x, torch.ones(2, 9, dtype=torch.bool))
    padded = qmodel(torch.cat([x, 3 * torch.randn(2, 20, 16)], 1), torch.arange(29).expand(2, 29) < 9)
    assert torch.equal(padded[:, :9], alone)
    one = qmodel(x[:1], torch.ones(1, 9, dtype=torch.bool))
    assert torch.equal(one, alone[:1])


def test_numpy_files_copies_and_state(written_by_hand, tmp_path):
    _, qmodel = written_by_hand
    args = inputs(3, 12)
    expected = qmodel(*args)
    golden = fxq.golden(qmodel, islands="torch")
    assert np.array_equal(golden(*(arg.numpy() for arg in args)), expected.numpy())
    fxq.save(qmodel, tmp_path / "model.fxq")
    copied = copy.deepcopy(qmodel)
    copied.load_state_dict(qmodel.state_dict())
    for other in (fxq.load(tmp_path / "model.fxq"), copied):
        assert torch.equal(other(*args), expected)


def test_compiled(written_by_hand):
    _, qmodel = written_by_hand
    args = inputs(3, 12)
    compiled = torch.compile(qmodel, backend="aot_eager", fullgraph=False)
    assert torch.equal(compiled(*args), qmodel(*args))


def test_kept_float_by_the_recipe():
    model, args = Attention().eval(), inputs(4, 10)
    qmodel = fxq.quantize(model, args, recipe=fxq.Recipe(ops={"attention": fxq.FLOAT}))
    assert not calls(qmodel, qattention, qattention_float)
    (decision,) = [d for d in qmodel.report.decisions if d.op == "attention"]
    assert (decision.form, decision.reason) == ("float", fxq.Reason.USER_EXCLUDED) and decision.macs > 0


UNSUPPORTED = {
    "dropout": lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=1.0),
    "five dimensions": lambda q: F.scaled_dot_product_attention(q[None], q[None], q[None])[0],
    "int mask": lambda q: torch.softmax(q @ q.mT + torch.ones(5, 5, dtype=torch.int64), -1) @ q,
    "over queries": lambda q: torch.softmax(q @ q.mT, -2) @ q,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_variants_are_float_with_a_reason(model_of, name):
    def forward(self, x):
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return self.out(UNSUPPORTED[name](q).transpose(1, 2).flatten(2))

    model, x = model_of(forward, q=linear(), out=linear()), torch.randn(4, 5, 16)
    qmodel = fxq.quantize(model, x, on_low_sqnr="ignore")
    assert not calls(qmodel, qattention, qattention_float)
    kept = [d for d in qmodel.report.refusals() if d.op in ("scaled_dot_product_attention", "attention", "matmul")]
    assert kept and all(d.reason is fxq.Reason.NO_INTEGER_OP for d in kept)


def test_returned_weights_keep_the_attention_float():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(4, 5, 16)
    qmodel = fxq.quantize(attention, (x, x, x))
    assert not calls(qmodel, qattention, qattention_float)
    assert {"softmax", "bmm"} <= {d.op for d in qmodel.report.kept_float()}


def test_torchs_own_layers():
    layer, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(4, 6, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for model, inputs, count in ((stack, (x,), 2), (layer, (x, causal), 1)):
        qmodel = fxq.quantize(model, inputs)
        assert len(calls(qmodel, qattention)) == count and qmodel.report.int8_share == 1


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ARCHITECTURES = {
    "Bert": {**SIZES, "vocab_size": 100},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "use_cache": False},
    "ViT": {**SIZES, "image_size": 16, "patch_size": 4},
    "Llama": {**SIZES, "num_key_value_heads": 2, "vocab_size": 100, "use_cache": False},
}


def batch_for(name, n, length):
    if name == "ViT":
        return {"pixel_values": torch.randn(n, 3, 16, 16)}
    mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (n, 1))).long()
    return {"input_ids": torch.randint(3, 100, (n, length)), "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers(name, implementation):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name], attn_implementation=implementation)
    model = getattr(transformers, f"{name}Model")(config).eval()
    data = [batch_for(name, 4, 12) for _ in range(3)]
    qmodel = fxq.quantize(model, data[0], calibration_data=data)
    (first, second) = calls(qmodel, qattention)
    assert all(operand.meta["value"].dtype == torch.uint8 for operand in first.args[:3])
    assert "matmul" not in {d.op for d in qmodel.report.kept_float()}
    if name == "Llama":
        assert second.args[1].meta["value"].shape[1] == 2, "heads that are shared are not repeated"
    assert fxq.compare(model, qmodel, batch_for(name, 2, 7)).output > 25
