"""Hierarchical abstraction (paper, stage 3): E1 lessons are clustered into E2 patterns, those into E3 strategies.

Titles are the retrieval key, so titles are what is clustered: Ward linkage on the unit vectors, cut where the height
(unit: euclidean distance between unit vectors) reaches a threshold per level. The paper does not state its thresholds;
ours are quantiles of distances between random titles (calibrate.py). A cluster below ``min_cluster_size`` makes no
entry above: one lesson is no pattern, and it is still served as E1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from hiexp.experience import calibrate
from hiexp.experience.distill import RejectedReply, keep_rejected
from hiexp.experience.record import STATUSES, Experience, Level
from hiexp.experience.summarise import ExtractiveSummariser, Summariser
from hiexp.ops.clustering import cut_tree, linkage
from hiexp.progress import track

if TYPE_CHECKING:
    from hiexp.experience.store import HEK

Embed = Literal["title", "title+description"]
_STEPS: tuple[tuple[Level, Level], ...] = (("E1", "E2"), ("E2", "E3"))


@dataclass(frozen=True, slots=True)
class HierarchyReport:
    """What a build made.

    Attributes:
        sizes: active entries per level.
        thresholds: per level made, the Ward height below which clusters merged.
        cluster_sizes: per level made, cluster size -> how many clusters, too small ones included.
        singletons: per level made, entries below it that ended alone.
        quarantined: summaries the guard refused. declined: clusters the summariser had nothing to say about.
        retired: entries of an earlier build that this one did not make again.
    """

    sizes: Mapping[str, int]
    thresholds: Mapping[str, float]
    cluster_sizes: Mapping[str, Mapping[int, int]]
    singletons: Mapping[str, int]
    quarantined: int
    declined: int
    retired: int

    def __str__(self) -> str:
        lines = [f"{'level':<8}{'entries':>8}{'threshold':>11}{'alone below':>13}{'largest':>9}"]
        for level, size in self.sizes.items():
            if level in self.thresholds:
                largest = max(self.cluster_sizes[level], default=0)
                made = f"{self.thresholds[level]:>11.4f}{self.singletons[level]:>13,}{largest:>9,}"
            else:
                made = ""
            lines.append(f"{level:<8}{size:>8,}{made}")
        lines.append(f"quarantined {self.quarantined}, declined {self.declined}, retired {self.retired}")
        return "\n".join(lines)


def build_hierarchy(
    hek: HEK,
    *,
    summariser: Summariser | None = None,
    thresholds: Mapping[str, float] | None = None,
    min_cluster_size: int = 2,
    embed: Embed = "title",
) -> HierarchyReport:
    """Make E2 and E3 of ``hek`` anew from its active E1 entries; all or nothing, the same input giving the same result.

    An entry that comes out with the same content keeps its id and gets a new revision where its links changed; one that
    does not come out again is retired, never deleted. Readers see the previous hierarchy until the build is done.

    Args:
        hek: open for writing.
        summariser: default :class:`ExtractiveSummariser`. Replies in its ``rejected`` (:class:`LLMSummariser` has it)
            go into the HEK's quarantine, also where the build fails.
        thresholds: Ward heights for ``E2``, ``E3`` or both; default the HEK's calibration, which is renewed from its
            titles where it still is the built-in one and there are 50 titles.
        min_cluster_size: least members of a cluster that makes an entry, 1 or more.
        embed: cluster on titles, or on titles with descriptions (thresholds are then calibrated on those texts).
    """
    if not hasattr(hek, "transaction"):
        raise TypeError(f"hek: expected an open HEK (HEK.open(path, 'w')), got {type(hek).__name__} {hek!r:.80}")
    _check_arguments(thresholds, min_cluster_size, embed)
    summariser = summariser or ExtractiveSummariser()
    rejected: Sequence[RejectedReply] = getattr(summariser, "rejected", ())
    known = len(rejected)  # of an earlier build with the same summariser
    try:
        with hek.transaction():
            titles = {entry.title for entry in hek.entries("E1", "active")}
            if hek.calibration.source == "reference" and len(titles) >= calibrate.MIN_TEXTS:
                hek.calibrate()
            levels = [
                _build_level(hek, below, level, summariser, thresholds or {}, min_cluster_size, embed)
                for below, level in _STEPS
            ]
            return _report(hek, levels)
    finally:
        keep_rejected(hek, rejected[known:])  # also those of a build that failed and left nothing else


@dataclass(frozen=True, slots=True)
class _Built:
    level: Level
    threshold: float
    cluster_sizes: dict[int, int]
    quarantined: int
    declined: int
    retired: int


def _report(hek: HEK, levels: Sequence[_Built]) -> HierarchyReport:
    return HierarchyReport(
        sizes={level: len(hek.entries(level, "active")) for level in ("E1", "E2", "E3")},
        thresholds={built.level: built.threshold for built in levels},
        cluster_sizes={built.level: built.cluster_sizes for built in levels},
        singletons={built.level: built.cluster_sizes.get(1, 0) for built in levels},
        quarantined=sum(built.quarantined for built in levels),
        declined=sum(built.declined for built in levels),
        retired=sum(built.retired for built in levels),
    )


def _build_level(
    hek: HEK,
    below: Level,
    level: Level,
    summariser: Summariser,
    thresholds: Mapping[str, float],
    min_cluster_size: int,
    embed: Embed,
) -> _Built:
    children = hek.entries(below, "active")
    vectors, calibrated = level_vectors(hek, children, embed)
    threshold = float(thresholds.get(level, calibrated[level]))
    clusters = _cluster(children, vectors, threshold)
    large = [cluster for cluster in clusters if len(cluster) >= min_cluster_size]
    summaries = [
        _summary(summariser, cluster, level) for cluster in track(large, f"summarising {level}", total=len(large))
    ]
    stored = _store_level(hek, level, [summary for summary in summaries if summary is not None])
    retired = _retire_others(hek, level, stored)
    _link_children(hek, children, [entry for entry in stored if entry.status == "active"])
    sizes, counts = np.unique([len(cluster) for cluster in clusters], return_counts=True)
    return _Built(
        level=level,
        threshold=threshold,
        cluster_sizes=dict(zip(sizes.astype(int).tolist(), counts.tolist(), strict=True)),
        quarantined=sum(entry.status == "quarantine" for entry in stored),
        declined=summaries.count(None),
        retired=retired,
    )


def level_vectors(
    hek: HEK, entries: Sequence[Experience], embed: Embed
) -> tuple[NDArray[np.float32], Mapping[str, float]]:
    """Vectors (n, d) to cluster, and the thresholds that fit them."""
    calibration = hek.calibration
    if embed == "title":
        return hek.database.vectors([entry.title for entry in entries], calibration.dim), calibration.thresholds
    texts = [f"{entry.title} {entry.description}" for entry in entries]
    if len(set(texts)) >= calibrate.MIN_TEXTS:
        calibration = calibrate.calibrate(hek.encoder, texts)
    return hek.encoder.encode(texts), calibration.thresholds


def _cluster(entries: Sequence[Experience], vectors: NDArray[np.float32], threshold: float) -> list[list[Experience]]:
    """Clusters in order of their first entry; in each the entry nearest to the centre comes first."""
    n = len(entries)
    if n < 2:
        return [[entry] for entry in entries]
    tree = linkage(vectors, method="ward", threshold=threshold)
    labels = cut_tree(tree, n, threshold=threshold)
    clusters = []
    for label in dict.fromkeys(labels.tolist()):
        rows = np.flatnonzero(labels == label)
        members = vectors[rows].astype(np.float64)
        nearness = np.round(members @ members.mean(axis=0), 6)  # as scores: near ties go to the lower exp_id
        clusters.append([entries[rows[i]] for i in np.argsort(-nearness, kind="stable")])
    return clusters


def _summary(summariser: Summariser, cluster: Sequence[Experience], level: Level) -> Experience | None:
    summary = summariser.summarise(cluster, level)
    if summary is None:
        return None
    steps = [child.policy_step for child in cluster if child.policy_step is not None]
    return replace(
        summary,
        level=level,
        children=tuple(sorted(child.exp_id for child in cluster)),
        parents=(),
        qa_groups=tuple(sorted({question for child in cluster for question in child.qa_groups})),
        policy_step=max(steps, default=None),
        exp_id="",
        rev=0,
        status="active",
    )


def _store_level(hek: HEK, level: Level, summaries: Sequence[Experience]) -> list[Experience]:
    """Store the entries of ``level``; those with a content seen before go on under their id."""
    merged: dict[str, Experience] = {}  # two clusters may come to the same lesson
    for summary in summaries:
        other = merged.setdefault(summary.content_hash(), summary)
        merged[summary.content_hash()] = replace(
            other,
            children=tuple(sorted({*other.children, *summary.children})),
            qa_groups=tuple(sorted({*other.qa_groups, *summary.qa_groups})),
        )
    known = {entry.content_hash(): entry for entry in hek.entries(level, STATUSES)}
    new = {entry.content_hash(): entry for entry in hek.add([m for key, m in merged.items() if key not in known])}
    stored = []
    for key, summary in merged.items():
        if key in new:
            stored.append(new[key])
            continue
        old = known[key]
        status = "active" if old.status == "retired" else old.status
        stored.append(
            hek.revise(
                old.exp_id,
                children=summary.children,
                qa_groups=summary.qa_groups,
                policy_step=summary.policy_step,
                status=status,
            )
        )
    return stored


def _retire_others(hek: HEK, level: Level, stored: Sequence[Experience]) -> int:
    made = {entry.exp_id for entry in stored}
    gone = [entry for entry in hek.entries(level) if entry.exp_id not in made]
    for entry in gone:
        hek.revise(entry.exp_id, status="retired", parents=())
    return len(gone)


def _link_children(hek: HEK, children: Sequence[Experience], parents: Sequence[Experience]) -> None:
    above: dict[str, list[str]] = {child.exp_id: [] for child in children}
    for parent in parents:
        for child in parent.children:
            above[child].append(parent.exp_id)
    for exp_id, found in above.items():
        hek.revise(exp_id, parents=tuple(sorted(found)))


def _check_arguments(thresholds: Mapping[str, float] | None, min_cluster_size: int, embed: str) -> None:
    for level, value in (thresholds or {}).items():
        if level not in ("E2", "E3"):
            raise ValueError(f"thresholds: expected the keys 'E2' and 'E3', got {level!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
            raise ValueError(f"thresholds[{level!r}]: expected a positive finite height, got {value!r}")
    if isinstance(min_cluster_size, bool) or not isinstance(min_cluster_size, int) or min_cluster_size < 1:
        raise ValueError(f"min_cluster_size: expected an integer from 1, got {min_cluster_size!r}")
    if embed not in ("title", "title+description"):
        raise ValueError(f"embed: expected 'title' or 'title+description', got {embed!r}")
