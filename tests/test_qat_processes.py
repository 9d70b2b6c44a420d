"""Training in two processes, with a checkpoint in the middle. This file is also what each of them runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxq

RECIPES = {"ranges": fxq.Recipe(), "steps": fxq.Recipe(learn_steps=True)}


def model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def data(rank):
    """Eight batches; each process has its own."""
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 3, generator=draw)
    draw.manual_seed(rank + 1)
    xs = [torch.randn(16, 8, generator=draw) for _ in range(8)]
    return [(x, (x @ teacher).argmax(1)) for x in xs]


def train(parallel, optimizer, batches, seed):
    torch.manual_seed(seed)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()


def begin(recipe):
    qat = fxq.prepare_qat(model(), torch.ones(4, 8), recipe=recipe)
    fxq.freeze_observers(qat, after=6)
    return qat, torch.optim.Adam(qat.parameters(), 1e-2)


def work(rank, folder):
    """What one process does, with both recipes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for name, recipe in RECIPES.items():
        (folder / name).mkdir(exist_ok=True)
        work_on(recipe, rank, folder / name)
    dist.destroy_process_group()


def work_on(recipe, rank, folder):
    """Train, save in the middle, go on; then begin anew from what was saved."""
    batches = data(rank)
    qat, optimizer = begin(recipe)
    parallel = nn.parallel.DistributedDataParallel(qat)
    train(parallel, optimizer, batches[:4], 10 + rank)
    if rank == 0:
        torch.save((qat.state_dict(), optimizer.state_dict()), folder / "checkpoint.pt")
    dist.barrier()
    train(parallel, optimizer, batches[4:], 20 + rank)

    resumed, optimizer = begin(recipe)
    state, optimizer_state = torch.load(folder / "checkpoint.pt")
    resumed.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    train(nn.parallel.DistributedDataParallel(resumed), optimizer, batches[4:], 20 + rank)
    x = torch.cat([x for x, _ in data(0)])
    outputs = fxq.convert(qat)(x)
    torch.save((qat.state_dict(), resumed.state_dict(), dict(qat.named_parameters()), outputs), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they trained."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_one_model(name, folder):
    (first, again, parameters, outputs), (_, _, others, _) = (
        torch.load(folder / name / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    initial = dict(fxq.prepare_qat(model(), torch.ones(4, 8)).named_parameters())
    assert not any(torch.equal(parameters[name], initial[name]) for name in initial if name.endswith("weight"))
    assert all(torch.equal(first[name], again[name]) for name in first)

    here, _ = begin(RECIPES[name])  # what rank 0 trained goes on in one process
    here.load_state_dict(first)
    x = torch.cat([x for x, _ in data(0)])
    assert torch.equal(fxq.convert(here)(x), outputs)
    with torch.no_grad():
        assert (here.eval()(x).argmax(1) == outputs.argmax(1)).float().mean() > 0.97


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(int(sys.argv[2]), Path(sys.argv[1]))
