"""What a GGUF of an embedding model or a classifier needs beside its weights: how states are pooled, and the whole head.

llama.cpp 0c1e570, ``conversion/``: ``_try_set_pooling_type`` is called by some architectures only (Qwen, BERT, Gemma; not by
Llama or Mistral), and BERT's pooler, which its classifier reads (transformers, ``BertPooler``), is dropped. ``src/
llama-graph.cpp`` (``build_pooling``) computes ``cls.output(tanh(cls(state of the first token)))``, which is that pooler and
classifier.
"""

from __future__ import annotations

from typing import Any

from quantool.errors import SourceError
from quantool.formats.json_file import read_json
from quantool.records import Source
from quantool.tasks import TaskKind

GGUF_POOLINGS = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST", "rank": "RANK"}
WORD_PIECE = "bert-bge"
"""A name for a WordPiece vocabulary: llama.cpp cuts all of them in the same way, whatever the name (src/llama-vocab.cpp)."""
BERT = "BertForSequenceClassification"
TYPES = "type_vocab_size"
POOLER, CLASSIFIER = "pooler.dense.", "classifier."


def gguf_pooling(source: Source) -> str | None:
    """The pooling that the file's key shall name; SourceError for one that llama.cpp does not have."""
    task = source.facts.task
    if task.kind is TaskKind.GENERATION:
        return None
    if task.kind is not TaskKind.EMBEDDING:
        types = read_json(source.folder / "config.json").get(TYPES, 1)
        if task.kind is TaskKind.RERANKING and types != 1:
            raise SourceError(
                f"{source.name} tells query and document apart by {types} types of tokens, and llama.cpp gives all of "
                "them the first",
                hint="make FP8 or another format for transformers: as a GGUF it would put documents in another order",
            )
        return "rank"
    if task.pooling is not None and task.pooling not in GGUF_POOLINGS:
        raise SourceError(
            f"{source.name} pools by {task.pooling}, which llama.cpp cannot",
            hint="make FP8 or another format for transformers, or leave GGUF out",
        )
    return task.pooling


def set_pooling(writer: Any, gguf: Any, pooling: str | None) -> None:
    """Write the key; what upstream wrote itself is replaced."""
    if pooling is None:
        return
    key = gguf.Keys.LLM.POOLING_TYPE.format(arch=writer.arch)
    for data in writer.kv_data:
        data.pop(key, None)
    writer.add_pooling_type(gguf.PoolingType[GGUF_POOLINGS[pooling]])


def keep_classifier(kind: Any, parameters: dict[str, Any]) -> None:
    """Let BERT's pooler become ``cls`` and its classifier ``cls.output``, with every label named.

    Upstream drops the pooler, and takes two labels named LABEL_0 and LABEL_1 for none.
    """
    if parameters.get("architectures", [None])[0] != BERT:
        return
    filter_tensors, initialize, modify = kind.filter_tensors, kind.__init__, kind.modify_tensors

    def keep(cls: Any, item: tuple[str, Any]) -> Any:
        name, made = item
        plain = name.removeprefix("bert.")
        if plain.startswith(POOLER):
            return f"{CLASSIFIER}dense.{plain.removeprefix(POOLER)}", made
        return filter_tensors.__func__(cls, item)

    def label(self: Any, *arguments: Any, **named: Any) -> None:
        initialize(self, *arguments, **named)
        self.cls_out_labels = self.hparams.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}

    def rename(self: Any, data: Any, name: str, layer: int | None) -> Any:
        if name.startswith(CLASSIFIER) and name.count(".") == 1:
            name = name.replace(CLASSIFIER, f"{CLASSIFIER}out_proj.")
        return modify(self, data, name, layer)

    kind.filter_tensors, kind.__init__, kind.modify_tensors = classmethod(keep), label, rename
