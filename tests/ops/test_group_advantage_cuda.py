"""group_advantage on a GPU: the CPU's bits on every path, one launch, no hidden synchronisation, streams, devices."""

from __future__ import annotations

import pytest
import torch

from hiexp import group_advantage

pytestmark = pytest.mark.gpu

LABELS = {
    "ascending": lambda rows, generator: torch.arange(rows) // 8,
    "contiguous": lambda rows, generator: -(torch.arange(rows) // 8),
    "scattered": lambda rows, generator: torch.randint(-50, 900, (rows,), generator=generator) * 2**40,
    "one group": lambda rows, generator: torch.zeros(rows, dtype=torch.int64),
    "singletons": lambda rows, generator: torch.randperm(rows, generator=generator),
}


def make_batch(rows, labels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(rows, generator=generator, dtype=dtype) + 1e3
    rewards[::97] = float("nan")
    return rewards, LABELS[labels](rows, generator)


def assert_same_bits(on_gpu, on_cpu):
    assert on_gpu.advantages.is_cuda
    for name in ("advantages", "mean", "std", "counts", "groups", "zero_variance", "non_finite_row"):
        assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name)), name


@pytest.mark.parametrize("rows", [1, 31, 5000, 300_001])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_the_cpu(rows, labels, dtype):
    rewards, ids = make_batch(rows, labels, dtype)
    for options in ({}, {"preset": "rloo"}, {"scale": "batch"}, {"singleton": "raw", "ddof": 0}):
        on_cpu = group_advantage(rewards, ids, nan="zero", **options)
        on_gpu = group_advantage(rewards.cuda(), ids.cuda(), nan="zero", **options)
        assert_same_bits(on_gpu, on_cpu)
        again = group_advantage(rewards.cuda(), ids.cuda(), nan="zero", **options)
        assert torch.equal(again.advantages, on_gpu.advantages)


@pytest.mark.parametrize("labels", ["ascending", "scattered"])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.bfloat16])
def test_tokens(labels, mask_type):
    rewards, ids = make_batch(700, labels)
    mask = torch.randint(0, 2, (700, 37)).to(mask_type)
    lengths = torch.randint(0, 50, (700,))
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed_mask = torch.randint(0, 2, (int(offsets[-1]),)).to(mask_type)
    for tokens in ({"token_mask": mask}, {"cu_seqlens": offsets}, {"cu_seqlens": offsets, "token_mask": packed_mask}):
        on_cpu = group_advantage(rewards, ids, nan="zero", **tokens)
        moved = {name: value.cuda() for name, value in tokens.items()}
        on_gpu = group_advantage(rewards.cuda(), ids.cuda(), nan="zero", **moved)
        assert torch.equal(on_gpu.token_advantages.cpu(), on_cpu.token_advantages)


def test_wrong_offsets_are_named():
    rewards = torch.tensor([1.0, 0.0], device="cuda")
    mask = torch.ones(4, device="cuda", dtype=torch.bool)
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\]: expected an offset >= 9, got 4"):
        group_advantage(rewards, [0, 0], cu_seqlens=torch.tensor([0, 9, 4]), token_mask=mask)
    with pytest.raises(ValueError, match=r"rewards\[1\]"):
        group_advantage(torch.tensor([1.0, float("inf")], device="cuda"), [0, 0])
    assert group_advantage(torch.empty(0, device="cuda"), []).advantages.shape == (0,)


def _device_events(run):
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("scale", ["std", "batch"])
def test_one_launch_and_no_synchronisation(labels, scale):
    rewards, ids = (tensor.cuda() for tensor in make_batch(4096, labels))
    mask = torch.ones(4096, 5, device="cuda", dtype=torch.bool)

    def run():
        return group_advantage(rewards, ids, nan="zero", scale=scale, token_mask=mask)

    events = _device_events(run)
    assert len(events) == 1, events
    assert "group_advantage" in events[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_caller_stream_and_cuda_graph():
    rewards, ids = (tensor.cuda() for tensor in make_batch(2000, "scattered"))
    expected = group_advantage(rewards, ids, nan="zero").advantages
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = torch.full_like(rewards, 7.0)
        torch.cuda._sleep(10_000_000)  # on another stream the op would read `later` before the copy
        later.copy_(rewards)
        actual = group_advantage(later, ids, nan="zero").advantages
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(actual, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_advantage(later, ids, nan="zero").advantages
    later.mul_(2)
    graph.replay()
    assert torch.equal(captured, group_advantage(rewards * 2, ids, nan="zero").advantages)


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rewards, ids = make_batch(500, "scattered")
    on_gpu = group_advantage(rewards.to("cuda:1"), ids.to("cuda:1"), nan="zero")
    assert on_gpu.advantages.device.index == 1
    assert torch.cuda.current_device() == 0
    assert_same_bits(on_gpu, group_advantage(rewards, ids, nan="zero"))


def test_views_at_odd_addresses():
    rewards, ids = (tensor.cuda() for tensor in make_batch(1001, "scattered"))
    expected = group_advantage(rewards[1:].clone(), ids[1:].clone(), nan="zero").advantages
    assert torch.equal(group_advantage(rewards[1:], ids[1:], nan="zero").advantages, expected)
    bytes_ = torch.zeros(1001, dtype=torch.uint8, device="cuda")[1:]
    assert group_advantage(rewards[1:], bytes_, nan="zero").counts.shape == (1,)
