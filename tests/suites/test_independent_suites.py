"""scikit-learn's tests of agglomerative clustering and SciPy's of linkage, run against hiexp.

Each suite runs whole in a pytest of its own (in_place_of_theirs.py replaces the names). Every test of it must pass and
must have reached hiexp, but for those listed here with their reason. The lists are strict: a name that is no test any
more, or a listed test that passes after reaching hiexp, fails the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GRAPH = "only clusters along a connectivity graph, which hiexp refuses"
PRIVATE = "tests private functions of scikit-learn, no clustering"
METHOD = "the centroid and median methods, which are not monotone, are not offered"
OTHER = "never calls linkage"

SKLEARN = {
    "test_structured_linkage_tree": GRAPH,
    "test_height_linkage_tree": GRAPH,
    "test_agglomerative_clustering_distances": GRAPH,
    "test_ward_agglomeration": GRAPH,
    "test_sparse_scikit_vs_scipy": GRAPH,
    "test_identical_points": GRAPH,
    "test_connectivity_propagation": GRAPH,
    "test_connectivity_fixing_non_lil": GRAPH,
    "test_connectivity_callable": GRAPH,
    "test_connectivity_ignores_diagonal": GRAPH,
    "test_compute_full_tree": GRAPH,
    "test_n_components": GRAPH,
    "test_affinity_passed_to_fix_connectivity": GRAPH,
    "test_precomputed_connectivity_metric_with_2_connected_components": GRAPH,
    "test_agglomeration_ward_constrained_metric": GRAPH,
    "test_agglomeration_ward_euclidean": GRAPH,
    "test_mst_linkage_core_memory_mapped": PRIVATE,
    "test_int_float_dict": PRIVATE,
    "test_dist_threshold_invalid_parameters": "wants compute_full_tree=False with a threshold refused; here it stops "
    "early. The other two refusals in it are tested in tests/ops/test_agglomerative.py",
}

SCIPY = {
    "TestLinkage::test_linkage_ties[numpy-centroid": METHOD,
    "TestLinkage::test_linkage_ties[numpy-median": METHOD,
    "TestLinkage::test_euclidean_linkage_value_error[numpy-centroid": METHOD,
    "TestLinkage::test_euclidean_linkage_value_error[numpy-median": METHOD,
    "TestLinkage::test_centroid_neg_distance": METHOD,
    "TestLinkage::test_unsupported_uncondensed_distance_matrix_linkage_warning": "wants a warning for rows that look "
    "like a distance matrix; here metric='precomputed' says which of the two they are",
    "TestInconsistent": OTHER,
    "TestCopheneticDistance": OTHER,
    "TestMLabLinkageConversion": OTHER,
    "TestIsIsomorphic": OTHER,
    "TestIsValidLinkage::test_is_valid_linkage_various_size": OTHER,
    "TestIsValidLinkage::test_is_valid_linkage_int_type": OTHER,
    "TestIsValidLinkage::test_is_valid_linkage_empty": OTHER,
    "TestIsValidInconsistent::test_is_valid_im_int_type": OTHER,
    "TestIsValidInconsistent::test_is_valid_im_various_size": OTHER,
    "TestIsValidInconsistent::test_is_valid_im_empty": OTHER,
    "TestNumObsLinkage::test_num_obs_linkage_empty": OTHER,
    "TestNumObsLinkage::test_num_obs_linkage_1x4": OTHER,
    "TestNumObsLinkage::test_num_obs_linkage_2x4": OTHER,
    "TestLeavesList::test_leaves_list_1x4": OTHER,
    "TestLeavesList::test_leaves_list_2x4": OTHER,
    "TestLeavesList::test_leaves_list_Q[numpy-centroid": METHOD,
    "TestLeavesList::test_leaves_list_Q[numpy-median": METHOD,
    "TestCorrespond::test_correspond_empty": OTHER,
    "TestIsMonotonic::test_is_monotonic_empty": OTHER,
    "TestIsMonotonic::test_is_monotonic_1x4": OTHER,
    "TestIsMonotonic::test_is_monotonic_2x4": OTHER,
    "TestIsMonotonic::test_is_monotonic_3x4": OTHER,
    "TestMaxDists::test_maxdists_empty_linkage": OTHER,
    "TestMaxDists::test_maxdists_one_cluster_linkage": OTHER,
    "TestMaxDists::test_maxdists_Q_linkage[numpy-centroid": METHOD,
    "TestMaxDists::test_maxdists_Q_linkage[numpy-median": METHOD,
    "TestMaxInconsts::test_maxinconsts_empty_linkage": OTHER,
    "TestMaxInconsts::test_maxinconsts_difrow_linkage": OTHER,
    "TestMaxInconsts::test_maxinconsts_one_cluster_linkage": OTHER,
    "TestMaxInconsts::test_maxinconsts_Q_linkage[numpy-centroid": METHOD,
    "TestMaxInconsts::test_maxinconsts_Q_linkage[numpy-median": METHOD,
    "TestMaxRStat::test_maxRstat_invalid_index": OTHER,
    "TestMaxRStat::test_maxRstat_empty_linkage": OTHER,
    "TestMaxRStat::test_maxRstat_difrow_linkage": OTHER,
    "TestMaxRStat::test_maxRstat_one_cluster_linkage": OTHER,
    "TestMaxRStat::test_maxRstat_Q_linkage[numpy-centroid": METHOD,
    "TestMaxRStat::test_maxRstat_Q_linkage[numpy-median": METHOD,
    "TestDendrogram::test_valid_label_size": OTHER,
    "test_Heap": OTHER,
}

# Suite, its exclusions, and the tests that reached hiexp when the list was made: fewer would mean a broken replacement.
SUITES = [
    ("sklearn.cluster.tests.test_hierarchical", SKLEARN, 25),
    ("scipy.cluster.tests.test_hierarchy", SCIPY, 80),
]


def run_suite(module: str, tmp_path: Path) -> tuple[dict, str]:
    report = tmp_path / "report.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])]),
        "HIEXP_SUITE_REPORT": str(report),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", module, "-p", "in_place_of_theirs"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text()), done.stdout


def complaints(results: dict, excluded: dict) -> list[str]:
    """What is wrong with a run of a suite, a line each."""
    names = {name for name in excluded for test in results if test.startswith(name)}
    wrong = [f"{name}: excluded, but the suite has no such test" for name in excluded if name not in names]
    for test, result in results.items():
        works = result["outcome"] == "passed" and result["reached"] > 0
        if works and any(test.startswith(name) for name in excluded):
            wrong.append(f"{test}: excluded, but it passes")
        elif not works and not any(test.startswith(name) for name in excluded):
            wrong.append(
                f"{test}: {result['outcome']} after reaching hiexp {result['reached']} times, {result['error']}"
            )
    return wrong


@pytest.mark.parametrize(("module", "excluded", "least"), SUITES, ids=["sklearn", "scipy"])
def test_suite_passes(module, excluded, least, tmp_path):
    pytest.importorskip(module.split(".")[0])
    results, output = run_suite(module, tmp_path)
    assert not complaints(results, excluded), output
    assert sum(result["reached"] > 0 for result in results.values()) >= least


def test_runner_is_strict():
    passed = {"outcome": "passed", "reached": 2, "error": None}
    failed = {"outcome": "failed", "reached": 2, "error": "ValueError: no"}
    missed = {"outcome": "passed", "reached": 0, "error": None}
    assert complaints({"test_a": passed, "test_b[1]": failed, "test_c": missed}, {"test_b": "", "test_c": ""}) == []
    assert complaints({"test_a": passed, "test_b": failed}, {}) == [
        "test_b: failed after reaching hiexp 2 times, ValueError: no"
    ]
    assert "test_c: passed after reaching hiexp 0 times" in complaints({"test_c": missed}, {})[0]
    assert complaints({"test_a[2]": passed}, {"test_a": ""}) == ["test_a[2]: excluded, but it passes"]
    assert complaints({"test_a": passed}, {"test_gone": ""}) == ["test_gone: excluded, but the suite has no such test"]
