"""What a model is for, as its files say: it writes text, or makes one vector of a whole text."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from quantool.record import Record


class TaskKind(StrEnum):
    """What is judged of a model."""

    GENERATION = "generation"
    EMBEDDING = "embedding"
    """A vector for a text; texts that mean the same have vectors with a large cosine."""
    RERANKING = "reranking"
    """One score for a pair of texts, by which documents are ordered for a query."""
    CLASSIFICATION = "classification"
    """A logit for each of several labels."""


PIPELINE_TAGS = {
    TaskKind.GENERATION: "text-generation",
    TaskKind.EMBEDDING: "feature-extraction",
    TaskKind.RERANKING: "text-ranking",
    TaskKind.CLASSIFICATION: "text-classification",
}
"""The Hub's name of a task (huggingface.co/tasks), where the source's card names none."""


class Task(Record):
    """The task of a checkpoint and what its files decide about it."""

    kind: TaskKind = TaskKind.GENERATION
    pooling: str | None = None
    """How the states of all tokens become one vector, as ``1_Pooling/config.json`` of sentence-transformers names it
    (``cls``, ``mean``, ``lasttoken``, …); None where no file says."""
    normalized: bool = False
    """Whether ``modules.json`` ends with a module that gives vectors the length 1."""
    labels: tuple[str, ...] = ()
    """Names of a classifier's labels by number; one for a reranker."""
    prompts: dict[str, str] = Field(default={})
    """What ``config_sentence_transformers.json`` puts before a text, by name (``query``, ``document``)."""
    files: tuple[str, ...] = ()
    """``modules.json`` and the configurations of its modules."""

    @property
    def generates(self) -> bool:
        """Whether the model writes text."""
        return self.kind is TaskKind.GENERATION
