"""AgglomerativeClustering: scikit-learn's results and conventions, and what goes beyond them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import hiexp
from hiexp import AgglomerativeClustering


def blobs(n=120, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return 8 * rng.normal(size=(6, d))[rng.integers(0, 6, n)] + rng.normal(size=(n, d))


def same_partition(a, b):
    return len(set(a)) == len(set(b)) == len(set(zip(a, b, strict=True)))


# scikit-learn's linkages and metrics by their names there.
PAIRS = [("ward", "euclidean"), ("ward", "l2")] + [
    (linkage, metric)
    for linkage in ("average", "complete", "single")
    for metric in ("euclidean", "l2", "l1", "manhattan", "cityblock", "cosine")
]


@pytest.mark.parametrize(("linkage", "metric"), PAIRS)
@pytest.mark.parametrize("cut", [{"n_clusters": 1}, {"n_clusters": 7}, {"n_clusters": None, "distance_threshold": 0.3}])
def test_equals_scikit_learn(linkage, metric, cut):
    cluster = pytest.importorskip("sklearn.cluster")
    X = blobs()
    ours = AgglomerativeClustering(linkage=linkage, metric=metric, **cut).fit(X)
    theirs = cluster.AgglomerativeClustering(linkage=linkage, metric=metric, compute_distances=True, **cut).fit(X)
    if linkage == "single":  # scikit-learn orders the two children of a merge as its spanning tree found them
        assert same_partition(ours.labels_, theirs.labels_)
    else:
        np.testing.assert_array_equal(ours.labels_, theirs.labels_)
        np.testing.assert_array_equal(ours.children_, theirs.children_)
    np.testing.assert_allclose(ours.distances_, np.sort(theirs.distances_), rtol=1e-9, atol=1e-14)
    assert ours.children_.shape == (119, 2)
    for name in ("n_clusters_", "n_leaves_", "n_connected_components_", "n_features_in_"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_check_estimator():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    for estimator in (AgglomerativeClustering(), AgglomerativeClustering(linkage="average", metric="sqeuclidean")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = checks.check_estimator(estimator, on_fail=None, on_skip=None)
        bad = {r["check_name"]: str(r["exception"]) for r in results if r["status"] not in ("passed", "skipped")}
        assert not bad
        assert sum(r["status"] == "passed" for r in results) >= 35


def test_data_frames_give_their_names():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    pandas = pytest.importorskip("pandas")
    checks.check_dataframe_column_names_consistency("AgglomerativeClustering", AgglomerativeClustering())
    X = blobs()
    frame = pandas.DataFrame(X, columns=list("abcde"))
    model = AgglomerativeClustering().fit(frame)
    assert model.feature_names_in_.tolist() == list("abcde")
    with pytest.warns(UserWarning, match="valid feature names"):
        model.predict(X)
    assert not hasattr(model.fit(X), "feature_names_in_")
    with pytest.warns(UserWarning, match="without feature names"):
        model.predict(frame)
    with pytest.raises(TypeError, match="int, str"):
        model.fit(frame.set_axis(["a", 1, "c", "d", "e"], axis=1))
    assert not hasattr(model.fit(frame.set_axis(range(5), axis=1)), "feature_names_in_")


def test_tree_describes_itself():
    X = blobs()
    model = AgglomerativeClustering(4).fit(X)
    Z = hiexp.linkage(X)
    np.testing.assert_array_equal(model.linkage_matrix_, Z)
    np.testing.assert_array_equal(model.children_, Z[:, :2])
    np.testing.assert_array_equal(model.distances_, Z[:, 2])
    assert model.children_.dtype == model.labels_.dtype == np.int64
    assert same_partition(model.labels_, hiexp.cut_tree(Z, len(X), n_clusters=4))
    np.testing.assert_array_equal(model.fit_predict(X), model.labels_)


def test_compute_full_tree():
    X = blobs()
    full = AgglomerativeClustering(None, distance_threshold=5.0).fit(X)
    short = AgglomerativeClustering(None, distance_threshold=5.0, compute_full_tree=np.False_).fit(X)
    assert same_partition(short.labels_, full.labels_)
    assert len(short.children_) == len(X) - full.n_clusters_ < len(full.children_)
    for value in ("auto", True, False):
        model = AgglomerativeClustering(30, compute_full_tree=value).fit(X)
        assert len(model.children_) == 119
        assert model.n_clusters_ == 30


def test_precomputed_and_callable_metrics():
    distance = pytest.importorskip("scipy.spatial.distance")
    X = blobs()
    square = distance.squareform(distance.pdist(X))
    calls = []

    def metric(rows):
        calls.append(rows.shape)
        return square

    for linkage in ("ward", "average", "weighted", "complete", "single"):
        expected = AgglomerativeClustering(5, linkage=linkage).fit(X)
        for model, data in (
            (AgglomerativeClustering(5, linkage=linkage, metric="precomputed"), square),
            (AgglomerativeClustering(5, linkage=linkage, metric=metric), X),
        ):
            np.testing.assert_array_equal(model.fit(data).labels_, expected.labels_)
            np.testing.assert_allclose(model.distances_, expected.distances_, rtol=1e-9)
    assert calls == [X.shape] * 5
    with pytest.raises(ValueError, match=r"square, got matrix of shape \(120, 5\)"):
        AgglomerativeClustering(metric="precomputed", linkage="average").fit(X)
    with pytest.raises(ValueError, match=r"square, got matrix of shape \(120,\)"):
        AgglomerativeClustering(metric=lambda rows: rows[:, 0], linkage="average").fit(X)
    with pytest.raises(ValueError, match=r"X\[0, 1\]: expected a finite distance >= 0, got -"):
        AgglomerativeClustering(metric=lambda rows: -square, linkage="average").fit(X)


def test_memory_keeps_the_tree(tmp_path):
    joblib = pytest.importorskip("joblib")
    X = blobs()
    expected = AgglomerativeClustering(4).fit(X)

    class Memory:
        calls = 0

        def cache(self, function):
            def cached(*args, **kwargs):
                self.calls += 1
                return function(*args, **kwargs)

            return cached

    own = Memory()
    for memory in (str(tmp_path / "a"), joblib.Memory(tmp_path / "b", verbose=0), own):
        for n_clusters in (4, 9):
            model = AgglomerativeClustering(n_clusters, memory=memory).fit(X)
            assert model.n_clusters_ == n_clusters
            np.testing.assert_array_equal(model.linkage_matrix_, expected.linkage_matrix_)
    assert own.calls == 2
    for folder in ("a", "b"):  # one tree each: the second number of clusters found it
        assert len(list((tmp_path / folder).rglob("output.pkl"))) == 1


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ward_by_inertia(x, members):
    # The height at which {x} and B would merge, from the increase of the sum of squares.
    def inertia(rows):
        return ((rows - rows.mean(axis=0)) ** 2).sum()

    return np.sqrt(2 * (inertia(np.vstack([members, x])) - inertia(members)))


def mean_to_nodes(x, X, Z, weighted):
    # Distances of x to every node of the tree by the linkage's own recursion, from squared distances to the rows.
    found = np.concatenate([((X - x) ** 2).sum(axis=1), np.empty(len(Z))])
    size = np.concatenate([np.ones(len(X)), Z[:, 3]])
    for step, (left, right) in enumerate(Z[:, :2].astype(int)):
        a, b = (1, 1) if weighted else (size[left], size[right])
        found[len(X) + step] = (a * found[left] + b * found[right]) / (a + b)
    return found


CENTROID_FORMS = [("ward", "euclidean"), ("ward", "l2"), ("ward", "cosine")] + [
    (linkage, metric) for linkage in ("average", "weighted") for metric in ("cosine", "sqeuclidean")
]


@pytest.mark.parametrize(
    ("linkage", "metric", "shift"),
    [(*form, shift) for form in CENTROID_FORMS for shift in (0.0, 1e4) if form[1] != "cosine" or shift == 0.0],
)
def test_predict_by_the_linkages_own_distance(linkage, metric, shift):
    rng = np.random.default_rng(5)
    # Close clusters of very different sizes: the nearest mean is often another cluster.
    X = rng.normal(size=(90, 3)) + 2 * rng.normal(size=(5, 3))[rng.choice(5, 90, p=[0.7, 0.1, 0.1, 0.05, 0.05])] + shift
    new = 2 * rng.normal(size=(200, 3)) + shift
    model = AgglomerativeClustering(6, linkage=linkage, metric=metric).fit(X)
    rows, fresh = (unit(X), unit(new)) if metric == "cosine" else (X, new)
    clusters = [np.flatnonzero(model.labels_ == label) for label in range(6)]
    Z, expected = model.linkage_matrix_, []
    for x in fresh:
        if linkage == "ward":
            distances = [ward_by_inertia(x, rows[members]) for members in clusters]
        else:
            nodes = mean_to_nodes(x, rows, Z, linkage == "weighted")
            distances = [nodes[top_node(Z, members)] for members in clusters]
        expected.append(int(np.argmin(distances)))
    np.testing.assert_array_equal(model.predict(new), expected)
    means = np.array([rows[members].mean(axis=0) for members in clusters])
    nearest_mean = ((fresh[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest_mean != expected).any()


def top_node(Z, members):
    """The node of the tree whose leaves are ``members``."""
    leaves = {i: {i} for i in range(len(Z) + 1)}
    for step, (left, right) in enumerate(Z[:, :2].astype(int)):
        leaves[len(Z) + 1 + step] = leaves[left] | leaves[right]
    return next(node for node, some in leaves.items() if some == set(members.tolist()))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_predict_at_extreme_scales(scale):
    X = blobs()
    model = AgglomerativeClustering(6).fit(X)
    scaled = AgglomerativeClustering(6).fit(X * scale)
    np.testing.assert_array_equal(scaled.labels_, model.labels_)
    np.testing.assert_array_equal(scaled.predict(X[::-1] * scale), model.predict(X[::-1]))


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    X = torch.from_numpy(blobs())
    model = AgglomerativeClustering(3).fit(X)
    for value in (model.labels_, model.children_, model.distances_, model.linkage_matrix_, model.predict(X[:9])):
        assert isinstance(value, torch.Tensor)
    assert len(model.labels_.unique()) == 3


def test_parameters_and_clone():
    model = AgglomerativeClustering(5, linkage="average", metric="cosine", n_threads=1)
    assert AgglomerativeClustering(**model.get_params()).get_params() == model.get_params()
    assert model.set_params(n_clusters=3, linkage="ward") is model
    assert (model.n_clusters, model.linkage) == (3, "ward")
    assert repr(model) == "AgglomerativeClustering(n_clusters=3, metric='cosine', n_threads=1)"
    with pytest.raises(ValueError, match="'clusters'"):
        model.set_params(clusters=3)
    base = pytest.importorskip("sklearn.base")
    assert base.clone(model).get_params() == model.get_params()


def test_works_in_a_pipeline():
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    X = blobs()
    labels = pipeline.make_pipeline(preprocessing.StandardScaler(), AgglomerativeClustering(6)).fit_predict(X)
    np.testing.assert_array_equal(labels, AgglomerativeClustering(6).fit_predict((X - X.mean(axis=0)) / X.std(axis=0)))


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ({"connectivity": np.eye(4)}, ValueError, ["connectivity", "None", "(4, 4)"]),
        ({"n_clusters": None}, ValueError, ["Exactly one of", "n_clusters=None"]),
        ({"distance_threshold": 1.0}, ValueError, ["Exactly one of", "n_clusters=2", "distance_threshold=1.0"]),
        ({"n_clusters": None, "distance_threshold": -1.0}, ValueError, ["threshold", "-1.0"]),
        ({"n_clusters": 0}, ValueError, ["n_clusters", "1..4", "0"]),
        ({"n_clusters": 5}, ValueError, ["n_clusters", "1..4", "5"]),
        ({"n_clusters": 2.5}, TypeError, ["n_clusters", "2.5"]),
        ({"compute_full_tree": "maybe"}, ValueError, ["compute_full_tree", "'maybe'"]),
        ({"linkage": "centroid"}, ValueError, ["linkage", "'centroid'"]),
        ({"metric": "chebyshev", "linkage": "average"}, ValueError, ["metric", "'precomputed'", "'chebyshev'"]),
        ({"metric": "manhattan"}, ValueError, ["metric", "method='ward'", "'manhattan'"]),
        ({"metric": None}, ValueError, ["metric", "None"]),
        ({"memory": 3}, TypeError, ["memory", "cache()", "3"]),
        ({"n_threads": 0}, ValueError, ["n_threads", "1..", "0"]),
        ({"device": "cuda"}, ValueError, ["device", "cpu", "'cuda'"]),
    ],
)
def test_bad_parameters_are_named(parameters, error, words):
    with pytest.raises(error) as caught:
        AgglomerativeClustering(**parameters).fit(np.arange(8.0).reshape(4, 2))
    for word in words:
        assert word in str(caught.value)


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match="at least 2 rows"):
        AgglomerativeClustering().fit([[1.0, 2.0]])
    X = blobs()
    with pytest.raises(ValueError, match="before fit"):
        AgglomerativeClustering().predict(X)
    for parameters in ({"linkage": "average"}, {"linkage": "single"}, {"metric": lambda rows: 1 - np.eye(120)}):
        model = AgglomerativeClustering(**{"linkage": "complete"} | parameters)
        with pytest.raises(ValueError, match=f"centroids .*{model.linkage!r}"):
            model.fit(X).predict(X)
    model = AgglomerativeClustering(metric="cosine").fit(X)
    with pytest.raises(ValueError, match=r"4 features.* expecting 5 features"):
        model.predict(X[:, :4])
    with pytest.raises(ValueError, match=r"NaN or infinity \(nan in row 3, column 1\)"):
        model.predict(np.where(np.arange(X.size).reshape(X.shape) == 16, np.nan, X))
    with pytest.raises(ValueError, match="row 2"):
        model.predict(X * (np.arange(len(X)) != 2)[:, None])
