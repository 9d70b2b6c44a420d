"""The same inputs and seed give the same model, byte for byte: in another process, with another number of threads, and
where it is asked for on another processor."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxq
from fxq.simulation import Simulation, calibrated_products

PROGRAM = """
import hashlib, sys, torch, fxq

torch.set_num_threads(int(sys.argv[1]))
for model, data in torch.load(sys.argv[2], weights_only=False):
    qmodel = fxq.quantize(model, data[0], calibration_data=data, recipe=eval(sys.argv[3]), progress=False)
    digest = hashlib.sha256(qmodel.code.encode())
    for name, tensor in qmodel.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest(), qmodel.report.int8_share)
"""


def encoder():
    return nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True, activation="gelu")


def network():
    first = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.SiLU()
    last = nn.Conv2d(32, 32, 3, groups=32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 9)
    return nn.Sequential(*first, *last)


def perceptron():
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128), nn.Tanh(), nn.Linear(128, 10))


MODELS = (encoder, (8, 48, 128)), (network, (8, 3, 32, 32)), (perceptron, (512, 256))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file of the models with calibration data: what random numbers are depends on the processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("made") / "models.pt"
    torch.save([(make().eval(), [torch.randn(*shape) for _ in range(3)]) for make, shape in MODELS], path)
    return str(path)


def outcomes(made, recipe, runs):
    """What processes, all at once, make of the models; runs: the threads of each, and its environment beside ours."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(threads), made, recipe],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads, environment in runs
    ]
    lines = [process.communicate()[0].splitlines() for process in started]
    assert not any(process.returncode for process in started)
    assert all(float(line.split()[-1]) > 0.9 for line in lines[0])
    assert len(lines[0]) == len(MODELS)
    return lines


def test_processes_and_threads(made):
    """Hashes of strings, and with them the order of sets, differ as well."""
    runs = [(1, {"PYTHONHASHSEED": "1"}), (2, {"PYTHONHASHSEED": "2"})]
    first, second = outcomes(made, "fxq.Recipe(judge_costs=False)", runs)
    assert first == second


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


def test_processors(made):
    """What torch and its libraries are told to take the processor for."""
    first, *others = outcomes(made, "fxq.Recipe(reproducible=True)", [(1, {}), (2, AVX2), (1, OLDEST)])
    assert others == [first, first]


def test_what_decides_constants_runs_on_one_thread(staged):
    gm, ctx = staged(nn.Linear(16, 8), torch.randn(64, 16), "fit-products")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    simulation, products = Simulation(gm, ctx), set(calibrated_products(gm, ctx.recipe))
    assert [torch.get_num_threads() for _ in simulation.stops(products, "")] == [1]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a32", fxq.Recipe(requant="fixed", observer="percentile")])
def test_other_recipes(recipe):
    def state():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
        data = [torch.randn(64, 16) for _ in range(2)]
        return fxq.quantize(model, data[0], calibration_data=data, recipe=recipe, progress=False).state_dict()

    first, second = state(), state()
    assert list(first) == list(second)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
