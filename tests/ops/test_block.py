"""qblock: the bits of its steps one by one, on every instruction set; what is damaged is refused."""

import warnings

import pytest
import torch

from fxq import kernels, numerics
from fxq.ops import block
from fxq.ops.block import Constant, Step, Value, Written, qblock

CONSTANTS = 2
"""Words of a program before its constants."""


def sizes(program):
    """The word of a program that tells the bytes of a slice's memory; that of a thread's and the steps follow."""
    return CONSTANTS + 3 * int(program[CONSTANTS - 1]) + 2


def packed(n, k):
    return torch.from_numpy(numerics.pack(torch.randint(-127, 128, (n, k), dtype=torch.int8).numpy()))


def linear(n, k):
    return packed(n, k), torch.randint(-900, 900, (n,), dtype=torch.int32), torch.rand(n) * 2e-3


def dynamic(n, k):
    """packed weight, its column sums, its scales."""
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return torch.from_numpy(numerics.pack(w.numpy())), w.sum(1, dtype=torch.int32), torch.rand(n) * 2e-3


def layer(width=24, wide=40, masked=True):
    """Every step that there is: two layers' worth, values read late and not at all, results from the middle."""
    constants = []

    def held(*tensors):
        constants.extend(tensors)
        return [Constant(i) for i in range(len(constants) - len(tensors), len(constants))]

    parts = list(zip(*(held(*linear(width, width)) for _ in range(3)), strict=True))
    factor, weight, bias = held(torch.rand(width), torch.rand(width), torch.randn(width))
    u8, f32 = Written(width, False), Written(width, True)
    mask = Value(2) if masked else None
    first = 3 if masked else 2
    v = [Value(first + i) for i in range(20)]
    steps = [
        Step("qlinears", (Value(0), *map(list, parts), [120, 130, 140], [0, 0, 0], [255, 250, 255]), (u8, u8, u8)),
        Step("part", (v[0], 0)),
        Step("part", (v[0], 1)),
        Step("part", (v[0], 2)),
        Step("qattention", (v[1], v[2], v[3], mask, False, None, 120, 140, 4e-4, 0.9, 127, 127, 4), (u8,)),
        Step("qlinear_float", (v[4], *held(*linear(width, width)), Value(1)), (f32,)),
        Step(
            "norm_and_quantize",
            (v[5], "layer_norm", weight, bias, 1e-12, 0.02, 119, factor),
            (Written(width, True, 1), u8),
        ),
        Step("part", (v[6], 0)),
        Step("part", (v[6], 1)),
        Step(
            "qlinear_act_quantize", (v[8], *held(*linear(wide, width)), "gelu", 0.02, 14, None), (Written(wide, False),)
        ),
        Step("qlinear_float", (v[9], *held(*linear(width, wide)), v[7]), (f32,)),
        Step("norm_quantize", (v[10], "rms_norm", weight, None, 1e-6, 0.03, 120, None), (u8,)),
        Step(
            "qfeed_forward",
            (v[11], *held(*linear(wide, width)), "silu", *held(*dynamic(width, wide)), Constant(10), v[10]),
            (f32,),
        ),
        Step("norm", (v[12], "layer_norm", None, None, 1e-5), (f32,)),
        Step("qlinear", (v[11], *held(*linear(wide, width)), 3, 3, 255), (Written(wide, False, 0),)),
        Step("qlinear_act", (v[11], *held(*linear(width, width)), "tanh", v[13]), (Written(width, True, 2),)),
    ]
    return steps, constants, [wide, -width, -width]


def two_layers(width=24):
    """Two attentions; the wider second reads what is written in the run in which the first's result is read last."""
    constants = []

    def held(*tensors):
        constants.extend(tensors)
        return [Constant(i) for i in range(len(constants) - len(tensors), len(constants))]

    v = [Value(2 + i) for i in range(14)]
    steps = []
    for x, wide in ((Value(0), width), (v[5], 4 * width)):
        u8, parts = Written(wide, False), list(zip(*(held(*linear(wide, width)) for _ in range(3)), strict=True))
        first = len(steps)
        steps += [
            Step("qlinears", (x, *map(list, parts), [120, 130, 140], [0, 0, 0], [255, 255, 255]), (u8, u8, u8)),
            *(Step("part", (v[first], i)) for i in range(3)),
            Step("qattention", (*v[first + 1 : first + 4], None, False, None, 120, 140, 4e-4, 0.9, 127, 127, 4), (u8,)),
            Step("qlinear", (v[first + 4], *held(*linear(width, wide)), 120, 0, 255), (Written(width, False),)),
        ]
    shown = Step("qlinear", (v[11], *held(*linear(width, width)), 120, 0, 255), (Written(width, False, 0),))
    return [*steps, shown], constants, [width]


def call(steps, constants, widths, batch, tokens, masked=True, width=24):
    x = torch.randint(0, 256, (batch, tokens, width), dtype=torch.uint8)
    mask = [torch.rand(batch, 1, 1, tokens) > 0.3] if masked else []
    held, places = block.gather(constants)
    return [x, torch.randn(batch, tokens, width), *mask], block.encode(steps, 2, len(mask), places), held, widths


@pytest.mark.parametrize(
    ("batch", "tokens", "masked"), [(1, 1, True), (3, 17, True), (2, 70, False), (0, 4, True), (2, 0, True)]
)
def test_same_bits_as_step_by_step(on_isa, batch, tokens, masked):
    args = call(*layer(masked=masked), batch, tokens, masked)
    found, wanted = on_isa(qblock, *args), kernels.portable("qblock")(*args)
    for got, expected, width in zip(found, wanted, args[3], strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, (batch, tokens, abs(width)))
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("batch", "tokens"), [(56, 80), (3, 1600)])
def test_large_batches_go_through_in_slices(batch, tokens):
    """Masks, inputs and results are those of the whole batch."""
    args = call(*layer(240, 960), batch, tokens, width=240)
    assert batch * tokens * args[1][sizes(args[1]) :][:2].sum().item() > 2 * (8 << 20), "three slices"
    for got, wanted in zip(qblock(*args), kernels.portable("qblock")(*args), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 40), (2, 16), (3, 17), (2, 70), (7, 64)])
def test_threads_share_rows_or_channels(batch, tokens, threads):
    """Rows where there are enough; a few go through step by step. Also with more threads than there are processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for args in (
            call(*layer(240, 960), batch, tokens, width=240),
            call(*two_layers(240), batch, tokens, masked=False, width=240),
        ):
            for got, wanted in zip(qblock(*args), kernels.portable("qblock")(*args), strict=True):
                assert torch.equal(got, wanted)
    finally:
        torch.set_num_threads(before)


def test_operands_in_any_memory(on_isa):
    inputs, *rest = call(*layer(), 3, 17)
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for got, wanted in zip(on_isa(qblock, strided, *rest), on_isa(qblock, inputs, *rest), strict=True):
        assert torch.equal(got, wanted)


def test_programs_are_read_as_they_were_written():
    steps, constants, _ = layer()
    _, places = block.gather(constants)
    read = block.decode(block.encode(steps, 2, 1, places))
    assert [(step.op, step.args) for step in read.steps] == [(step.op, step.args) for step in steps]
    assert (read.inputs, read.constants, read.results) == (2, tuple(places), ((14, 0), (6, 0), (15, 0)))


def test_constants_become_views_of_one_tensor():
    """Each at a cache line, one of two names once, zeros between them."""
    tensors = [torch.arange(5, dtype=torch.int32), torch.rand(17), torch.ones(64, dtype=torch.int8), torch.rand(1)]
    wanted = [tensor.clone() for tensor in tensors]
    held, places = block.gather([*tensors, tensors[1]])
    assert [place.begin for place in places] == [0, 64, 192, 256, 64]
    assert held.data_ptr() % 64 == 0 and held.numel() == 260
    for tensor, value, place in zip(tensors, wanted, places[:-1], strict=True):
        assert torch.equal(tensor, value) and torch.equal(place.of(held), value)
        assert tensor.data_ptr() == held.data_ptr() + place.begin
    assert not held[20:64].any() and not held[64 + 4 * 17 : 192].any()
    nothing, none = block.gather([])
    assert (nothing.numel(), none) == (0, [])


def test_memory_is_used_again():
    """Ten layers need no more of it than two: what nobody reads any more makes room."""

    def bytes_per_row(layers):
        steps = [Step("norm", (Value(i), "layer_norm", None, None, 1e-5), (Written(32, True),)) for i in range(layers)]
        program = block.encode(steps, 1, 0, [])
        return program[sizes(program) :][:2].sum().item()

    assert bytes_per_row(10) == bytes_per_row(2) == 2 * 32 * 4


def places(steps, inputs):
    """For each thing that a step writes: (its step, in the slice's memory, begin, end), or None for a result."""
    program = block.encode(steps, inputs, 0, [])
    read, words, at, found = block.decode(program), program.tolist(), sizes(program) + 2, {}
    slice_bytes = words[at - 2]
    for i, step in enumerate(read.steps):
        at += 1 + sum(2 + 2 * len(a) if isinstance(a, list) else 2 for a in step.args)
        for part, written in enumerate(steps[i].writes):
            place = words[at + part]
            shared = place < slice_bytes
            begin = place if shared else place - slice_bytes
            length = written.width * (4 if written.is_float else 1)
            found[i, part] = None if place < 0 else (shared, begin, begin + length)
        at += len(steps[i].writes)
    assert at == len(words)
    return found


@pytest.mark.parametrize(
    ("make", "numbers"),
    [(lambda: layer(masked=False), [0, 0, 0, 0, 1, *[2] * 11]), (two_layers, [*[0] * 4, 1, *[2] * 5, 3, 4, 4])],
)
def test_memory_of_a_slice_is_kept_for_a_run_and_that_of_a_thread_for_a_step(make, numbers):
    steps, _, _ = make()
    found, runs, readers = places(steps, 2), block._runs(steps), block._readers(steps, 2)
    assert runs == numbers
    lives = {}
    for (i, part), home in found.items():
        last = max(readers.get((i, part), [i]))
        if home:
            assert home[0] == any(runs[reader] != runs[i] for reader in readers.get((i, part), []))
            lives[i, part] = (*home, *((runs[i], runs[last]) if home[0] else (i, last)))
    assert {shared for shared, *_ in lives.values()} == {False, True}
    for one, (shared, begin, end, born, dies) in lives.items():
        for other, (also, other_begin, other_end, other_born, other_dies) in lives.items():
            apart = end <= other_begin or other_end <= begin or dies < other_born or other_dies < born
            assert one == other or shared != also or apart, (one, other)


def test_what_is_damaged_is_refused(on_isa):
    """Any word of the program changed: an error, or other numbers, and never memory that is not the block's."""
    inputs, program, constants, widths = call(*layer(), 1, 4)
    for i in range(len(program)):
        for value in (-9, 1 << 40, (1 << 63) - 64, (1 << 63) - 1):
            broken = program.clone()
            broken[i] = value
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # NumPy's, about numbers out of range
                    on_isa(qblock, inputs, broken, constants, widths)
            except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError):
                continue
            assert i >= 2, "the head"
    for length in range(0, len(program), 7):
        with pytest.raises((RuntimeError, ValueError)):
            on_isa(qblock, inputs, program[:length].clone(), constants, widths)


@pytest.mark.parametrize(("step", "part", "told"), [("qlinears", 1, "reads"), ("qattention", 0, "writes")])
def test_an_attention_keeps_to_what_all_threads_see(step, part, told):
    """Its rows come from other threads and go to others; the portable op knows no places."""
    inputs, program, constants, widths = call(*layer(), 2, 4)
    words, at = program.tolist(), sizes(program) + 2
    slice_bytes = words[at - 2]
    for read in block.decode(program).steps:
        at += 1 + sum(2 + 2 * len(a) if isinstance(a, list) else 2 for a in read.args)
        if read.op == step:
            break
        at += {"part": 0, "qlinears": 3, "norm_and_quantize": 2}.get(read.op, 1)
    assert 0 <= words[at + part] < slice_bytes
    words[at + part] = slice_bytes
    if kernels.info().isa != "portable":
        with pytest.raises(RuntimeError, match=f"an attention {told} what is a thread's own"):
            qblock(inputs, torch.tensor(words), constants, widths)


def test_operands_that_do_not_fit_are_refused(on_isa):
    inputs, program, constants, widths = call(*layer(), 2, 4)
    for wrong in ([inputs[0][:, :3], *inputs[1:]], [x[0] for x in inputs], [inputs[1], *inputs[1:]], []):
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            on_isa(qblock, wrong, program, constants, widths)
    with pytest.raises((RuntimeError, ValueError)):
        on_isa(qblock, inputs, program, constants, [-40, *widths[1:]])


@pytest.mark.parametrize("way", ["cut off", "of another dtype", "not contiguous", "between two numbers"])
def test_constants_that_cannot_be_read_are_refused(on_isa, way):
    inputs, program, constants, widths = call(*layer(), 2, 4)
    shifted = torch.cat([constants[:1], constants])[1:]
    damaged = {
        "cut off": constants[:-1],
        "of another dtype": constants.view(torch.int8),
        "not contiguous": torch.stack([constants, constants], -1)[..., 0],
        "between two numbers": shifted,
    }
    with pytest.raises((RuntimeError, ValueError)):
        on_isa(qblock, inputs, program, damaged[way], widths)


def test_places_are_held_to_their_constants(on_isa):
    """One element more, fewer, of another dtype, from between two lines, before or behind all: never read."""
    inputs, program, constants, widths = call(*layer(), 1, 4)
    for at in range(CONSTANTS, sizes(program) - 2, 3):
        begin, dtype, count = program[at : at + 3].tolist()
        for place in (
            *((begin, dtype, other) for other in (count + 1, count - 1, -1, 1 << 62)),
            *((begin, other, count) for other in (*({0, 1, 2} - {dtype}), -1, 3)),
            *((other, dtype, count) for other in (begin + 4, -64, len(constants) // 64 * 64 + 64, 1 << 62)),
        ):
            broken = program.clone()
            broken[at : at + 3] = torch.tensor(place)
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                on_isa(qblock, inputs, broken, constants, widths)


def test_opcheck():
    torch.library.opcheck(qblock, call(*layer(), 2, 5))
