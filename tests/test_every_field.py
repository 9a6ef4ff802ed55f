"""Every field of the configuration and every option of the methods: a key moves with it, or it is known to change nothing."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import adapters
import pytest
from pydantic import BaseModel

from quantool import gates
from quantool.config.cluster import Cluster
from quantool.config.schema import Config
from quantool.formats.safetensors import check_index
from quantool.methods import gguf
from quantool.methods._llama_cpp import dry_run
from quantool.plan.depends import depends_of
from quantool.plan.make import options_of
from quantool.plugins import find
from quantool.plugins.contract import Case, Check, Request
from quantool.records import Artifact, FileRecord, Gates, OutputPlan, Source, fingerprint
from quantool.run.judging import findings_key
from quantool.runtime.progress import Progress
from quantool.runtime.versions import version_of
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve

CHAT = Path(__file__).parent / "models" / "tiny-chat"
PATTERN = "re:.*down_proj$"
TEXT = {
    "cal.txt": "What was learned from.\n",
    "held.txt": "What is measured on.\n",
    "other.txt": "Other text.\n",
    "recipe.txt": "^blk\\.0\\.attn_q\\.weight$=q8_0\n",
}
QUANTIZATIONS: list[dict[str, Any]] = [
    {"method": "gguf", "quant_level": "Q4_K_M", "quantization_config": {"pre_tokenizer": "qwen2", "imatrix": True}},
    {"method": "fp16", "quant_level": "F16", "quantization_config": {"pre_tokenizer": "qwen2"}},
    {"method": "fp16", "quant_level": "BF16", "quantization_config": {"format": "safetensors"}},
    {"method": "awq", "quant_level": "W4A16", "quantization_config": {"group_size": 32}},
    {"method": "gptq", "quant_level": "W4A16", "quantization_config": {"group_size": 32, "smoothing_strength": 0.5}},
    {"method": "smoothquant", "quant_level": "W8A8"},
    {"method": "fp8", "quant_level": "FP8_DYNAMIC"},
]  # fmt: skip
BASELINE: dict[str, Any] = {
    "model_id": str(CHAT),
    "quantizations": QUANTIZATIONS,
    "dataset_path": "cal.txt",
    "validation": {"lm_eval": {"tasks": ["a"]}, "needle": {"haystack": "held.txt"}, "long": {}},
}
CORPORA = {"validation": {"corpora": [{"name": "a", "path": "held.txt"}, {"name": "b", "dataset": "o/d"}]}}
FLAT = {
    "quantizations": [],
    "method": "gguf",
    "quant_level": "Q4_K_M",
    "quantization_config": {"pre_tokenizer": "qwen2"},
}
DATA_SET = {"dataset_path": None, "dataset_id": "owner/set"}
MAPPINGS = [{"smooth_layer": "re:.*up_proj", "balance_layers": ["re:.*down_proj"]}]

SHARES = sorted(set(Gates.model_fields) - {"min_expert_tokens"})
"""Gates that may be 0.5."""
# Field: what it is changed to, and what must be set beside it for that to have a meaning.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model_id": ({"model_id": "renamed"}, {}),
    "tokenizer_name": ({"tokenizer_name": "tokenizer"}, {}),
    "adapter": ({"adapter": "adapter"}, {}),
    "merge": ({"merge": False}, {"adapter": "adapter"}),
    "trust_remote_code": ({"trust_remote_code": True}, {}),
    "drop": ({"drop": ["vision"]}, {}),
    "method": ({"method": "fp16", "quant_level": "F16"}, FLAT),
    "quant_level": ({"quant_level": "Q8_0"}, FLAT),
    "quantization_config": ({"quantization_config": {"pure": True, "pre_tokenizer": "qwen2"}}, FLAT),
    "quantizations": ({"quantizations": QUANTIZATIONS[:1]}, {}),
    "quantizations.method": ({"quantizations": [{"method": "fp16", "quant_level": "F16"}]}, {}),
    "quantizations.quant_level": ({"quantizations": [QUANTIZATIONS[0] | {"quant_level": "Q8_0"}]}, {}),
    "quantizations.quantization_config": ({"quantizations": [QUANTIZATIONS[3] | {"quantization_config": {"group_size": 64}}]}, {}),
    "dataset_id": ({"dataset_id": "owner/other"}, DATA_SET),
    "dataset_path": ({"dataset_path": "other.txt"}, {}),
    "dataset_config": ({"dataset_config": "small"}, DATA_SET),
    "split": ({"split": "test"}, DATA_SET),
    "sample_size": ({"sample_size": 7}, {}),
    "shuffle": ({"shuffle": False}, {}),
    "dataset_seed": ({"dataset_seed": 7}, {}),
    "calibration_config": ({"calibration_config": {"max_tokens": 1000}}, {}),
    "eval_dataset": ({"eval_dataset": "held.txt"}, {}),
    "seed": ({"seed": 7}, {}),
    "device": ({"device": "cpu"}, {}),
    "validation": (CORPORA, {}),
    "validation.corpora": (CORPORA, {}),
    **{
        f"validation.corpora.{name}": ({"validation": {"corpora": [first, second]}}, CORPORA)
        for name, first, second in (
            ("name", {"name": "c", "path": "held.txt"}, {"name": "b", "dataset": "o/d"}),
            ("path", {"name": "a", "path": "other.txt"}, {"name": "b", "dataset": "o/d"}),
            ("dataset", {"name": "a", "path": "held.txt"}, {"name": "b", "dataset": "o/e"}),
            ("config", {"name": "a", "path": "held.txt"}, {"name": "b", "dataset": "o/d", "config": "c"}),
            ("split", {"name": "a", "path": "held.txt"}, {"name": "b", "dataset": "o/d", "split": "test"}),
            ("field", {"name": "a", "path": "held.txt", "field": "body"}, {"name": "b", "dataset": "o/d"}),
            ("gates", {"name": "a", "path": "held.txt", "gates": {}}, {"name": "b", "dataset": "o/d"}),
            *(
                (f"gates.{name}", {"name": "a", "path": "held.txt", "gates": {name: 0.5}}, {"name": "b", "dataset": "o/d"})
                for name in SHARES
            ),
            ("gates.min_expert_tokens", {"name": "a", "path": "held.txt", "gates": {"min_expert_tokens": 8}}, {"name": "b", "dataset": "o/d"}),
        )
    },
    "validation.context": ({"validation": {"context": 256}}, {}),
    "validation.max_tokens": ({"validation": {"max_tokens": 4096}}, {}),
    "validation.conversations": ({"validation": {"conversations": "chat.jsonl"}}, {}),
    "validation.checks": ({"validation": {"checks": ["integrity"]}}, {}),
    "validation.generation": ({"validation": {"generation": {"top_k": 3}}}, {}),
    **{
        f"validation.generation.{name}": ({"validation": {"generation": {name: 1}}}, {"validation": {"generation": {}}})
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    },
    "validation.behaviour": ({"validation": {"behaviour": {"max_new_tokens": 9}}}, {}),
    "validation.behaviour.prompts": ({"validation": {"behaviour": {"prompts": "chat.jsonl"}}}, {}),
    "validation.behaviour.max_new_tokens": ({"validation": {"behaviour": {"max_new_tokens": 9}}}, {}),
    "validation.lm_eval": ({"validation": {"lm_eval": None}}, {}),
    "validation.lm_eval.tasks": ({"validation": {"lm_eval": {"tasks": ["b"]}}}, {}),
    "validation.lm_eval.include_path": ({"validation": {"lm_eval": {"include_path": "tasks"}}}, {}),
    "validation.lm_eval.num_fewshot": ({"validation": {"lm_eval": {"num_fewshot": 2}}}, {}),
    "validation.lm_eval.limit": ({"validation": {"lm_eval": {"limit": 99}}}, {}),
    "validation.lm_eval.max_drop": ({"validation": {"lm_eval": {"max_drop": 0.5}}}, {}),
    "validation.lm_eval.apply_chat_template": ({"validation": {"lm_eval": {"apply_chat_template": False}}}, {}),
    "validation.lm_eval.fewshot_as_multiturn": ({"validation": {"lm_eval": {"fewshot_as_multiturn": False}}}, {}),
    "validation.needle": ({"validation": {"needle": None}}, {}),
    "validation.needle.lengths": ({"validation": {"needle": {"lengths": [200]}}}, {}),
    "validation.needle.depths": ({"validation": {"needle": {"depths": [0.5]}}}, {}),
    "validation.long": ({"validation": {"long": None}}, {}),
    "validation.long.lengths": ({"validation": {"long": {"lengths": [1024]}}}, {}),
    "validation.long.kv": ({"validation": {"long": {"kv": ["q5_0"]}}}, {}),
    "validation.long.windows": ({"validation": {"long": {"windows": 2}}}, {}),
    "validation.long.max_cache_kld": ({"validation": {"long": {"max_cache_kld": 0.5}}}, {}),
    "validation.long.needle": ({"validation": {"long": {"needle": False}}}, {}),
    "validation.needle.haystack": ({"validation": {"needle": {"haystack": "other.txt"}}}, {}),
    "validation.gates": ({"validation": {"gates": {"F16": {"max_mean_kld": 0.5}}}}, {}),
    **{
        f"validation.gates.{name}": ({"validation": {"gates": {"*": {name: 0.5}}}}, {})
        for name in SHARES
    },
    "validation.gates.min_expert_tokens": ({"validation": {"gates": {"*": {"min_expert_tokens": 8}}}}, {}),
}  # fmt: skip

CHANGE_NO_BYTE_AND_NO_VERDICT = {
    "revision", "adapter_revision",  # of a Hub id; the commit that it leads to is in every key (Source.identity)
    "cache_dir", "dataset_cache_dir",  # where downloads lie
    "output_path",  # an output folder may be moved
    "push_to_hub", "repo_id", "private", "disk_bounded", "quantizations.repo_id",  # where files go, and when
    "publish", "publish.mode", "publish.revision", "publish.tag", "publish.collection", "publish.commit_message",
    "publish.connect_timeout", "publish.read_timeout",
    "card", "card.template",  # the card is written anew at every run
    "sign", "sign.key", "sign.keyless",  # so is the signature
}  # fmt: skip

HEADS_AND_EXPERTS = {"mtp": "quantize", "calibrate_all_experts": False, "fit": {"bpw": 14.0}}
OPTIONS: dict[str, dict[str, Any]] = {
    "gguf": {
        "base_type": "f32", "imatrix": False, "tensor_types": {"ffn_down": "q8_0"}, "output_tensor_type": "q6_K",
        "token_embedding_type": "q6_K", "pure": True, "leave_output_tensor": True, "keep_split": True,
        "allow_requantize": True, "pre_tokenizer": "llama-bpe", "add_space_prefix": True, "model_name": "other",
        "max_shard_size": "1M", "llama_cpp_path": "checkout", "mtp_type": "q5_0", "fit": [{"recipe": "recipe.txt"}],
    },
    "fp16": {
        "format": "safetensors", "pre_tokenizer": "llama-bpe", "add_space_prefix": True, "model_name": "other",
        "max_shard_size": "1M", "llama_cpp_path": "checkout",
    },
    "awq": {
        "targets": [PATTERN], "ignore": [PATTERN, "lm_head"], "mappings": MAPPINGS, "group_size": 64,
        "duo_scaling": True, "n_grid": 5, "format": "autoawq", **HEADS_AND_EXPERTS,
    },
    "gptq": {
        "targets": [PATTERN], "ignore": [PATTERN, "lm_head"], "group_size": 64, "block_size": 64,
        "dampening_frac": 0.1, "smoothing_strength": 0.6, "mappings": MAPPINGS,
        **HEADS_AND_EXPERTS,
    },
    "smoothquant": {
        "targets": [PATTERN], "ignore": [PATTERN, "lm_head"], "smoothing_strength": 0.6, "mappings": MAPPINGS,
        **HEADS_AND_EXPERTS,
    },
    "fp8": {"targets": [PATTERN], "ignore": [PATTERN, "lm_head"], "kv_cache": "fp8", **HEADS_AND_EXPERTS},
}  # fmt: skip
BESIDE = {("fp8", "calibrate_all_experts"): {"kv_cache": "fp8"}}
"""What an option needs beside it to have a meaning."""
OPTIONS_THAT_CHANGE_NO_BYTE = {("gguf", "threads"), ("fp8", "workers")}


def dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field of a configuration model and of those below it."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner in models(field.annotation):
            yield from dotted(inner, f"{prefix}{name}.")


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, tuple, dict):
        for part in get_args(annotation):
            yield from models(part)


CHANGE_NO_BYTE_AND_NO_VERDICT |= {"cluster", *dotted(Cluster, "cluster.")}  # where stages are done
FIELDS = tuple(dict.fromkeys(dotted(Config)))


class Noting(Workspace):
    """Notes what it is asked for, by stage; knows the calibration ids of any text."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.keys: dict[str, str] = {}

    def recall(self, name: str, key: str) -> dict[str, Any] | None:
        self.keys[name] = key
        return {"sha256": key} if name == "imatrix-ids" else None


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, the checkpoint under another name, its tokenizer with a change, a converter with a change."""
    from quantool.runtime import toolchain

    folder = tmp_path_factory.mktemp("fields")
    for name, text in TEXT.items():
        (folder / name).write_text(text)
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text("task: own\n")
    for name in ("renamed", "tokenizer"):
        shutil.copytree(CHAT, folder / name)
    queries = [name for name in check_index(CHAT) if name.endswith("q_proj.weight")]
    adapters.write(
        folder / "adapter", dict.fromkeys(queries, (256, 256)), base_model_name_or_path="tiny-chat"
    )
    settings = json.loads((CHAT / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | {"changed": True}))
    shutil.copytree(toolchain.locate().folder, folder / "checkout")
    with (folder / "checkout" / toolchain.CONVERTER).open("a") as converter:
        converter.write("# changed\n")
    return folder


@pytest.fixture(autouse=True)
def one_rehearsal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter is not run for every change: sizes are no part of this."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(dry_run, "rehearse", lambda *_: rehearsal())
    monkeypatch.setattr(gguf, "_validate_names", lambda *_: None)
    types = {name: tensor.type for name, tensor in rehearsal().tensors.items()}
    run = {"types": types, "needs_imatrix": False}
    monkeypatch.setattr(gguf, "dry_runs", lambda _rehearsal, levelled, **_: [run] * len(levelled))


@cache
def rehearsal(real: Any = dry_run.rehearse) -> dry_run.Rehearsal:
    found = real(source_of(str(CHAT), None, trusted=False), gguf.Options(pre_tokenizer="qwen2"), "f16")
    assert isinstance(found, dry_run.Rehearsal)
    return found


@cache
def source_of(
    model: str, tokenizer: str | None, adapter: str | None = None, *, merge: bool = True, trusted: bool
) -> Source:
    """The source with its weights hashed; kept, because every change of a field asks for it."""
    config = Config(
        model_id=model, tokenizer_name=tokenizer, adapter=adapter, merge=merge, trust_remote_code=trusted
    )
    source = resolve(config, weights=False, progress=Progress(quiet=True))
    weights = fingerprint(source.prepared and source.prepared.identity())
    files = tuple(file.model_copy(update={"sha256": file.sha256 or weights}) for file in source.files)
    return source.model_copy(update={"files": files, "max_abs": 1.0})


def merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``, table by table; options and gates whole."""
    found = copy.deepcopy(lower)
    for name, value in upper.items():
        deeper = (
            isinstance(value, dict) and isinstance(found.get(name), dict) and name != "quantization_config"
        )
        found[name] = merged(found[name], value) if deeper else value
    return found


def keys(settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """The keys of every artifact, of what they share, and of every check on one artifact of each engine."""
    config = Config.model_validate(settings)
    named = (config.model_id, config.tokenizer_name, config.adapter)
    source = source_of(*named, merge=config.merge, trusted=config.trust_remote_code)
    workspace = Noting(folder / "out")
    for wanted in config.requested():
        method = find.find_method(wanted.method)
        limits = partial(gates.resolve, configured=config.validation.gates)
        request = Request(
            config, source, tuple(wanted.levels()), wanted.repo_id, workspace, limits, depends_of(method)
        )
        for output in method.outline(request, options_of(wanted, method)).outputs:
            if output.level == "Q4_K_M" or output.method == "fp8":
                workspace.keys |= judged(config, source, output, workspace)
    return workspace.keys


def judged(config: Config, source: Source, output: OutputPlan, workspace: Workspace) -> dict[str, str]:
    file = FileRecord(name="model", bytes=1, sha256="1" * 64)
    artifact = Artifact(
        output=output.id, method=output.method, level=output.level, folder=workspace.root, files=(file,),
        bits_per_weight=4, seconds=0, made_from="base.gguf",
    )  # fmt: skip
    case = Case(
        workspace.root / "model", output.engine, output.id, source, config, output.gates, workspace, output
    )
    names = config.validation.checks or checks()
    return {f"{name} of {output.id}": findings_key(checks()[name], case, artifact) for name in names}


@cache
def checks() -> dict[str, Check]:
    return {name: find.find_check(name) for name in find.names("checks")}


@cache
def unchanged(settings: str, folder: Path) -> dict[str, str]:
    return keys(json.loads(settings), folder)


def test_every_field_stands_on_one_list() -> None:
    assert set(FIELDS) - CHANGES.keys() == CHANGE_NO_BYTE_AND_NO_VERDICT
    for method, changes in OPTIONS.items():
        still = {option for name, option in OPTIONS_THAT_CHANGE_NO_BYTE if name == method}
        assert changes.keys() == set(find.find_method(method).options.model_fields) - still, method
    assert OPTIONS.keys() == set(find.names("methods"))


@pytest.mark.parametrize("field", CHANGES)
def test_a_key_moves_with_every_field(field: str, here: Path) -> None:
    change, beside = CHANGES[field]
    settings = merged(BASELINE, beside)
    before = unchanged(json.dumps(settings), here)
    assert keys(merged(settings, change), here) != before


@pytest.mark.parametrize(
    ("method", "option"), [(method, option) for method, changes in OPTIONS.items() for option in changes]
)
def test_a_key_moves_with_every_option(method: str, option: str, here: Path) -> None:
    wanted = next(entry for entry in QUANTIZATIONS if entry["method"] == method)
    options = wanted.get("quantization_config", {}) | BESIDE.get((method, option), {})
    before = unchanged(
        json.dumps(BASELINE | {"quantizations": [wanted | {"quantization_config": options}]}), here
    )
    changed = wanted | {"quantization_config": options | {option: OPTIONS[method][option]}}
    after = keys(BASELINE | {"quantizations": [changed]}, here)
    own = {name: key for name, key in after.items() if " of " not in name}
    assert {name: before.get(name) for name in own} != own


@pytest.mark.parametrize(("method", "option"), sorted(OPTIONS_THAT_CHANGE_NO_BYTE))
def test_no_work_is_lost_by_an_option_that_changes_no_byte(method: str, option: str, here: Path) -> None:
    wanted = next(entry for entry in QUANTIZATIONS if entry["method"] == method)
    options = wanted.get("quantization_config", {})
    before = unchanged(json.dumps(BASELINE | {"quantizations": [wanted]}), here)
    changed = wanted | {"quantization_config": options | {option: 2}}
    after = keys(BASELINE | {"quantizations": [changed]}, here)
    assert {name for name, key in after.items() if before[name] != key} <= {f"integrity of {method}/Q4_K_M", "integrity of fp8/FP8_DYNAMIC"}  # fmt: skip


@pytest.mark.parametrize(
    "field", ["output_path", "push_to_hub", "private", "card", "publish", "cache_dir", "dataset_cache_dir"]
)
def test_no_work_is_lost_by_a_field_that_changes_nothing(field: str, here: Path) -> None:
    values = {"card": {"template": "t"}, "publish": {"tag": "t"}, "push_to_hub": True, "private": False}
    before = unchanged(json.dumps(BASELINE), here)
    assert keys(BASELINE | {field: values.get(field, "elsewhere")}, here) == before


# --- T1, T11 and their like: each of these was a stale verdict, or lost scores


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name, key in after.items() if before.get(name) != key}


def test_calibration_text_that_becomes_the_held_out_text_is_seen_by_the_check_of_overlap(here: Path) -> None:
    """T1, both ways: a level without calibration is not made again, its overlap is judged again."""
    text = {"corpora": [{"name": "a", "path": "held.txt"}]}
    first, second = (
        keys(BASELINE | {"dataset_path": path, "validation": text}, here) for path in ("cal.txt", "held.txt")
    )
    changed = moved(first, second)
    assert "overlap of fp8/FP8_DYNAMIC" in changed
    assert not {"fp8/FP8_DYNAMIC", "perplexity of fp8/FP8_DYNAMIC", "tokenizer of gguf/Q4_K_M"} & changed


def test_the_seed_is_seen_by_the_check_that_draws(here: Path) -> None:
    before = unchanged(json.dumps(BASELINE), here)
    changed = moved(before, keys(BASELINE | {"seed": 7}, here))
    assert {"needle of gguf/Q4_K_M", "awq/W4A16"} <= changed
    assert not {"perplexity of gguf/Q4_K_M", "gguf/Q4_K_M"} & changed


def test_a_gate_of_another_level_changes_nothing(here: Path) -> None:
    before = unchanged(json.dumps(BASELINE), here)
    settings = merged(BASELINE, {"validation": {"gates": {"FP8_DYNAMIC": {"max_mean_kld": 0.5}}}})
    changed = moved(before, keys(settings, here))
    gated = ("perplexity", "behaviour", "classification", "embedding", "experts", "long")
    assert changed == {f"{check} of fp8/FP8_DYNAMIC" for check in gated}


@pytest.mark.parametrize(
    ("library", "engine", "expected"),
    [
        ("vllm", "vllm", {"perplexity", "behaviour", "needle"}),
        ("llama-cpp-python", "llama.cpp", {"perplexity", "chat_template", "integrity"}),
        ("compressed-tensors", "transformers", {"perplexity", "behaviour"}),
        ("quantool", "llama.cpp", {"serving", "overlap", "generation"}),
    ],
)
def test_a_new_version_of_what_computes_is_seen(
    library: str, engine: str, expected: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def found() -> dict[str, str]:
        source = source_of(str(CHAT), None, trusted=False)
        config = Config.model_validate(BASELINE)
        workspace = Workspace(tmp_path)
        case = Case(tmp_path, engine, "a/b", source, config, gates.default_gates("Q8_0"), workspace)
        artifact = Artifact(
            output="a/b", method="a", level="b", folder=tmp_path, files=(), bits_per_weight=4, seconds=0
        )
        return {name: findings_key(check, case, artifact) for name, check in checks().items()}

    before = found()
    monkeypatch.setattr(
        "quantool.plugins.keys.version_of", lambda name: "9.9" if name == library else version_of(name)
    )
    changed = moved(before, found())
    assert expected <= changed
    assert library == "quantool" or "overlap" not in changed, changed


def test_another_external_server_is_seen(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = here / "bin" / "llama-server"
    binary.parent.mkdir(exist_ok=True)
    seen = []
    for text in ("one", "another"):
        binary.write_text(text)
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", str(binary.parent))
        seen.append(keys(BASELINE, here))
    outputs = ("gguf/Q4_K_M", "fp8/FP8_DYNAMIC")
    assert moved(*seen) == {
        f"{check} of {output}" for check in ("chat_template", "ollama") for output in outputs
    }


def test_packing_does_not_lose_what_was_measured(tmp_path: Path) -> None:
    """T11: the card, the record, the sums and the pictures beside an artifact are no part of it."""
    from quantool.validation._cache.keys import ANSWERS, artifact_key

    weights = FileRecord(name="model.safetensors", bytes=1, sha256="1" * 64)
    packed = [FileRecord(name=n, bytes=1, sha256="2" * 64) for n in ("README.md", "quantool.json", "SHA256SUMS", "plots/a.png")]  # fmt: skip
    source, config = source_of(str(CHAT), None, trusted=False), Config.model_validate(BASELINE)

    def found(*files: FileRecord) -> str:
        limits, workspace = gates.default_gates("FP8"), Workspace(tmp_path)
        case = Case(tmp_path, "transformers", "a/b", source, config, limits, workspace, files=files)
        return artifact_key(case, ANSWERS, "x")

    assert found(weights) == found(weights, *packed)
    assert found(weights) != found(weights.model_copy(update={"sha256": "3" * 64}))
