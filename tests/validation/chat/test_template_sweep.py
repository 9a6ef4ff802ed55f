"""Every chat template in llama.cpp's source tree, rendered by transformers and by llama-server.

What differs is listed with its cause, so that a new llama.cpp shows what it changed. The templates come from the source
package (or the checkout) that llama-server was built from.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, cast

import making
import pytest
from tampering import folder_of, gguf_of, tampered

from quantool.records import Finding, Verdict
from quantool.runtime.toolchain import cache_folder, installed_version
from quantool.runtime.worker import Report
from quantool.validation._chat import llama_server
from quantool.validation._chat.agreement import judge_caps, judge_continued, judge_text
from quantool.validation._chat.causes import CAUSES
from quantool.validation._chat.conversations import Conversation, suite
from quantool.validation._chat.renderings import Renderings
from quantool.validation._engines import hf_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.upstream]

FOLDER = "models/templates"
BASE = "spm_llama"  # its tokenizer has a BOS and adds it, which is the harder case

QUIET = cast("Report", max)  # does nothing and can be sent to another process

DIFFERS = {
    "Apriel-1.6-15b-Thinker-fixed": "value_to_string_repr",
    "unsloth-Apriel-1.5": "value_to_string_repr",
    "StepFun3.5-Flash": "trim_all_content",
    "google-gemma-4-31B-it-interleaved": "convert_tool_responses_gemma4",
    "meetkai-functionary-medium-v3.1": "value_string_t::get_builtins",
    "openbmb-MiniCPM5-1B": "gather_string_parts_recursive",
}
"""Templates of which llama.cpp makes another text, with the function that does it."""

NOTED = {
    "llama-cpp-rwkv-world": "common_chat_template_direct_apply_impl",
    "upstage-Solar-Open-100B": "common_chat_template_direct_apply_impl",
    "openai-gpt-oss-120b": "common_chat_params_init_gpt_oss",
}
"""Those that differ only where no generation prompt is asked for."""

UNRENDERED = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "TypeError: 'NoneType' object is not iterable",  # wants tools, flat
    "fireworks-ai-llama-3-firefunction-v2": "UndefinedError: 'functions' is undefined",
}
"""Those with which transformers renders none of the conversations."""


@dataclass(frozen=True)
class Swept:
    """One template on both sides."""

    stored: str
    both: Renderings
    answered: dict[str, Any]

    def judged(self) -> Finding:
        return judge_text(self.both, "rendered_text", self.stored)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of llama.cpp's templates."""
    if checkout := os.environ.get("LLAMA_CPP_PATH"):
        return Path(checkout) / FOLDER
    package = cache_folder() / "sdist" / f"llama_cpp_python-{installed_version()}.tar.gz"
    if not package.is_file():
        pytest.skip(f"{package} is not there (make tools)")
    folder = tmp_path_factory.mktemp("templates")
    with tarfile.open(package, "r|gz") as members:
        for member in members:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            content = members.extractfile(member) if path.suffix == ".jinja" else None
            if content is not None and path.is_relative_to(f"vendor/llama.cpp/{FOLDER}"):
                (folder / path.name).write_bytes(content.read())
    return folder


@pytest.fixture(scope="module")
def swept(templates: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Swept]:
    """All templates by name, rendered; a worker for each, which loads transformers, would take minutes."""
    binary = str(making.upstream("llama-server"))
    room = tmp_path_factory.mktemp("sweep")
    shutil.copytree(folder_of(BASE), room / "hf")
    begun = {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for path in sorted(templates.glob("*.jinja")):
            text = path.read_text(encoding="utf-8")
            (room / "hf" / "chat_template.jinja").write_text(text, encoding="utf-8")
            chats = suite(text)
            asked = {"conversations": [one.request() for one in chats]}
            reference = hf_tokenizer.render(
                {"folder": str(room / "hf"), "trust_remote_code": False} | asked, QUIET
            )
            stored = reference["facts"]["templates"]["default"]
            model = tampered(gguf_of(BASE), room / f"{path.stem}.gguf", {"tokenizer.chat_template": stored})
            bodies = [llama_server._body(one) for one in chats]
            wanted = {"binary": binary, "model": str(model), "bodies": bodies}
            begun[path.stem] = (
                model,
                stored,
                chats,
                reference,
                pool.submit(llama_server.answer, wanted, QUIET),
            )
        found = {}
        for name, (model, stored, chats, reference, answered) in begun.items():
            found[name] = swept_of(stored, chats, reference, answered.result())
            model.unlink()
    return found


def swept_of(
    stored: str, chats: tuple[Conversation, ...], reference: dict[str, Any], answered: dict[str, Any]
) -> Swept:
    typed = answered["caps"]["supports_typed_content"]
    both = Renderings(chats, reference, answered["answers"], "llama-server", native=True, typed_content=typed)
    return Swept(stored, both, answered)


def test_all_templates_are_there(swept: dict[str, Swept]) -> None:
    assert len(swept) >= 70
    assert {*DIFFERS, *NOTED, *UNRENDERED} <= swept.keys()


def test_what_differs_is_known_with_its_cause(swept: dict[str, Swept]) -> None:
    judged = {name: one.judged() for name, one in swept.items()}
    differing = {name: one for name, one in judged.items() if one.verdict == Verdict.REGRESSION}
    assert differing.keys() == DIFFERS.keys()
    for name, function in DIFFERS.items():
        assert function in differing[name].detail, f"{name}: {differing[name].detail}"
    skipped = {name: one.detail for name, one in judged.items() if one.verdict == Verdict.SKIPPED}
    assert skipped.keys() == UNRENDERED.keys()
    for name, error in UNRENDERED.items():
        assert error in skipped[name]
    noted = {name: one.detail for name, one in judged.items() if "without a generation prompt" in one.detail}
    assert noted.keys() - DIFFERS.keys() == NOTED.keys()
    for name, function in NOTED.items():
        assert function in noted[name]


def test_every_cause_is_that_of_a_template() -> None:
    seen = {*DIFFERS.values(), *NOTED.values()}
    assert all(any(function in one.reason for function in seen) for one in CAUSES)


def test_continued_answers_are_the_servers_own_way_only(swept: dict[str, Swept]) -> None:
    found = {name: judge_continued(one.both, one.stored, one.stored) for name, one in swept.items()}
    failed = {name: one.detail for name, one in found.items() if one.verdict == Verdict.REGRESSION}
    assert not failed
    passed = {name for name, one in found.items() if one.verdict == Verdict.PASS}
    assert {"Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.3-70B-Instruct", "google-gemma-2-2b-it"} <= passed
    assert "Qwen-Qwen3-0.6B" in passed
    assert "does not cut an answer out" in found["ByteDance-Seed-OSS"].detail


def test_capabilities_are_what_the_templates_show(swept: dict[str, Swept]) -> None:
    for name, one in swept.items():
        found = judge_caps(one.both, one.answered, tools=True, stored=one.stored)
        assert found.verdict == (Verdict.SKIPPED if name in UNRENDERED else Verdict.PASS), (
            f"{name}: {found.detail}"
        )
