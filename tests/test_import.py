"""``import hiexp`` is light, public names resolve, and a missing extra says which pip command brings it."""

import subprocess
import sys

import pytest

import hiexp
from hiexp._extras import require


def run_fresh(code):
    """Run ``code`` in a new interpreter; return its standard output."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy():
    loaded = run_fresh("import hiexp, sys; print(*sys.modules)").split()
    assert not {"torch", "numpy", "transformers", "sqlite3"} & set(loaded)


def test_numpy_only_layers_do_not_import_torch():
    code = (
        "import sys, hiexp, hiexp.cli; hiexp.HEK; hiexp.linkage; hiexp.group_advantage; hiexp.distill;"
        "hiexp.SearchAgent;"
        "hiexp.cli.build_parser(); print(*sys.modules)"
    )
    loaded = set(run_fresh(code).split())
    assert not {"torch", "transformers", "jsonschema", "faiss", "sentence_transformers", "scipy", "sklearn"} & loaded


@pytest.mark.parametrize("name", hiexp.__all__)
def test_public_names_resolve_and_are_documented(name):
    assert getattr(hiexp, name).__doc__
    assert name in dir(hiexp)


def test_an_extension_older_than_the_python_files_is_named():
    """One that lacks a function, and one of another version; both in the words of an ImportError, at every use."""
    lacking = """
import hiexp._core, hiexp
del hiexp._core.linkage, hiexp.__dict__["_core"]
for _ in range(2):
    try:
        hiexp.linkage([[0.0], [1.0]], "ward")
    except ImportError as error:
        print(error)
print(hasattr(hiexp._core, "__wrapped__"))
"""
    first, second, wrapped = run_fresh(lacking).splitlines()
    assert first == second
    assert first.startswith("hiexp._core has no 'linkage': it was built before the Python files beside it; rebuild it")
    assert wrapped == "False"
    other = """
import hiexp
hiexp.__version__ = "99"
for _ in range(2):
    try:
        from hiexp import _core
    except ImportError as error:
        print(error)
"""
    first, second = run_fresh(other).splitlines()
    assert first == second
    assert first.startswith(f"hiexp._core is of version {hiexp.__version__}, its Python files of 99; rebuild it: pip")


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hiexp.nothing  # noqa: B018


def test_missing_extra_names_the_pip_command():
    with pytest.raises(
        ImportError, match=r"hiexp\.x needs the package 'no_such_package'.*pip install 'hiexp\[train\]'"
    ):
        require("no_such_package.sub", "train", "hiexp.x")


def test_a_failure_inside_a_package_is_not_reported_as_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import some_other_missing_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="some_other_missing_module") as caught:
        require("broken_package", "train", "hiexp.x")
    assert "pip install" not in str(caught.value)
