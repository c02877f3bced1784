"""The whole study, seed by seed, and its tables and pictures from whatever is finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hiexp.evidence.config import ARMS, EvidenceConfig, check_arms
from hiexp.evidence.page import write_results
from hiexp.evidence.study import Study
from hiexp.quickstart.stages import Say
from hiexp.rl.model import quiet_transformers
from hiexp.rl.run_directory import claim, directory_lock


def evidence(
    config: EvidenceConfig, out: str | Path, seeds: Sequence[int], arms: Sequence[str] = tuple(ARMS), say: Say = print
) -> Path:
    """Run, or continue, the study in ``out``; returns the path of its results page.

    Raises:
        ValueError: unknown arms, seeds that repeat, ``out`` holds a study with other settings (they are named), or
            another process works in it.
    """
    out, names = Path(out), check_arms(list(arms))
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds: expected different numbers from 0, got {list(seeds)}")
    with directory_lock(out):
        quiet_transformers()
        if config.train.run.threads is not None:
            torch.set_num_threads(config.train.run.threads)
        claim(out / "evidence.yaml", config, "a study")
        for seed in seeds:
            begin = time.perf_counter()
            Study(config, seed, out / f"seed_{seed}", names, say).run()
            say(f"[seed {seed}] done, {time.perf_counter() - begin:.0f} s")
            # After every seed: a study that is stopped early has its results so far.
            page = write_results(out)
    say(f"Results: {page}")
    return page
