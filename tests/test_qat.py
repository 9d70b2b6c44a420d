"""Training on the numbers of int8: fake quantization, folded batch norms, schedules, checkpoints, conversion."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import numerics
from fxq.batch_norm import FoldedBatchNorm, folded
from fxq.fake_quantize import (
    FakeQuantize,
    LearnedFakeQuantize,
    LearnedWeightFakeQuantize,
    TrainedAttention,
    WeightFakeQuantize,
)
from fxq.ops.attention import qattention_float
from fxq.pipeline import run
from fxq.qdq import dequantize, quantize
from fxq.recipe import Recipe
from fxq.spelling import ATTENTION

LEARNED = Recipe(learn_steps=True)


def classifier():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def batches(count, seed=5):
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(8, 3, generator=draw)
    xs = [torch.randn(32, 8, generator=draw) for _ in range(count)]
    return [(x, (x @ teacher).argmax(1)) for x in xs]


def train(model, data, optimizer=None):
    """The losses of one step on each batch."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def agrees(qat, x):
    """The integers of a trained graph, held to what its fake quantization gives in eval mode."""
    with torch.no_grad():
        fake, qmodel = qat.eval()(x), fxq.convert(qat)
        assert (qmodel(x) - fake).abs().max() < 0.02 * fake.abs().max()
    return qmodel


def as_qdq(qat):
    """A trained graph where it has scales and zero points and no fake quantizers any more."""
    from passes import CONVERT

    gm = copy.deepcopy(qat).eval()
    steps = [step.name for step in CONVERT].index("calibrate") + 1
    return run(CONVERT[:steps], gm, gm.meta["fxq"])


class TestActivations:
    @pytest.mark.parametrize("kind", [FakeQuantize, LearnedFakeQuantize])
    def test_eval_has_the_bits_of_the_contract(self, kind):
        fake = kind("here")
        x = torch.cat([torch.randn(1000) * 3, torch.linspace(-9, 9, 4001), torch.tensor([0.0, -0.0, 1e30, -1e30])])
        with torch.no_grad(), fxq.observers.learning(fake):
            fake(torch.randn(500))
        fake.eval()
        q = fake.qparams()
        wanted = numerics.dequantize(numerics.quantize(x.numpy(), q.scale, q.zero_point), q.scale, q.zero_point)
        assert np.array_equal(fake(x).detach().numpy(), wanted)

    def test_before_any_data_it_passes_on(self):
        x = torch.randn(5)
        assert torch.equal(FakeQuantize("here").eval()(x), x)

    def test_gradients_pass_inside_the_clamp_only(self):
        fake = FakeQuantize("here")
        fake(torch.tensor([-1.0, 2.0]))
        q = fake.eval().qparams()
        low, high = -q.zero_point * q.scale, (255 - q.zero_point) * q.scale
        edge = 0.49 * q.scale
        x = torch.tensor([low - 2 * q.scale, low - edge, low, 0.1, high, high + edge, high + 2 * q.scale])
        x.requires_grad_()
        (fake(x) * torch.arange(1.0, 8)).sum().backward()
        assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]

    def test_the_step_size_learns_as_in_lsq(self):
        fake = LearnedFakeQuantize("here")
        with fxq.observers.learning(fake):
            fake(torch.tensor([-1.0, 2.0]))
        x, up = torch.randn(64) * 2, torch.randn(64)
        (fake(x) * up).sum().backward()
        q = fake.qparams()
        steps = x.double() / q.scale
        low, high = -q.zero_point, 255 - q.zero_point
        slope = torch.where(
            (steps.round() < low) | (steps.round() > high), steps.clamp(low, high), steps.round() - steps
        )
        wanted = (slope * up).sum() / (64 * 255) ** 0.5 * q.scale  # times the scale: the parameter is a logarithm
        assert fake.log_scale.grad.item() == pytest.approx(wanted.item(), rel=1e-3)

    def test_the_range_follows_the_data_in_training_mode_until_it_is_frozen(self):
        fake = FakeQuantize("here")
        fake(torch.tensor([0.0, 1.0]))
        fake(torch.tensor([0.0, 2.0]))
        assert fake.high.item() == pytest.approx(1.1)
        fake.eval()(torch.tensor([0.0, 9.0]))
        assert fake.high.item() == pytest.approx(1.1)
        fake.train().freeze(after=1)
        for _ in range(3):
            fake(torch.tensor([0.0, 2.1]))
        assert fake.high.item() == pytest.approx(1.2)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_training_that_diverges_is_named(self, bad):
        fake = FakeQuantize("the output of fc1")
        fake.freeze(0)
        with pytest.raises(fxq.CalibrationError, match="the output of fc1 holds NaN or infinity"):
            fake(torch.tensor([1.0, bad]))


class TestWeights:
    @pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
    @pytest.mark.parametrize("kind", [WeightFakeQuantize, LearnedWeightFakeQuantize])
    def test_the_bits_of_the_contract(self, kind, granularity):
        w = torch.randn(5, 4, 3)
        w[2] = 0
        fake = kind("here", granularity, w)
        given = w * 1.5 if kind is WeightFakeQuantize else w
        got = fake(given).detach().numpy()
        scales = fake.scales.numpy()
        wanted = numerics.dequantize_weight(numerics.quantize_weight(given.numpy(), scales), scales)
        assert np.array_equal(got, wanted)
        assert len(scales) == (5 if granularity == "per_channel" else 1)
        if kind is WeightFakeQuantize:
            peak = given.abs().reshape(5, -1).amax(1) if granularity == "per_channel" else given.abs().max()[None]
            assert np.array_equal(scales, numerics.weight_scales(peak.numpy()))

    def test_gradients_pass_through(self):
        w = torch.randn(5, 4, requires_grad=True)
        up = torch.randn(5, 4)
        (WeightFakeQuantize("here", "per_channel", w)(w) * up).sum().backward()
        assert torch.equal(w.grad, up)

    def test_the_step_sizes_learn_as_in_lsq(self):
        w, up = torch.randn(5, 12), torch.randn(5, 12)
        fake = LearnedWeightFakeQuantize("here", "per_channel", w)
        with torch.no_grad():
            fake.log_scales -= 0.5  # so that some are clipped
        (fake(w) * up).sum().backward()
        steps = w.double() / fake.scales[:, None]
        slope = torch.where(steps.round().abs() > 127, steps.clamp(-127, 127), steps.round() - steps)
        wanted = (slope * up).sum(1) / (12 * 127) ** 0.5 * fake.scales
        assert torch.allclose(fake.log_scales.grad.double(), wanted.double(), rtol=1e-3)


class TestAttention:
    OPTIONS = (
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"heads": 1},
        {"mask": torch.randn(6, 6)},
        {"mask": torch.tensor([[True, False, True, True, False, True]] * 5 + [[False] * 6])},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
    @pytest.mark.parametrize("nan_if_masked", [False, True])
    def test_numbers_and_gradients(self, options, nan_if_masked):
        """Without rounding those of torch's; with it what the integer op gives, and the gradients of neighbours."""
        mask, is_causal, scale = options.get("mask"), options.get("is_causal", False), options.get("scale")
        q, k, v = (torch.randn(2, h, 6, 8) for h in (2, *[options.get("heads", 2)] * 2))
        s_z = 0.03, 120
        q, k, v = (dequantize(quantize(x, *s_z), *s_z).requires_grad_() for x in (q, k, v))
        rest = mask, is_causal, scale, nan_if_masked
        up, results = torch.randn(2, 2, 6, 8), []
        for function in (ATTENTION, TrainedAttention(False, 0.0), TrainedAttention(True, 0.5).eval()):
            y = function(q, k, v, *rest)
            seen = ~y.isnan()
            results.append((y.detach(), *torch.autograd.grad((y[seen] * up[seen]).sum(), (q, k, v))))
        exact, plain, rounded = results
        assert torch.allclose(exact[0], plain[0], atol=1e-5, equal_nan=True)
        integers = [quantize(x, *s_z) for x in (q, k, v)]
        integer = qattention_float(*integers, *rest[:3], 120, 120, 0.03**2, 0.03, nan_if_masked)
        assert rounded[0].isnan().equal(integer.isnan())
        apart = (rounded[0] - integer).nan_to_num().abs()
        assert apart.max() < 0.02  # where float32 and the op's polynomial fall on two sides of a half
        assert (apart > 1e-5).float().mean() < 0.1
        if exact[0].isnan().any():
            return
        for a, b, c in zip(exact[1:], plain[1:], rounded[1:], strict=True):
            assert b.isfinite().all()
            assert torch.allclose(a, b, atol=1e-5)
            assert torch.cosine_similarity(b.flatten(), c.flatten(), 0) > 0.99


def norm_of(n=6, **options):
    norm = nn.BatchNorm1d(n, **options)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


class TestFoldedBatchNorm:
    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}])
    @pytest.mark.parametrize("bias", [True, False])
    def test_without_quantization_it_trains_like_a_batch_norm(self, options, bias):
        plain, linear = norm_of(**options), nn.Linear(4, 6, bias=bias)
        fused, own = FoldedBatchNorm(copy.deepcopy(plain), F.linear, None), copy.deepcopy(linear)
        for step in range(3):
            x, up = torch.randn(16, 4), torch.randn(16, 6)
            a, b = plain(linear(x)), fused(x, own.weight, own.bias)
            assert torch.allclose(a, b, atol=1e-5), step
            for model in ((plain, linear), (fused, own)):
                for module in model:
                    module.zero_grad()
            (a * up).sum().backward()
            (b * up).sum().backward()
            theirs = [p.grad for m in (plain, linear) for p in m.parameters()]
            ours = [p.grad for m in (fused, own) for p in m.parameters()]
            # A bias before a norm has no gradient but rounding.
            assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(theirs, ours, strict=True))
        assert torch.allclose(plain.running_mean, fused.running_mean, atol=1e-5)
        assert torch.allclose(plain.running_var, fused.running_var, atol=1e-5)
        assert plain.num_batches_tracked == fused.num_batches_tracked
        x = torch.randn(16, 4)
        assert torch.allclose(plain.eval()(linear(x)), fused.eval()(x, own.weight, own.bias), atol=1e-5)

    def test_it_quantizes_the_folded_weight(self):
        norm, linear, seen = norm_of(), nn.Linear(4, 6), []
        wanted, _ = folded(
            linear.weight, linear.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
        )

        class Spy(nn.Module):
            def forward(self, w):
                seen.append(w)
                return w

        fused = FoldedBatchNorm(norm, F.linear, Spy())
        fused(torch.randn(16, 4), linear.weight, linear.bias)
        assert torch.allclose(seen[0], wanted, atol=1e-6)

    def test_a_channel_that_gamma_switches_off_learns(self):
        norm, linear = norm_of(), nn.Linear(4, 6)
        with torch.no_grad():
            norm.weight[2] = 0
        fused = FoldedBatchNorm(norm, F.linear, WeightFakeQuantize("w", "per_channel", linear.weight))
        y = fused(torch.randn(16, 4), linear.weight, linear.bias)
        (y * torch.randn(16, 6)).sum().backward()
        assert bool(torch.isfinite(y).all())
        assert abs(fused.weight.grad[2].item()) > 1e-3

    def test_frozen_statistics_are_what_it_normalises_by(self):
        linear = nn.Linear(4, 6)
        fused = FoldedBatchNorm(norm_of(), F.linear, None)
        fused.freeze(after=1)
        x = torch.randn(16, 4)
        moving = fused(x, linear.weight, linear.bias)
        before = fused.running_mean.clone()
        standing = fused(x, linear.weight, linear.bias)
        assert torch.equal(fused.running_mean, before)
        assert not torch.allclose(moving, standing)
        assert torch.equal(standing, fused.eval()(x, linear.weight, linear.bias))
        assert standing.requires_grad


class TestPrepare:
    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    def test_the_zoo(self, zoo, recipe, fingerprint):
        """Names, gradients, and the numbers of eval mode: bit for bit those of quantize/dequantize pairs."""
        if zoo.name == "in_place":
            pytest.skip("it modifies what its own gradients need")
        before = fingerprint(zoo.model)
        qat = fxq.prepare_qat(zoo.model, zoo.inputs, recipe=recipe, check=True)
        assert fingerprint(zoo.model) == before
        mine = {n for n, _ in qat.named_parameters() if not n.startswith("observers.") and "fake_quantize" not in n}
        assert mine == {n for n, _ in zoo.model.named_parameters()}
        assert qat.training
        inputs = [x + 0.1 * torch.randn_like(x) for x in zoo.inputs]
        loss = sum(t.square().sum() for t in torch.utils._pytree.tree_leaves(qat(*inputs)))
        loss.backward()
        assert [n for n, p in qat.named_parameters() if p.grad is None] == []
        torch.optim.SGD(qat.parameters(), 1e-4).step()
        with torch.no_grad():
            wanted = torch.utils._pytree.tree_leaves(qat.eval()(*(x.clone() for x in zoo.inputs)))
            pairs = torch.utils._pytree.tree_leaves(as_qdq(qat)(*(x.clone() for x in zoo.inputs)))
            integers = torch.utils._pytree.tree_leaves(fxq.convert(qat)(*(x.clone() for x in zoo.inputs)))
        rounds = any(isinstance(m, TrainedAttention) for m in qat.modules())  # which pairs do not, and integers do
        for a, b, c in zip(wanted, pairs, integers, strict=True):
            assert torch.allclose(a, b, rtol=0.02, atol=0.02 * b.abs().max()) if rounds else torch.equal(a, b)
            noise = (a - c).square().mean() / a.square().mean()
            assert noise < 1e-3  # a step here and there

    def test_dropout_and_batch_norm_follow_the_mode(self):
        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8))
        x = torch.randn(32, 8)
        before = qat.get_buffer("1.running_mean").clone()
        assert not torch.equal(qat(x), qat(x))
        assert not torch.equal(qat.get_buffer("1.running_mean"), before)
        before = qat.get_buffer("1.running_mean").clone()
        assert torch.equal(qat.eval()(x), qat(x))
        assert torch.equal(qat.get_buffer("1.running_mean"), before)

    def test_dropout_as_a_function(self, model_of):
        model = model_of(
            lambda s, x: s.b(F.dropout(F.relu(s.a(x)), 0.5, s.training)), a=nn.Linear(8, 16), b=nn.Linear(16, 3)
        )
        qat = fxq.prepare_qat(model.train(), torch.randn(32, 8))
        x = torch.randn(32, 8)
        assert not torch.equal(qat(x), qat(x))
        assert fxq.report(fxq.convert(qat)).int8_share == 1

    def test_ranges_do_not_see_dropout(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.9), nn.Linear(16, 3))
        qat = fxq.prepare_qat(model, torch.randn(512, 8))
        before = {n: b.clone() for n, b in qat.named_buffers() if n.endswith("high")}
        for _ in range(5):
            qat(torch.randn(512, 8))
        for name, high in before.items():  # dropout scales what it keeps by 10
            assert qat.get_buffer(name) < 2 * high

    def test_a_norm_on_its_own_trains(self):
        model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        qat = fxq.prepare_qat(model, torch.randn(32, 8))
        train(qat, batches(3))
        counts = [qat.get_buffer(f"{i}.num_batches_tracked").item() for i in (0, 2, 3)]
        assert counts == [3, 3, 3]
        fxq.freeze_batch_norm(qat)
        train(qat, batches(2))
        assert [qat.get_buffer(f"{i}.num_batches_tracked").item() for i in (0, 2, 3)] == counts
        x = torch.randn(32, 8)
        with torch.no_grad():
            wanted = qat.eval()(x)
            assert (fxq.convert(qat)(x) - wanted).abs().max() < 0.01 * wanted.abs().max()

    def test_a_part_kept_float_trains(self):
        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8), recipe=Recipe(modules={"0": fxq.FLOAT}))
        losses = train(qat, batches(40))
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
        assert fxq.report(fxq.convert(qat)).int8_share < 1

    def test_errors(self):
        model, x = classifier(), torch.randn(32, 8)
        with pytest.raises(fxq.RecipeError, match="learn_steps=True asks for training"):
            fxq.quantize(model, x, recipe=LEARNED)
        with pytest.raises(fxq.RecipeError, match="reproducible=True is for what calibration decides"):
            fxq.prepare_qat(model, x, recipe=fxq.Recipe(reproducible=True))
        with pytest.raises(fxq.InputError, match=r"fxq\.freeze_observers takes what fxq\.prepare_qat returns"):
            fxq.freeze_observers(model)
        with pytest.raises(fxq.InputError, match="after is -1"):
            fxq.freeze_batch_norm(fxq.prepare_qat(model, x), after=-1)
        with pytest.raises(fxq.InputError, match="already prepared"):
            fxq.prepare_qat(fxq.prepare_qat(model, x), x)


class TestTraining:
    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda p: torch.optim.SGD(p, 0.2, momentum=0.9),
            lambda p: torch.optim.Adam(p, 1e-2),
            lambda p: torch.optim.RMSprop(p, 3e-3),
            lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.05),
        ],
        ids=["sgd", "adam", "rmsprop", "adamw"],
    )
    def test_it_learns(self, recipe, optimizer):
        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8), recipe=recipe)
        losses = train(qat, batches(60), optimizer(qat.parameters()))
        assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
        x = torch.cat([x for x, _ in batches(8, seed=5)])
        with torch.no_grad():
            fake, integers = qat.eval()(x), fxq.convert(qat)(x)
        assert (fake.argmax(1) == integers.argmax(1)).float().mean() > 0.98

    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    def test_a_checkpoint_resumes_where_it_was(self, recipe, tmp_path):
        def begin():
            qat = fxq.prepare_qat(classifier(), torch.ones(4, 8), recipe=recipe)
            fxq.freeze_observers(qat, after=6)
            fxq.freeze_batch_norm(qat, after=7)
            return qat, torch.optim.Adam(qat.parameters(), 1e-2)

        data = batches(10)
        qat, optimizer = begin()
        train(qat, data[:5], optimizer)
        torch.save((qat.state_dict(), optimizer.state_dict(), torch.get_rng_state()), tmp_path / "checkpoint.pt")
        wanted = train(qat, data[5:], optimizer)

        again, optimizer = begin()
        model_state, optimizer_state, random_state = torch.load(tmp_path / "checkpoint.pt")
        again.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(random_state)
        assert train(again, data[5:], optimizer) == wanted
        assert all(
            torch.equal(a, b) for a, b in zip(qat.state_dict().values(), again.state_dict().values(), strict=True)
        )

    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    def test_lbfgs_may_call_it_as_often_as_it_likes(self, recipe):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        qat = fxq.prepare_qat(model, torch.randn(32, 8), recipe=recipe)
        optimizer = torch.optim.LBFGS(qat.parameters(), 0.3, max_iter=10, line_search_fn="strong_wolfe")
        ((x, y),) = batches(1)
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(qat(x), y)
            loss.backward()
            losses.append(loss.item())
            return loss

        for _ in range(4):
            optimizer.step(closure)
        assert losses[-1] < 0.6 * losses[0]
        agrees(qat, x)

    def test_transposed_convolutions(self):
        torch.manual_seed(2)
        front = nn.Linear(8, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2))
        middle = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(6), nn.ReLU()
        qat = fxq.prepare_qat(nn.Sequential(*front, *middle, nn.Flatten(), nn.Linear(96, 3)), torch.randn(32, 8))
        losses = train(qat, batches(30))
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
        assert agrees(qat, torch.randn(64, 8)).report.int8_share == 1

    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    def test_gradients_add_up_over_batches(self, recipe):
        """Four quarters of a batch give the gradients of the whole, once the ranges stand."""
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        qat = fxq.prepare_qat(model, torch.randn(32, 8), recipe=recipe)
        fxq.freeze_observers(qat)
        ((x, y),) = batches(1)
        F.cross_entropy(qat(x), y).backward()
        wanted = [p.grad.clone() for n, p in qat.named_parameters() if "observers" not in n and "fake" not in n]
        qat.zero_grad()
        for part, labels in zip(x.split(8), y.split(8), strict=True):
            (F.cross_entropy(qat(part), labels) / 4).backward()
        found = [p.grad for n, p in qat.named_parameters() if "observers" not in n and "fake" not in n]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True))

    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    def test_autocast(self, recipe):
        """Products in bfloat16, fake quantization in float32; the trained model is that of float32 in eval mode."""
        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8), recipe=recipe)
        optimizer, losses = torch.optim.Adam(qat.parameters(), 1e-2), []
        for x, y in batches(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(qat(x).float(), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
        agrees(qat, torch.randn(64, 8))

    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_model_that_was_converted_says_so(self, dtype, recipe):
        """And is taken back without a loss of what it has learned of ranges."""
        x = torch.randn(32, 8)
        qat = fxq.prepare_qat(classifier(), x, recipe=recipe)
        buffers = {name: buffer.clone() for name, buffer in qat.observers.named_buffers()}
        qat.to(dtype)
        assert all(torch.equal(buffers[name], buffer) for name, buffer in qat.observers.named_buffers())
        for inputs in (x, x.to(dtype)):
            with pytest.raises(
                fxq.InputError, match=rf"^(weight 0.*|the input .*) is {dtype}: .*float\(\).*torch.autocast"
            ):
                qat(inputs)
        qat.float()(x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_inputs_are_for_autocast(self, dtype):
        x = torch.randn(32, 8)
        qat = fxq.prepare_qat(classifier(), x)
        with pytest.raises(fxq.InputError, match=rf"^the input .* is {dtype}: .*float\(\).*torch.autocast"):
            qat(x.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            qat(x.to(dtype))

    # torch's own: of how a graph is resumed after a break, and of how it guards it
    @pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_torch_compile(self):
        """With breaks where a range is read as a number: the same losses as without."""
        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8), recipe=LEARNED)
        twin, losses = copy.deepcopy(qat), []
        torch._dynamo.reset()
        for model, own in ((torch.compile(qat, backend="eager"), qat), (twin, twin)):
            torch.manual_seed(1)
            losses.append(train(model, batches(3), torch.optim.SGD(own.parameters(), 0.1)))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        agrees(qat, torch.randn(64, 8))

    def test_convolutions(self):
        """Batch norms behind convolutions fold while they train; the integers are those of the trained graph."""
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8)),
            *(nn.Conv1d(1, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6), nn.ReLU()),
            *(nn.Conv1d(6, 6, 3, groups=6), nn.BatchNorm1d(6), nn.ReLU6(), nn.Dropout(0.1), nn.Flatten()),
            nn.Linear(36, 3),
        )
        qat = fxq.prepare_qat(model, torch.randn(32, 8), check=True)
        assert sum(isinstance(m, FoldedBatchNorm) for m in qat.modules()) == 2
        assert {n for n, _ in qat.named_parameters()} == {n for n, _ in model.named_parameters()}
        losses = train(qat, batches(40))
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
        x = torch.randn(64, 8)
        qmodel = fxq.convert(qat)
        assert fxq.report(qmodel).int8_share == 1
        with torch.no_grad():
            fake = qat.eval()(x)
            assert torch.equal(as_qdq(qat)(x), fake)
            assert (qmodel(x) - fake).abs().max() < 0.02 * fake.abs().max()

    @pytest.mark.parametrize("recipe", [Recipe(), LEARNED], ids=["ranges", "steps"])
    def test_a_transformer_block(self, recipe):
        """Its linears and its attention train as int8, and become it, to the last linear."""
        torch.manual_seed(2)
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        x = torch.randn(32, 4, 16)
        y = (x.mean(1) @ torch.randn(16, 3)).argmax(1)
        qat = fxq.prepare_qat(nn.Sequential(block, nn.Flatten(), nn.Linear(64, 3)), x, recipe=recipe)
        losses = train(qat, [(x, y)] * 30)
        assert losses[-1] < 0.3 * losses[0]
        assert [n for n, p in qat.named_parameters() if p.grad is None] == []
        qmodel = fxq.convert(qat)
        with torch.no_grad():
            fake = qat.eval()(x)
            assert (qmodel(x) - fake).abs().max() < 0.02 * fake.abs().max()
        forms = {(d.module, d.op, d.form) for d in fxq.report(qmodel).decisions if d.macs}
        linears = ("0.self_attn", "0.linear1", "0.linear2", "2")
        assert forms == {*((name, "linear", "int8") for name in linears), ("0.self_attn", "attention", "int8")}
        assert fxq.report(qmodel).int8_share == 1
        assert np.array_equal(fxq.golden(qmodel)(x.numpy()), qmodel(x).numpy())

    def test_an_attention_by_hand_keeps_its_dropout(self, model_of):
        """On its weights, as in training without quantization; in eval mode there is none."""

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = self.drop(torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1))
            return self.o((weights @ v).transpose(1, 2).flatten(2))

        model = model_of(forward, drop=nn.Dropout(0.5), **{name: nn.Linear(16, 16) for name in "qkvo"})
        x = torch.randn(4, 5, 16)
        qat = fxq.prepare_qat(model, x)
        (attention,) = (m for m in qat.modules() if isinstance(m, TrainedAttention))
        assert (attention.rounds, attention.dropout) == (True, 0.5)
        assert not torch.equal(qat(x), qat(x))
        fake = qat.eval()(x).detach()
        assert (fake - model(x)).abs().max() < 0.1 * fake.abs().max()
        qmodel = fxq.convert(qat)
        assert (qmodel(x) - fake).abs().max() < 0.02 * fake.abs().max()
        assert fxq.report(qmodel).int8_share == 1

    def test_a_deepcopy_trains_alike(self):
        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8))
        train(qat, batches(2))
        twin = copy.deepcopy(qat)
        losses = []
        for model in (qat, twin):
            torch.manual_seed(1)
            losses.append(train(model, batches(3, seed=6)))
        assert losses[0] == losses[1]
        assert {n for n, _ in qat.named_parameters()} == {n for n, _ in twin.named_parameters()}

    def test_schedules_count_forwards(self, model_of):
        """A quantizer that two values share is called twice a forward."""
        model = model_of(
            lambda s, x: s.c(torch.cat([F.relu(s.a(x)), F.relu(s.b(x))], 1)),
            a=nn.Linear(8, 4), b=nn.Linear(8, 4), c=nn.Linear(8, 3),
        )  # fmt: skip
        qat = fxq.prepare_qat(model, torch.randn(32, 8))
        fxq.freeze_observers(qat, after=2)
        ranges = []
        for _ in range(4):
            qat(torch.randn(32, 8))
            ranges.append([b.item() for n, b in qat.named_buffers() if n.endswith(".high")])
        assert all(a != b for a, b in zip(ranges[0], ranges[1], strict=True))
        assert ranges[1] == ranges[2] == ranges[3]
        assert max(m.calls for m in qat.modules() if isinstance(m, FakeQuantize)) > 1

    def test_distributed_data_parallel(self, tmp_path):
        alone = fxq.prepare_qat(classifier(), torch.randn(32, 8))
        together = copy.deepcopy(alone)
        torch.manual_seed(1)
        wanted = train(alone, batches(4))
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(together)
            torch.manual_seed(1)
            assert train(parallel, batches(4)) == wanted
            fxq.freeze_observers(parallel)
            with pytest.raises(fxq.InputError, match=r"convert takes what fxq\.prepare returns"):
                fxq.convert(parallel)
            x = torch.randn(32, 8)
            assert torch.equal(fxq.convert(parallel.module)(x), fxq.convert(alone)(x))
        finally:
            dist.destroy_process_group()

    def test_better_ranges_before_training(self):
        """`calibrate` sets ranges in eval mode, and leaves the mode and the statistics of the norms."""
        qat = fxq.prepare_qat(classifier(), torch.zeros(4, 8) + 0.01, recipe=LEARNED)
        mean, step = qat.get_buffer("1.running_mean").clone(), qat.get_parameter("observers.input_1_0.log_scale").item()
        fxq.calibrate(qat, [x for x, _ in batches(4)])
        assert qat.training
        assert torch.equal(qat.get_buffer("1.running_mean"), mean)
        assert qat.get_parameter("observers.input_1_0.log_scale").item() > step


class TestConvert:
    def test_the_trained_model_goes_everywhere(self, tmp_path):
        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8), dump=tmp_path / "dump")
        train(qat, batches(10))
        qmodel = fxq.convert(qat)
        x = torch.randn(16, 8)
        y = qmodel(x)
        assert not y.requires_grad
        assert np.array_equal(fxq.golden(qmodel)(x.numpy()), y.numpy())
        fxq.save(qmodel, tmp_path / "model.fxq")
        assert torch.equal(fxq.load(tmp_path / "model.fxq")(x), y)
        assert "in the epilogue of linear" in str(fxq.report(qmodel))
        assert not any("observer" in name or "dropout" in name for name, _ in qmodel.named_buffers())
        names = {path.name.partition("-")[2] for path in (tmp_path / "dump").glob("*.txt")}
        assert {"keep-dropout.txt", "make-trainable.txt", "end-training.txt"} <= names

    @pytest.mark.parametrize("keyword", [True, False])
    def test_gradients_asked_of_the_integers(self, keyword):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16)).eval()
        qmodel, x = fxq.quantize(model, torch.randn(32, 8)), torch.randn(4, 8)
        assert not any(p.requires_grad for p in qmodel.parameters())
        assert not qmodel(x).requires_grad
        wanted = qmodel(x)
        x.requires_grad_()
        y = qmodel(input=x) if keyword else qmodel(x)
        assert torch.equal(y, wanted)  # a float part before it may be training
        refusal = r"\(%\w+\): input 'input' of an integer model has no gradients; train with fxq\.prepare_qat"
        with pytest.raises(fxq.InputError, match=refusal):
            y.sum().backward()
        with torch.no_grad():
            assert not qmodel(x).requires_grad

    def test_compare_takes_the_trained_weights(self):
        model = classifier().eval()
        qat = fxq.prepare_qat(model, torch.randn(32, 8))
        qmodel = fxq.convert(qat)
        assert fxq.compare(model, qmodel, torch.randn(32, 8)).output > 20

    def test_passes_run_once(self):
        from passes import PREPARE_QAT, end_training

        qat = fxq.prepare_qat(classifier(), torch.randn(32, 8)).eval()
        ctx = qat.meta["fxq"]
        assert PREPARE_QAT[-1].run(qat, ctx) == 0
        assert end_training.PASS.run(qat, ctx) == 2  # a folded norm and a dropout
        assert end_training.PASS.run(qat, ctx) == 0


def test_a_training_that_has_diverged():
    qat = fxq.prepare_qat(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(6, 8))
    with torch.no_grad():
        qat.get_parameter("2.weight")[0, 0] = torch.nan
    with pytest.raises(fxq.CalibrationError, match=r"parameter 2\.weight holds NaN or infinity: the training has div"):
        fxq.convert(qat)
