from pathlib import Path

import pytest

from quantool import doctor
from quantool.runtime import toolchain


def test_facts_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    found = doctor.examine()
    assert list(found)[:2] == ["python", "quantool"]
    assert list(found)[-1] == "hub token"
    assert {*doctor.TOOLS, "converter", "accelerator", "memory", "disk here", "cache"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_whether_there_is_a_token_and_from_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert doctor.examine()["hub token"].startswith("none (only publishing")
    (tmp_path / "token").write_text("hf_secretsecret")
    assert doctor.examine()["hub token"] == "present (login)"
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert doctor.examine()["hub token"] == "present (HF_TOKEN)"


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_CPP_PATH", raising=False)
    monkeypatch.setattr(doctor, "find_spec", lambda _name: None)
    found = doctor.examine()
    assert found["converter"].startswith("missing: run `quantool toolchain install`")
    assert found["llama-server"] == "not found (optional: chat templates are then rendered by xllamacpp)"
    assert found["chat template engine"] == "missing: pip install xllamacpp"
    assert found["cache"] == str(tmp_path / "quantool")


def test_the_server_is_preferred_for_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "upstream_tool", lambda name: Path("/opt") / name)
    found = doctor.examine()
    assert found["chat template engine"] == found["llama-server"] == "/opt/llama-server"


def test_accelerators_as_the_driver_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "Path", lambda *parts: tmp_path if parts == ("/proc/driver/nvidia/gpus",) else Path(*parts)
    )
    assert doctor._accelerator() == "none"
    for number in ("0000:02:00.0", "0000:01:00.0"):
        (tmp_path / number).mkdir()
        text = f"Model: \t\t NVIDIA H{number[6]}00\nIRQ:   \t\t 1\n"
        (tmp_path / number / "information").write_text(text)
    assert doctor._accelerator() == "NVIDIA H100, NVIDIA H200"
