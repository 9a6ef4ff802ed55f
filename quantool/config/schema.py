"""The configuration: flat keys as langtech-bsc/quantool 0.2.0 has them, ``quantizations`` and ``validation`` beside.

``load`` in the file of that name reads it from YAML.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from quantool.config import rules
from quantool.config.cluster import Cluster
from quantool.config.section import Section
from quantool.config.served import Long, Sampling
from quantool.record import NameOrPath, Privacy
from quantool.records import Gates
from quantool.runtime import gpus

NO_EFFECT = {
    "load_in_pipeline": "the calibration text is always prepared by quantool",
    "preprocess_fn": "conversations are rendered through the model's own chat template",
    "enable_evaluation": "every artifact is judged; see validation",
    "metrics": "perplexity, divergence, tokenizer and chat template are always judged; see validation",
    "report_to": "the report is written as JSON beside the artifacts",
    "experiment_name": "the report is written as JSON beside the artifacts",
    "save_logs": "logs of the outside tools are always kept in OUTPUT/logs",
    "log_dir": "logs of the outside tools are always kept in OUTPUT/logs",
    "log_level": "use --quiet",
    "verbose": "use --quiet",
    "use_auth_token": "the token of HF_TOKEN or of `hf auth login` is used",
}
"""Keys of 0.2.0 that are accepted and do nothing any more, with the reason that the warning gives.

``load`` leaves them out: no record has them, and ``use_auth_token`` could be a secret.
"""


REPO_ID = r"^([A-Za-z0-9_][A-Za-z0-9_.-]*/)?[A-Za-z0-9_][A-Za-z0-9_.-]*$|^$"
"""A Hub repository. Its name is a folder of the output as well, so it must not lead anywhere else."""


def _at_home(path: Path) -> Path:
    """``~/texts`` as a shell reads it; YAML is read by no shell."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error} ({path})") from error


def _device(value: str) -> str:
    if not re.fullmatch(gpus.PATTERN, value):
        raise PydanticCustomError("literal_error", "no such device", {"expected": gpus.NAMES})
    return value


UserPath = Annotated[Path, AfterValidator(_at_home)]


MAX_SEED = 1 << 32  # what numpy takes


class Corpus(Section):
    """One text to measure on, or to calibrate with."""

    name: str = Field(description="Name in reports and tables, e.g. the language.", pattern=r"^[\w.-]+$")
    path: UserPath | None = Field(default=None, description="A .txt, .jsonl or .parquet file.")
    dataset: str | None = Field(default=None, description="A `datasets` id, used when path is not given.")
    config: str | None = Field(default=None, description="Configuration of the data set.")
    split: str = Field(default="train", description="Split of the data set.")
    field: str | None = Field(default=None, description="Column with the text; default: text, then messages.")
    gates: Gates | None = Field(
        default=None, description="Gates for this corpus alone, over the level's, at every level."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Corpus:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(rules.ONE_ORIGIN)
        return self


class Behaviour(Section):
    """Greedy answers of artifact and reference."""

    prompts: UserPath | None = Field(
        default=None,
        description="A .jsonl of conversations (messages, tools) to answer beside the built-in ones; an answer at the "
        "end is left out.",
    )
    max_new_tokens: int = Field(default=48, ge=1, description="Tokens an answer may have.")


class LmEval(Section):
    """Tasks of EleutherAI's lm-eval, by reference and artifact on the same documents."""

    tasks: tuple[str, ...] = Field(min_length=1, description="Names of tasks or groups.")
    include_path: UserPath | None = Field(default=None, description="Folder with task files of your own.")
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples before each question.")
    limit: int | None = Field(default=None, ge=1, description="Documents of each task; default: all.")
    apply_chat_template: bool | None = Field(
        default=None,
        description="Ask through the model's chat template. Default: where it has one, which makes it an instruct model.",
    )
    fewshot_as_multiturn: bool = Field(
        default=True, description="With the template, each example before a question is a turn of its own."
    )
    max_drop: float = Field(
        default=0.02, ge=0, le=1, description="Accuracy that may be lost beyond what chance explains."
    )


class Needle(Section):
    """A sentence hidden in long text and asked for in chat form."""

    lengths: tuple[Annotated[int, Field(ge=128)], ...] = Field(
        default=(1024, 4096), min_length=1, description="Tokens of text, question and answer together."
    )
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="Where the sentence stands, 0 to 1."
    )
    haystack: UserPath | None = Field(
        default=None, description="A .txt, .jsonl or .parquet to hide it in; default: the first corpus."
    )


class Validation(Section):
    """How artifacts are judged."""

    corpora: tuple[Corpus, ...] = Field(
        default=(), description="Held-out text. Default: the docstrings of Python's standard library."
    )
    context: int = Field(
        default=rules.CONTEXT, ge=16, description="Tokens a window; the second half of each is scored."
    )
    max_tokens: int = Field(default=rules.MAX_TOKENS, ge=32, description="Token budget for each corpus.")
    conversations: UserPath | None = Field(
        default=None,
        description="A .jsonl of conversations (messages, tools) to render beside the built-in ones.",
    )
    checks: tuple[str, ...] | None = Field(
        default=None, description="Names of the checks to run. Default: all."
    )
    generation: Sampling | None = Field(
        default=None, description="Recommended sampling, over that of generation_config.json."
    )
    behaviour: Behaviour = Field(default_factory=Behaviour, description="Greedy answers.")
    lm_eval: LmEval | None = Field(default=None, description="Tasks of lm-eval. Default: none.")
    needle: Needle | None = Field(default=None, description="Retrieval from long text. Default: not tried.")
    long: Long | None = Field(
        default=None, description="Long windows with each type of attention cache. Default: not tried."
    )
    gates: dict[str, Gates] = Field(
        default={},
        description="Gates by level, over the defaults; the level '*' stands for all others. "
        "null switches a gate off.",
    )


class Calibration(Section):
    """The keys of ``calibration_config``."""

    max_tokens: int | None = Field(default=None, ge=1, description="Token budget of the calibration text.")
    max_seq_length: int | None = Field(default=None, ge=1, description="Tokens a calibration sample.")
    text_field: str | None = Field(
        default=None, description="Column with the text; default: text, then messages."
    )


class Quantization(Section):
    """One method of a run with several."""

    method: str = Field(description="Name of the method; `quantool methods` lists them.")
    quant_level: Annotated[str | list[str] | None, Field(description="One level or a list of them.")] = None
    quantization_config: dict[str, JsonValue] = Field(default={}, description="Options of the method.")
    repo_id: str | None = Field(
        default=None, pattern=REPO_ID, description="Hub repository that this method's artifacts go to."
    )

    def levels(self) -> list[str]:
        """List the levels."""
        if self.quant_level is None:
            return []
        return [self.quant_level] if isinstance(self.quant_level, str) else self.quant_level


class Publish(Section):
    """How artifacts reach the Hub."""

    mode: Literal["commit", "pull_request"] = Field(
        default="commit", description="One commit on the branch, or a pull request against it."
    )
    revision: str = Field(default="main", min_length=1, description="The branch; made when it is missing.")
    tag: str | None = Field(
        default=None, min_length=1, description="Tag of the commit, set once it is verified."
    )
    collection: str | None = Field(
        default=None, min_length=1, description="Slug of a collection that the repository is added to."
    )
    commit_message: str | None = Field(default=None, min_length=1, description="Default: the levels.")
    connect_timeout: float = Field(
        default=10, gt=0, le=3600, description="Seconds to wait for a connection to the Hub."
    )
    read_timeout: float = Field(
        default=60,
        gt=0,
        le=3600,
        description="Seconds that the Hub may be silent before the push is given up.",
    )


class CardSettings(Section):
    """The model card."""

    template: UserPath | None = Field(
        default=None, description="A Jinja template that replaces the built-in card; run in a sandbox."
    )


class Sign(Section):
    """Whose signature the folders to publish get (OpenSSF model-signing)."""

    key: UserPath | None = Field(
        default=None,
        description="Private elliptic curve key in PEM; the password of an encrypted one is QUANTOOL_SIGN_PASSWORD.",
    )
    keyless: bool = Field(
        default=False, description="Sign with sigstore, as the identity that the CI's OIDC token states."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Sign:
        if (self.key is None) != self.keyless:
            raise ValueError("give a key, or keyless: true")
        return self


class Config(Section):
    """All keys of a configuration file."""

    model_id: NameOrPath = Field(
        description="Hub id or local folder of the checkpoint, or of a PEFT adapter that names its base.",
        min_length=1,
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    tokenizer_name: NameOrPath | None = Field(
        default=None, description="Folder or Hub id of the tokenizer, if not the model's own."
    )
    adapter: NameOrPath | None = Field(
        default=None,
        description="Folder or Hub id of a PEFT LoRA adapter to merge into model_id first.",
        min_length=1,
    )
    adapter_revision: str | None = Field(
        default=None, description="Branch, tag or commit of the adapter on the Hub."
    )
    merge: bool = Field(
        default=True,
        description="Whether the adapter is merged into the weights; false: gguf makes it a file beside those of its base.",
    )
    cache_dir: UserPath | None = Field(
        default=None, description="Where Hub downloads are kept; default HF_HOME."
    )
    trust_remote_code: bool = Field(
        default=False, description="Allow the checkpoint's own Python code to run."
    )
    drop: tuple[Literal["vision", "audio", "speech", "mtp"], ...] = Field(
        default=(),
        description="Parts of the checkpoint to leave out on purpose: the rest is what is published.",
    )

    method: str | None = Field(default=None, description="Name of the method; `quantool methods` lists them.")
    quant_level: Annotated[str | list[str] | None, Field(description="One level or a list of them.")] = None
    quantization_config: dict[str, JsonValue] | None = Field(
        default=None, description="Options of the method."
    )
    quantizations: tuple[Quantization, ...] = Field(
        default=(), description="Several methods in one run, sharing source and reference; instead of method."
    )

    dataset_id: str | None = Field(default=None, description="Calibration text: a `datasets` id.")
    dataset_path: UserPath | None = Field(
        default=None, description="Calibration text: a .txt, .jsonl or .parquet file."
    )
    dataset_config: str | None = Field(default=None, description="Configuration of the data set.")
    split: str = Field(default="train", description="Split of the data set.")
    dataset_cache_dir: UserPath | None = Field(
        default=None, description="Where `datasets` keeps its downloads."
    )
    sample_size: int = Field(default=512, ge=1, description="Calibration documents to use.")
    shuffle: bool = Field(
        default=True, description="Shuffle the calibration documents before taking the first ones."
    )
    dataset_seed: int = Field(default=42, ge=0, lt=MAX_SEED, description="Seed of that shuffle.")
    calibration_config: dict[str, JsonValue] | None = Field(
        default=None,
        description="Further calibration settings: max_tokens, max_seq_length, text_field.",
    )

    output_path: Annotated[UserPath, Privacy.DROPPED] = Field(
        default=Path("output"), description="Folder for everything a run makes."
    )
    push_to_hub: Annotated[bool, Privacy.DROPPED] = Field(
        default=False, description="Publish what passed its gates."
    )
    repo_id: str | None = Field(
        default=None,
        pattern=REPO_ID,
        description="Hub repository to publish to; an entry of quantizations may name its own.",
    )
    private: bool = Field(default=True, description="Create that repository as private.")
    publish: Publish = Field(default_factory=Publish, description="How artifacts reach the Hub.")
    disk_bounded: Annotated[bool, Privacy.DROPPED] = Field(
        default=False,
        description="Make, judge, upload and delete one level at a time; one commit at the end. Needs push_to_hub.",
    )
    cluster: Annotated[Cluster | None, Privacy.DROPPED] = Field(
        default=None, description="Where `quantool submit` sends the stages of a run."
    )
    card: CardSettings = Field(default_factory=CardSettings, description="The model card.")
    sign: Annotated[Sign | None, Privacy.DROPPED] = Field(
        default=None, description="Sign the folders to publish. Default: they are not signed."
    )

    eval_dataset: NameOrPath | None = Field(
        default=None, description="Held-out text (file or `datasets` id) when validation.corpora is empty."
    )
    validation: Validation = Field(default_factory=Validation, description="How artifacts are judged.")
    seed: int = Field(default=42, ge=0, lt=MAX_SEED, description="Seed of everything random.")
    device: Annotated[str, AfterValidator(_device)] | None = Field(
        default=None,
        description="Where to compute: cpu, cuda (all GPUs), cuda:0,1 (these); auto, the default: torch on the GPUs "
        "if there are any, llama.cpp on the CPU.",
    )

    def requested(self) -> tuple[Quantization, ...]:
        """List the quantizations of the run: those of the list, or the one that the flat keys describe."""
        if self.quantizations:
            return tuple(
                entry if entry.repo_id else entry.model_copy(update={"repo_id": self.repo_id})
                for entry in self.quantizations
            )
        if self.method is None:  # ruled out by load
            raise AssertionError
        return (
            Quantization(
                method=self.method,
                quant_level=self.quant_level,
                quantization_config=self.quantization_config or {},
                repo_id=self.repo_id,
            ),
        )
