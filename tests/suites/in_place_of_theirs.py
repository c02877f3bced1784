"""pytest plugin: scikit-learn's and SciPy's own clustering tests meet hiexp where they expect their package's code.

Loaded with ``-p in_place_of_theirs`` into a pytest of its own (see test_independent_suites.py), because it replaces
names in both packages. What hiexp does not offer by design, a connectivity graph and the centroid and median methods,
is handed to the original, so that tests which mix both kinds still run; how often each test reached hiexp goes into the
report, and a test that never did proves nothing.
"""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import scipy.cluster.hierarchy
import sklearn.cluster
import sklearn.cluster._agglomerative as agglomerative

import hiexp

REPORT = "HIEXP_SUITE_REPORT"
# Our words -> theirs, where a test looks for theirs in an error that both raise.
SAME_ERROR = {"expected nonzero rows": "Cosine affinity cannot be used when X contains zero vectors"}
THEIR_PARAMETERS = tuple(sklearn.cluster.AgglomerativeClustering().get_params())

their_estimator = sklearn.cluster.AgglomerativeClustering
their_trees = {"ward": agglomerative.ward_tree, "other": agglomerative.linkage_tree}
their_linkage = scipy.cluster.hierarchy.linkage
reached = 0


class AgglomerativeClustering(hiexp.AgglomerativeClustering):
    """hiexp's estimator; with a connectivity, scikit-learn's in its place."""

    def fit(self, X, y=None):
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)
        if self.connectivity is None:
            _count()
            return super().fit(X, y)
        theirs = their_estimator(**{name: getattr(self, name) for name in THEIR_PARAMETERS}).fit(X, y)
        vars(self).update({name: value for name, value in vars(theirs).items() if name.endswith("_")})
        return self


def ward_tree(X, *, connectivity=None, n_clusters=None, return_distance=False):
    if connectivity is not None:
        return their_trees["ward"](X, connectivity=connectivity, n_clusters=n_clusters, return_distance=return_distance)
    return _tree(X, n_clusters, "ward", "euclidean", return_distance)


def linkage_tree(
    X, connectivity=None, n_clusters=None, linkage="complete", affinity="euclidean", return_distance=False
):
    if connectivity is not None:
        return their_trees["other"](X, connectivity, n_clusters, linkage, affinity, return_distance)
    return _tree(X, n_clusters, linkage, affinity, return_distance)


def linkage(y, method="single", metric="euclidean", optimal_ordering=False):
    """scipy.cluster.hierarchy.linkage's signature over hiexp.linkage."""
    if method in ("centroid", "median"):
        return their_linkage(y, method, metric, optimal_ordering)
    y = np.asarray(y, np.float64)
    _count()
    Z = hiexp.linkage(y, method, "precomputed" if y.ndim == 1 else metric)
    return scipy.cluster.hierarchy.optimal_leaf_ordering(Z, y) if optimal_ordering else Z


def _tree(X, n_clusters, method, metric, return_distance):
    """What scikit-learn's tree functions return without a connectivity: the full tree, no parents."""
    X = np.asarray(X)
    X = X.reshape(-1, 1) if X.ndim == 1 else X
    if n_clusters is not None:
        warnings.warn("n_clusters is not used: the full tree is built", stacklevel=3)
    _count()
    data, metric = (metric(X), "precomputed") if callable(metric) else (X, metric)
    try:
        Z = hiexp.linkage(data, method, metric)
    except ValueError as error:
        theirs = [words for ours, words in SAME_ERROR.items() if ours in str(error)]
        raise ValueError(*theirs or error.args) from error
    found = (Z[:, :2].astype(np.intp), 1, len(X), None)
    return (*found, Z[:, 2]) if return_distance else found


def _count():
    global reached
    reached += 1


def pytest_configure(config):
    # Before their tests are imported: some take the names into parameter lists.
    for module in (sklearn.cluster, agglomerative):
        module.AgglomerativeClustering = AgglomerativeClustering
        module.ward_tree, module.linkage_tree = ward_tree, linkage_tree
    agglomerative._TREE_BUILDERS["ward"] = ward_tree
    config.hiexp_report = {}


def pytest_collection_modifyitems(items):
    # After their tests are imported: SciPy's decorators look the original up in a table.
    if any(item.module.__name__.startswith("scipy.") for item in items):
        scipy.cluster.hierarchy.linkage = linkage
        for item in items:
            item.module.linkage = linkage


def pytest_runtest_setup(item):
    global reached
    reached = 0


def pytest_runtest_makereport(item, call):
    if call.when == "call" or call.excinfo is not None:
        # In the order of what the name tells: the module is the same for all.
        name = item.nodeid.split("::", 1)[1]
        skipped = call.excinfo is not None and call.excinfo.typename == "Skipped"
        error = None if call.excinfo is None else f"{call.excinfo.typename}: {call.excinfo.value}"
        outcome = "skipped" if skipped else "failed" if error else "passed"
        item.config.hiexp_report[name] = {"outcome": outcome, "reached": reached, "error": error}


def pytest_sessionfinish(session):
    with open(os.environ[REPORT], "w") as file:
        json.dump(session.config.hiexp_report, file)
