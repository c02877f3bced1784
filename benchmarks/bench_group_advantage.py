"""group_advantage against verl's, TRL's and OpenRLHF's ways and a torch version by hand, 1k to 1M rollouts.

    python benchmarks/bench_group_advantage.py            a Markdown table on the CPU, and on a GPU if there is one
    pytest benchmarks/bench_group_advantage.py -k cuda    the same figures through pytest-benchmark

Work: N float32 rewards in groups of 8, mean and standard deviation of each group, ddof 1. Rivals are interleaved round
by round, the median is reported. Bytes: 4 + 8 a row are read, 4 + 1 written; GB/s count these.

verl: its own ``compute_grpo_outcome_advantage`` and the vectorized version (which needs small labels). TRL has no
function: the lines of ``GRPOTrainer._generate_and_score_completions`` around its own ``nanstd``. OpenRLHF: its formula.
The last two need groups of one size in their order, so they take part for ascending labels only. Where verl is not
installed its loop is stood in for by one of the same kind: a dictionary of lists, then one small tensor a group.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from hiexp import group_advantage

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
import verl_functions

GROUP = 8
ROWS = (1_000, 8_192, 65_536, 1_000_000)
ORDERS = ("ascending", "scattered")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SECONDS = 4.0  # a rival stops after this long, with one round at least: the loops take half a minute for 1M rows


def hiexp_op(rewards, labels):
    return group_advantage(rewards, labels).advantages


def hiexp_without_check(rewards, labels):
    """No wait for the device: a NaN would become advantage 0."""
    return group_advantage(rewards, labels, nan="zero").advantages


def torch_by_hand(rewards, labels):
    _, dense, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    totals = torch.zeros(len(counts), dtype=torch.float64, device=rewards.device)
    mean = totals.index_add(0, dense, rewards.double()) / counts
    centred = rewards - mean[dense]
    variance = totals.index_add(0, dense, centred.square()) / (counts - 1)
    return (centred / (variance.sqrt()[dense] + 1e-6)).to(rewards.dtype)


def python_loop(rewards, labels):
    scores, index = rewards.clone(), labels.tolist()
    by_group, mean, std = defaultdict(list), {}, {}
    for i in range(len(index)):
        by_group[index[i]].append(scores[i])
    for group, members in by_group.items():
        stacked = torch.stack(members)
        mean[group], std[group] = torch.mean(stacked), torch.std(stacked)
    for i in range(len(index)):
        scores[i] = (scores[i] - mean[index[i]]) / (std[index[i]] + 1e-6)
    return scores


def openrlhf(rewards, labels):
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-9)).flatten()


def _verl(function):
    def run(rewards, labels):
        mask = torch.ones(len(rewards), 1, device=rewards.device)
        return function(rewards[:, None].clone(), mask, labels)[0][:, 0]

    return run


def _trl(nanstd):
    def run(rewards, labels):
        mean = torch.nanmean(rewards.view(-1, GROUP), dim=1).repeat_interleave(GROUP, dim=0)
        std = nanstd(rewards.view(-1, GROUP), dim=1).repeat_interleave(GROUP, dim=0)
        return torch.nan_to_num((rewards - mean) / (std + 1e-4), nan=0.0)

    return run


def providers(order):
    """Name -> function(rewards, labels), those that are installed and can take labels in that order."""
    found = {"hiexp": hiexp_op, "hiexp, nan='zero'": hiexp_without_check, "torch by hand": torch_by_hand}
    verl = verl_functions.load()
    if verl is None:
        found["Python loop"] = python_loop
    else:
        found["verl loop"] = _verl(verl.compute_grpo_outcome_advantage)
        found["verl vectorized"] = _verl(verl.compute_grpo_vectorized_outcome_advantage)
    if order == "ascending":
        found["OpenRLHF formula"] = openrlhf
        if importlib.util.find_spec("trl") is not None:
            found["TRL"] = _trl(importlib.import_module("trl.trainer.utils").nanstd)
    return found


def make(rows, order, device):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) // GROUP
    if order == "scattered":
        labels = labels[torch.randperm(rows, generator=generator)]
    return torch.rand(rows, generator=generator).to(device), labels.to(device)


def interleaved(rows, order, device, rounds):
    """{provider: median milliseconds}; every provider's result is checked against the first."""
    rewards, labels = make(rows, order, device)
    index = labels.cpu().numpy()  # verl takes numpy labels
    runs = {
        name: (lambda f=function, name=name: f(rewards, index if name.startswith("verl") else labels))
        for name, function in providers(order).items()
    }
    expected, taken = runs["hiexp"](), {name: [] for name in runs}
    for name, run in runs.items():
        begin = time.perf_counter()
        torch.testing.assert_close(run().cpu(), expected.cpu(), rtol=1e-2, atol=1e-2, msg=name)
        taken[name] = [] if time.perf_counter() - begin < SECONDS else [measure.seconds(run, device)]
    for _ in range(rounds):
        for name, run in runs.items():
            if sum(taken[name]) < SECONDS:
                taken[name].append(measure.seconds(run, device))
    return {name: 1000 * statistics.median(times) for name, times in taken.items()}


def versions():
    found = {"torch": torch.__version__, "numpy": np.__version__}
    for package in ("hiexp", "verl", "trl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", ROWS, ids="n{}".format)
def test_group_advantage(benchmark, shape, order, device):
    rewards, labels = make(shape, order, device)
    benchmark.pedantic(
        lambda: measure.seconds(lambda: hiexp_op(rewards, labels), device), rounds=20, warmup_rounds=2, iterations=1
    )
    for name, milliseconds in interleaved(shape, order, device, rounds=15).items():
        benchmark.extra_info[f"{name} ms"] = milliseconds
    benchmark.extra_info["GB/s"] = 17 * shape / benchmark.stats.stats.median / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rollouts, multiples of 8")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", choices=DEVICES, nargs="+", default=DEVICES)
    arguments = parser.parse_args()
    print(f"{versions()}; {torch.get_num_threads()} threads; median ms of up to {arguments.rounds} rounds\n")
    for device in arguments.device:
        for order in ORDERS:
            names = list(providers(order))
            print(f"| {device}, {order} | " + " | ".join(names) + " |\n|" + " ---: |" * (len(names) + 1))
            for rows in arguments.rows:
                result = interleaved(rows, order, device, arguments.rounds)
                cells = [f"{result[name]:.3g} ({result[name] / result['hiexp']:.3g}x)" for name in names]
                print(f"| {rows} | " + " | ".join(cells) + " |", flush=True)
            print()


if __name__ == "__main__":
    main()
