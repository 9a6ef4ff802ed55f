"""Small models that make one vector or a few logits of a text, written as real repositories have them.

BERT's have random weights and a WordPiece vocabulary; the Qwen3 classifier has the layers of the tiny embedding model and a
random head. A seed makes every byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent
EMBEDDING = MODELS / "tiny-embedding"
SEED = 20240229
WIDTH = 256  # K-quants work on rows of 256
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512,
    "initializer_range": 0.08,
}  # fmt: skip
LABELS = ("sport", "law", "weather")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_bert_embedding(folder: Path) -> Path:
    """BertModel with the mean of all tokens, not normalized, as sentence-transformers saves it."""
    from transformers import BertModel

    _write_bert(folder, BertModel, ())
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "1_Pooling/config.json",
        {
            "word_embedding_dimension": WIDTH,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    return folder


def write_bert_classifier(folder: Path) -> Path:
    """BertForSequenceClassification with three labels that have names."""
    from transformers import BertForSequenceClassification

    return _write_bert(folder, BertForSequenceClassification, LABELS)


def write_bert_reranker(folder: Path) -> Path:
    """BertForSequenceClassification with one label: query and document are told apart by types of tokens."""
    from transformers import BertForSequenceClassification

    return _write_bert(folder, BertForSequenceClassification, ("LABEL_0",))


def write_roberta_reranker(folder: Path) -> Path:
    """RobertaForSequenceClassification with one label, as bge-reranker has one: query and document between ends."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    text = (MODELS / "text" / "calibration.txt").read_text(encoding="utf-8")
    trained.train_from_iterator([text], vocab_size=2000, special_tokens=special, show_progress=False)
    trained.post_processor = RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    names = ("bos", "pad", "eos", "unk", "mask", "cls", "sep")
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=trained._tokenizer,
        model_max_length=512,
        **{f"{name}_token": token for name, token in zip(names, (*special, "<s>", "</s>"), strict=True)},
    )
    torch.manual_seed(SEED)
    config = RobertaConfig(
        vocab_size=len(tokenizer), type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        max_position_embeddings=514, **SHAPE, **_labelled(("LABEL_0",)),
    )  # fmt: skip
    _save(RobertaForSequenceClassification(config), folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


def write_qwen3_classifier(folder: Path) -> Path:
    """Qwen3ForSequenceClassification with three labels that have names."""
    return _write_qwen3(folder, LABELS)


def write_qwen3_reranker(folder: Path) -> Path:
    """Qwen3ForSequenceClassification with one label."""
    return _write_qwen3(folder, ("LABEL_0",))


def _write_qwen3(folder: Path, labels: Sequence[str]) -> Path:
    import torch
    from transformers import AutoTokenizer, Qwen3ForSequenceClassification

    torch.manual_seed(SEED)
    model: Any = Qwen3ForSequenceClassification.from_pretrained(
        EMBEDDING, **_labelled(labels), dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.config.pad_token_id = 4090  # not EOS, which ends every text
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDING).save_pretrained(folder)
    return folder


def _labelled(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}


def _write_bert(folder: Path, kind: Any, labels: Sequence[str]) -> Path:
    import torch
    from transformers import BertConfig

    size = _write_word_pieces(folder)
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=size, max_position_embeddings=512, type_vocab_size=2, pad_token_id=0, **SHAPE,
        **(_labelled(labels) if labels else {}),
    )  # fmt: skip
    return _save(kind(config), folder)


def _save(model: Any, folder: Path) -> Path:
    """Write a model whose biases are no zeros either."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(tensor, std=0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _write_word_pieces(folder: Path) -> int:
    """A vocabulary of WordPiece, lower case, of the calibration text; its size.

    All letters, and the most frequent words: what tokenizers' own trainer finds differs from run to run.
    """
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import TemplateProcessing

    folder.mkdir(parents=True, exist_ok=True)
    text = (MODELS / "text" / "calibration.txt").read_text(encoding="utf-8")
    plain: Any = BertWordPieceTokenizer(lowercase=True)
    split = plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text))
    words = Counter(word for word, _ in split)
    letters = sorted(set("".join(words)))
    frequent = sorted(words, key=lambda word: (-words[word], word))
    pieces = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *frequent])
    vocabulary = {piece: number for number, piece in enumerate([*pieces][:2000])}
    tokenizer = BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    names = ("pad", "unk", "cls", "sep", "mask")
    write_json(
        folder / "tokenizer_config.json",
        settings | {f"{name}_token": text for name, text in zip(names, SPECIAL, strict=True)},
    )
    return int(tokenizer.get_vocab_size())


def write_json(path: Path, value: Any) -> None:
    """JSON in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
