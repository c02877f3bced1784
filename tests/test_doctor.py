"""``hiexp doctor`` and ``build_info()``: what they claim matches what is there."""

import importlib.util

import pytest

import hiexp
from hiexp import cli, doctor

SIX = {
    "group_advantage", "token_logprobs", "paired_logprobs", "policy_loss", "linear_policy_loss", "score_group",
}  # fmt: skip


def test_build_info_matches_the_compiled_modules():
    info = hiexp.build_info()
    assert info["version"] == hiexp.__version__
    assert info["threads"] >= 1
    assert ("cuda" in info["backends"]) == (importlib.util.find_spec("hiexp._cuda") is not None)
    assert bool(info["cuda_architectures"]) == ("cuda" in info["backends"])


def test_doctor_lists_every_operation_and_extra(capsys):
    code = cli.main(["doctor"])
    text = capsys.readouterr().out
    for word in ("train", "vllm", "hiexp._core"):
        assert word in text
    routes = " ".join(name for name, _ in doctor.diagnose().sections["What would run where"])
    operations = {name for name in hiexp.__all__ if name in SIX} | {"linkage", "clustering"}
    assert set(routes.replace(",", "").split()) == operations | {"training"}
    assert len(operations) == 8
    assert code == (0 if "Nothing is wrong." in text else 1)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("absent", [None, "torch", "triton", "transformers"])
def test_routes_follow_what_is_installed(monkeypatch, gpu, absent):
    real = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == absent else real("json"))
    gpu = gpu and absent != "torch"
    rows = dict(doctor._routes({"threads": 3, "backends": ["cpu", "cuda"]}, gpu))
    assert ("CUDA" in rows["linkage, clustering"]) == gpu
    assert "C++ on the CPU, 3 threads" in rows["linkage, clustering"]
    assert ("CUDA" in rows["group_advantage"]) == gpu
    for name in ("token_logprobs", "paired_logprobs", "policy_loss", "linear_policy_loss"):
        assert ("Triton" in rows[name]) == (gpu and absent != "triton")
        assert ("hiexp[gpu]" in rows[name]) == (gpu and absent == "triton")
        assert ("unavailable without torch" in rows[name]) == (absent == "torch")
    assert ("unavailable" in rows["score_group"]) == (absent in ("torch", "transformers"))


def test_missing_package_of_an_extra_is_named(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["no-such-thing>=1 ; extra == 'train'", "numpy>=1"]
    )
    assert doctor._missing_packages("train") == ["no-such-thing"]
    assert doctor._describe_extra("train", ["no-such-thing"]) == "missing no-such-thing; pip install 'hiexp[train]'"
    assert doctor._missing_packages("gpu") == []


def test_gpu_seen_by_torch_without_cuda_module_is_a_finding(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    findings = []
    rows, usable = doctor._describe_torch({"threads": 2, "backends": ["cpu"], "cuda_devices": 0}, findings)
    assert usable
    assert ("cuda:0", "a GPU") in rows
    assert "HIEXP_CUDA=ON" in findings[0].mend
