"""``device`` of a configuration, the GPUs that a process sees, and what is a GPU's fault."""

import importlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from quantool.config.schema import Config
from quantool.errors import DependencyError
from quantool.runtime import builds, gpus, process
from quantool.runtime.gpus import VISIBLE, devices


def has(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(gpus, "capabilities", lambda: [(9, 0)] * count)
    monkeypatch.setattr(builds, "capabilities", lambda: [(9, 0)] * count)
    monkeypatch.delenv(VISIBLE, raising=False)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "cuda:0,1", "cuda:10,3"])
def test_devices_that_a_configuration_may_name(device: str) -> None:
    assert Config(model_id="m", method="gguf", device=device).device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:a", "cuda:1,", "cuda:-1", "cpu:0", "cuda:0\n"])
def test_devices_that_there_are_not(device: str) -> None:
    with pytest.raises(ValidationError, match="no such device"):
        Config(model_id="m", method="gguf", device=device)


def test_each_gpu_gets_a_process_that_sees_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 3)
    assert devices("cuda").each() == [{VISIBLE: "0"}, {VISIBLE: "1"}, {VISIBLE: "2"}]
    assert devices(None).each() == devices("cuda").each()
    assert devices("cuda:2,0,2").each() == [{VISIBLE: "2"}, {VISIBLE: "0"}]
    assert devices("cuda:2,0").variables() == {VISIBLE: "2,0"}
    assert devices("cuda:1").each() == [{VISIBLE: "1"}]
    assert devices("cuda").variables() == {}
    assert devices("cpu").each() == [{VISIBLE: ""}] == [devices("cpu").variables()]


def test_gpus_are_counted_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 2)
    monkeypatch.setenv(VISIBLE, "GPU-5a, GPU-7b")
    assert devices("cuda:1").variables() == {VISIBLE: "GPU-7b"}
    assert devices("cuda").each() == [{VISIBLE: "GPU-5a"}, {VISIBLE: "GPU-7b"}]


def test_without_a_gpu_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 0)
    assert devices("auto").each() == [{}]
    with pytest.raises(DependencyError, match=r"there is no GPU 1 here \(found: 0\)"):
        devices("cuda:1").variables()


@pytest.mark.parametrize("libraries", ["forked", "new interpreter"])
def test_a_worker_gets_its_variables(
    libraries: str, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, from one fork server."""
    if libraries == "new interpreter":
        monkeypatch.setattr("quantool.runtime.children.can_fork", lambda: False)
    work = importlib.import_module("quantool_fake").stderr
    seen = [
        process.call(work, {}, log=tmp_path / "log", variables={VISIBLE: number})[VISIBLE]
        for number in ("1", "0")
    ]
    assert seen == ["1", "0"]


def test_a_gpu_that_is_full_or_gone_is_no_bug(plugin: Path, tmp_path: Path) -> None:
    work = importlib.import_module("quantool_fake").gpu_fault
    for said, expected in (
        ("out of memory", "the GPU's memory is full: CUDA out of memory. Tried to allocate 2 GiB"),
        ("gone", "the GPU failed: CUDA error: unspecified launch failure"),
    ):
        with pytest.raises(DependencyError) as raised:
            process.call(work, {"kind": said}, log=tmp_path / "log")
        assert raised.value.message == expected
        assert "a rerun goes on from there" in raised.value.hint
        assert "Traceback" in (tmp_path / "log").read_text()
    with pytest.raises(Exception, match="ended with exit code 1"):
        process.call(work, {"kind": "other"}, log=tmp_path / "log")


def test_where_engines_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 2)
    monkeypatch.setattr(builds, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(builds, "llama_cpp_has_cuda", lambda: True)
    assert builds.places("cuda") == {"torch": "on 2 GPUs", "llama.cpp": "on 2 GPUs"}
    assert builds.places("cuda:1") == {"torch": "on the GPU", "llama.cpp": "on the GPU"}
    assert "set device: cuda" in builds.places("auto")["llama.cpp"]
    assert builds.places("cpu") == dict.fromkeys(("torch", "llama.cpp"), "on the CPU, as device: cpu says")
    monkeypatch.setattr(builds, "llama_cpp_has_cuda", lambda: False)
    assert builds.places("cuda")["llama.cpp"].endswith("so the GPU idles; make setup CUDA=1")
    with pytest.raises(DependencyError, match="no GPU 2"):
        builds.places("cuda:2")
