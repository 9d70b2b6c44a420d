"""Convolutional models end to end: what runs on integers, the golden model's bits, other sizes, no data at all."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import sqnr
from fxq.decisions import Reason

IMAGE, SIGNAL, VOLUME = torch.randn(4, 6, 9, 8), torch.randn(4, 6, 20), torch.randn(2, 6, 5, 4, 6)


def batch_norm(kind, n):
    norm = kind(n)
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


def conv(m=6, n=6, kernel=3, **options):
    return nn.Conv2d(m, n, kernel, **{"padding": 1, **options})


def gated(self, x):
    y = F.silu(self.c(x))
    return self.k(y * torch.sigmoid(self.g(y.mean((2, 3), keepdim=True))))


def unet(self, x):
    y = F.relu(self.c(x))
    z = F.relu(self.k(F.max_pool2d(y, 2, ceil_mode=True)))
    return self.g(torch.cat([y, F.interpolate(z, size=y.shape[2:], mode="bilinear")], 1))


MODELS = {
    "strides": (nn.Sequential(conv(stride=2), nn.ReLU(), conv(6, 5, (3, 1), dilation=(2, 1))), IMAGE),
    "depthwise": (nn.Sequential(conv(groups=6), nn.ReLU6(), conv(6, 12, 1, padding=0)), IMAGE),
    "groups": (nn.Sequential(conv(6, 9, groups=3), nn.ReLU(), conv(9, 4)), IMAGE),
    "1d": (nn.Sequential(nn.Conv1d(6, 8, 5, 2, padding=2), nn.ReLU(), nn.Conv1d(8, 3, 3, padding="same")), SIGNAL),
    "3d": (nn.Sequential(nn.Conv3d(6, 4, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(4, 3, 2)), VOLUME),
    "padding modes": (
        nn.Sequential(*(conv(padding_mode=mode) for mode in ("zeros", "reflect", "replicate", "circular"))),
        IMAGE,
    ),
    "pads": (nn.Sequential(conv(), nn.ReLU(), nn.ZeroPad2d((1, 2, 0, 3)), conv(padding=0), nn.ZeroPad2d(1)), IMAGE),
    "norms": (nn.Sequential(conv(), batch_norm(nn.BatchNorm2d, 6), batch_norm(nn.BatchNorm2d, 6), conv()), IMAGE),
    "norm behind a relu": (nn.Sequential(conv(), nn.ReLU(), batch_norm(nn.BatchNorm2d, 6), conv()), IMAGE),
    "norm first": (nn.Sequential(batch_norm(nn.BatchNorm2d, 6), conv(padding=0), nn.ReLU(), conv()), IMAGE),
    "residual": (lambda s, x: s.k(F.relu(s.c(x)) + s.g(x)), IMAGE),
    "concat": (lambda s, x: s.t(torch.cat([F.relu(s.c(x)), s.k(x)], 1)), IMAGE),
    "squeeze and excite": (gated, IMAGE),
    "up and down": (lambda s, x: unet(s, x), IMAGE),
    "averages": (nn.Sequential(conv(), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), conv()), IMAGE),
    "adaptive": (nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(36, 5)), IMAGE),
    "global": (nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)), IMAGE),
    "mean": (lambda s, x: s.l(s.c(x).mean((-1, -2))), IMAGE),
    "transposed": (
        nn.Sequential(conv(), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.ReLU6(), nn.ConvTranspose2d(4, 4, 2)),
        IMAGE,
    ),
    "transposed groups": (nn.Sequential(nn.ConvTranspose1d(6, 8, 4, 2, 1, groups=2), nn.Conv1d(8, 2, 1)), SIGNAL),
    "nearest": (nn.Sequential(conv(), nn.Upsample(scale_factor=1.5), conv(), nn.Upsample((5, 7)), conv()), IMAGE),
    "shuffles": (nn.Sequential(conv(6, 8), nn.PixelShuffle(2), conv(2, 4), nn.ChannelShuffle(2), conv(4, 4)), IMAGE),
    "activations": (nn.Sequential(conv(), nn.SiLU(), conv(), nn.Hardswish(), conv(), nn.GELU(), conv()), IMAGE),
    "no batch": (nn.Sequential(conv(), nn.ReLU(), conv()), IMAGE[0]),
}  # fmt: skip


def members():
    return {"c": conv(), "k": conv(), "g": conv(), "t": conv(12), "l": nn.Linear(6, 4)}


def quantized(name, model_of, **options):
    model, x = MODELS[name]
    if not isinstance(model, nn.Module):
        own = members()
        if model is gated:
            own["g"] = conv(kernel=1, padding=0)
        if name == "up and down":
            own["g"] = conv(12)
        model = model_of(model, **own)
    model.eval()
    with torch.no_grad():
        return model, fxq.quantize(model, x, **options), x


def same(a, b):
    return torch.equal(torch.from_numpy(np.ascontiguousarray(a)), b.contiguous())


@pytest.mark.parametrize("name", MODELS)
def test_all_of_it_runs_on_integers(name, model_of):
    """Every product, and all between the first and the last; the golden model has the same bits; other sizes work."""
    model, q, x = quantized(name, model_of, check=True)
    report = q.report
    assert report.int8_share == 1 and not report.refusals()
    assert report.sqnr > 30
    inner = [d for d in report.kept_float() if d.reason is not Reason.FLOAT_DATA]
    assert [d.op for d in inner] == []
    golden = fxq.golden(q)
    wide = torch.cat([x, -x, x], -1) if name not in ("adaptive",) else x
    for other in (x, 3 * wide, x[:0] if x.dim() == 4 and name != "no batch" else x):
        assert same(golden(other.numpy()), q(other))
    with torch.no_grad():
        assert sqnr(model(wide), q(wide)) > 20


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3, dilation=2), nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(3, 4, 3, 2)],
    ids=str,
)
def test_images_of_other_channels_are_refused(conv):
    x = torch.randn(2, 16, 8, 8)
    qmodel = fxq.quantize(nn.Sequential(conv, nn.ReLU()).eval(), x[:, : conv.in_channels])
    for channels in set(range(conv.groups, 16, conv.groups)) - {conv.in_channels}:
        with pytest.raises(RuntimeError, match="packed weight of shape"):
            qmodel(x[:, :channels])


def test_channels_last_images_give_the_same_bits(model_of):
    _, q, x = quantized("strides", model_of)
    assert torch.equal(q(x), q(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(q(x[:, :, ::2]), q(x[:, :, ::2].contiguous()))


def test_copies_and_files(model_of, tmp_path):
    _, q, x = quantized("squeeze and excite", model_of)
    fxq.save(q, tmp_path / "m.fxq")
    for other in (copy.deepcopy(q), fxq.load(tmp_path / "m.fxq")):
        assert torch.equal(other(x), q(x))
    _, q, x = quantized("up and down", model_of)
    fxq.golden(q).save(tmp_path / "m.npz")
    assert same(fxq.GoldenModel.load(tmp_path / "m.npz")(x.numpy()), q(x))


def test_the_trace_of_a_convolution_is_exact_integer_arithmetic():
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1)).eval()
    x = torch.randn(1, 2, 3, 3)
    q = fxq.quantize(model, x, recipe=fxq.Recipe(round_weights=None))
    traced = fxq.golden(q).trace(x.numpy())
    q_x, acc = traced["0.x_q"], traced["0.acc"]
    w = model[0].weight.detach().numpy()
    q_w = np.rint(w / (np.abs(w).reshape(3, -1).max(1) / 127)[:, None, None, None]).astype(int)
    z = int(next(n for n in q.graph.nodes if "quantize" in n.name).args[2])
    padded = np.full((2, 5, 5), z)
    padded[:, 1:4, 1:4] = q_x[0]
    for n in range(3):
        for i in range(4):
            for j in range(4):
                assert acc[0, n, i, j] == (padded[:, i : i + 2, j : j + 2] * q_w[n]).sum()


REFUSED = {
    "a computed weight": (lambda s, x: F.conv2d(x, s.k.weight * 2 + x.mean()), Reason.DYNAMIC_WEIGHT),
    "a computed transposed weight": (lambda s, x: F.conv_transpose2d(x, s.k.weight + x.mean()), Reason.DYNAMIC_WEIGHT),
    "complex": (lambda s, x: torch.view_as_real(F.conv2d(x.to(torch.complex64), s.w)), Reason.NO_INTEGER_OP),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_form_says_why(name, model_of):
    forward, reason = REFUSED[name]
    w = torch.randn(3, 6, 3, 3, dtype=torch.complex64)
    model = model_of(forward, k=nn.Conv2d(6, 6, 3), w=w)
    q = fxq.quantize(model, IMAGE, on_low_sqnr="ignore")
    (decision,) = [d for d in q.report.kept_float() if d.op.startswith("conv")]
    assert decision.reason is reason
    with torch.no_grad():
        assert torch.equal(q(IMAGE), model(IMAGE))


def test_a_bias_that_no_int32_holds_stays_float():
    model = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)).eval()
    for layer, path in ((model[0], "0 "), (model[2], "2 ")):
        with torch.no_grad():
            layer.bias.fill_(1e9)
            layer.weight *= 1e-3
        q = fxq.quantize(model, IMAGE, on_low_sqnr="ignore")
        assert any(path in note and "bias is too large" in note for note in q.report.notes)
        assert sqnr(model(IMAGE), q(IMAGE)) > 40
        assert same(fxq.golden(q, islands="torch")(IMAGE.numpy()), q(IMAGE))


def test_recipes_name_the_families(model_of):
    _, q, _ = quantized("transposed", model_of, recipe=fxq.Recipe(ops={"conv_transpose": fxq.FLOAT}))
    forms = {d.op: d.form for d in q.report.decisions}
    assert forms["conv2d"] == "int8" and forms["conv_transpose"] == "float"


def test_what_export_captures_is_the_same(model_of):
    first = [conv(padding_mode="reflect"), batch_norm(nn.BatchNorm2d, 6), nn.ReLU(), nn.Upsample(scale_factor=2)]
    last = [conv(), nn.Hardswish(), nn.AvgPool2d(2), nn.ConvTranspose2d(6, 4, 2, 2)]
    model = nn.Sequential(*first, *last).eval()
    own, captured = (fxq.quantize(model, IMAGE, frontend=frontend) for frontend in ("trace", "export"))
    assert {d.reason for d in captured.report.kept_float()} <= {Reason.FLOAT_DATA}
    assert torch.equal(own(IMAGE), captured(IMAGE))


def peak_bytes(model, x):
    """The most memory that one call holds at a time, as torch's allocator counts it."""
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        model(x)
    live = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def test_activations_take_a_third_of_the_memory():
    layers = []
    for n in (3, 32, 32):
        layers += [nn.Conv2d(n, 32, 3, padding=1), batch_norm(nn.BatchNorm2d, 32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
    x = torch.randn(2, 3, 64, 64)
    assert peak_bytes(fxq.quantize(model, x), x) <= peak_bytes(model, x) / 3


def test_images_are_quantized_without_a_copy_in_either_order():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(2, 8, 32, 32)
    q = fxq.quantize(model, x, on_low_sqnr="ignore")
    most = (
        x.numel() + 16 * 2 * 32 * 32,
        16 * 2 * 32 * 32 + 4 * 4 * 2 * 32 * 32,
    )  # bytes: both neighbours of an operation
    for own in (x, x.contiguous(memory_format=torch.channels_last)):
        assert peak_bytes(q, own) <= max(most) < x.numel() * 4 + x.numel()


def test_torch_compile_and_two_threads(model_of):
    _, q, x = quantized("squeeze and excite", model_of)
    assert torch.equal(torch.compile(q, backend="aot_eager")(x), q(x))
