"""Small models with random weights, written as real repositories have them, for tests of structure.

Each ``write_*`` function fills a folder with ``config.json``, ``generation_config.json``, ``model.safetensors`` (bf16),
``tokenizer.json``, ``tokenizer_config.json``, a chat template and, where the family has one, ``tokenizer.model``, and
returns the folder. Nothing is downloaded and a seed makes every byte; each takes a second or two, most of it imports.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SEED = 20240229
HIDDEN = 256  # K-quants work on rows of 256
CONTEXT = 256

QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The pre-tokenizer that Qwen2 and Qwen3 have in their tokenizer.json."""

SAMPLE = (
    "the a model reads every token and answers with one more until it stops because the end of its turn has come "
    "el gat dorm a la cadira i no vol caçar ratolins l'aigua és freda avui plou a Girona i demà farà sol "
    "etxe zuri bat ikusi dut mendian eta ura hotza da gaur euria ari du Bilbon bihar eguzkia izango dugu "
    "a nena come pan no xardín e o vento sopra forte hoxe chove en Lugo mañá haberá néboa e sol "
    "el niño corrió por la calle sin mirar atrás mañana iremos al río ¿quién eres tú? ¡hola! "
    "def return import for while if else print self None True False lambda yield class 0 1 2 3 42 1984 3.14"
)
WORDS = SAMPLE.split()

CHATML = """{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n' }}{%- endif %}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message['content'] or '') }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '<tool_call>' + call['function']['name'] + ' ' }}
            {{- call['function']['arguments'] if call['function']['arguments'] is string
                else call['function']['arguments'] | tojson }}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|im_start|>tool\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- elif message['role'] != 'system' or not loop.first %}
        {{- raise_exception('unexpected role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

THINKING = CHATML.replace("{{- bos_token }}\n", "").replace(
    "{{- '<|im_start|>assistant\\n' }}{%- endif %}\n",
    "{{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n"
    "{%- endif %}\n",
)
"""As Qwen3: no BOS, and an empty thought when ``enable_thinking`` is false."""

TURNS = """{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate user/assistant') -}}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}{{- part['text'] | trim -}}{%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
"""As Gemma 3: no tools, the system message inside the first user turn, strict alternation."""


def write_spm_llama(folder: Path) -> Path:
    """Llama, SentencePiece BPE with byte fallback, ``legacy: false``, a template that begins with ``<s>``."""
    from transformers import LlamaConfig

    specials = ["<unk>", "<s>", "</s>"]
    _write_sentencepiece(
        folder,
        train={
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": -1,
            "control_symbols": ["<|im_start|>", "<|im_end|>"],
        },
        settings={
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "pad_token": None,
        },
        template=CHATML,
        dummy_prefix=True,
        special=[*specials, "<|im_start|>", "<|im_end|>"],
    )
    config = LlamaConfig(
        **_sizes(_vocabulary(folder)),
        bos_token_id=1,
        eos_token_id=4,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    return _write_weights(
        folder, config, {"bos_token_id": 1, "eos_token_id": [4, 2], "temperature": 0.7, "top_p": 0.9}
    )


def write_qwen3(folder: Path) -> Path:
    """Qwen3: tied embeddings, q/k norms, byte-level BPE with NFC, and an embedding longer than the vocabulary."""
    from transformers import Qwen3Config

    _write_byte_level(folder)
    padded = -(-_vocabulary(folder) // 64) * 64 + 64
    config = Qwen3Config(
        **_sizes(padded),
        bos_token_id=_id(folder, "<|endoftext|>"),
        eos_token_id=_id(folder, "<|im_end|>"),
        tie_word_embeddings=True,
    )
    return _write_weights(folder, config, _qwen_generation(folder))


def write_moe(folder: Path) -> Path:
    """Qwen3-MoE: eight experts, two used, in every layer."""
    from transformers import Qwen3MoeConfig

    _write_byte_level(folder)
    config = Qwen3MoeConfig(
        **_sizes(_vocabulary(folder)),
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        bos_token_id=_id(folder, "<|endoftext|>"),
        eos_token_id=_id(folder, "<|im_end|>"),
        tie_word_embeddings=False,
    )
    return _write_weights(folder, config, _qwen_generation(folder))


def write_gemma3(folder: Path) -> Path:
    """Gemma 3 (text): SentencePiece without a dummy prefix, five sliding layers to one full layer, tied embeddings."""
    from transformers import Gemma3TextConfig

    turns = ["<start_of_turn>", "<end_of_turn>"]
    _write_sentencepiece(
        folder,
        train={
            "pad_id": 0,
            "eos_id": 1,
            "bos_id": 2,
            "unk_id": 3,
            "pad_piece": "<pad>",
            "eos_piece": "<eos>",
            "bos_piece": "<bos>",
            "control_symbols": turns,
            "user_defined_symbols": ["<mask>", "\n\n", "\n\n\n"],
        },
        settings={
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
        template=TURNS,
        dummy_prefix=False,
        special=["<pad>", "<eos>", "<bos>", "<unk>", *turns],
    )
    sizes = _sizes(_vocabulary(folder)) | {"num_hidden_layers": 6, "num_key_value_heads": 1}
    config = Gemma3TextConfig(
        **sizes,
        query_pre_attn_scalar=64,
        sliding_window=64,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
    )
    ends = [1, _id(folder, "<end_of_turn>")]
    generation = {"bos_token_id": 2, "eos_token_id": ends, "pad_token_id": 0, "top_k": 64, "top_p": 0.95}
    return _write_weights(folder, config, generation)


def write_sliding_mistral(folder: Path) -> Path:
    """Mistral with a sliding window shorter than its context, which llama.cpp's llama architecture would ignore."""
    from transformers import MistralConfig

    _write_byte_level(folder)
    config = MistralConfig(
        **_sizes(_vocabulary(folder)),
        sliding_window=64,
        bos_token_id=_id(folder, "<|endoftext|>"),
        eos_token_id=_id(folder, "<|im_end|>"),
        tie_word_embeddings=False,
    )
    return _write_weights(folder, config, _qwen_generation(folder))


def text(sentences: int = 400) -> list[str]:
    """Sentences of random words in English, Catalan, Basque, Galician, Spanish and Python; the same ones always."""
    dice = random.Random(SEED)
    return [" ".join(dice.choices(WORDS, k=dice.randint(4, 14))) for _ in range(sentences)]


def _sizes(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN // 4,
        "max_position_embeddings": CONTEXT,
    }


def _write_weights(folder: Path, config: PretrainedConfig, generation: dict[str, Any]) -> Path:
    """Random bf16 weights for ``config``, wide enough that different tokens get clearly different logits."""
    import torch
    from transformers import AutoModelForCausalLM

    config.dtype = torch.bfloat16
    config.initializer_range = 0.06
    state = torch.random.get_rng_state()
    torch.manual_seed(SEED)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    _write_json(folder / "generation_config.json", {"do_sample": True, **generation})
    return folder


def _qwen_generation(folder: Path) -> dict[str, Any]:
    end, text_end = _id(folder, "<|im_end|>"), _id(folder, "<|endoftext|>")
    return {
        "bos_token_id": text_end,
        "pad_token_id": text_end,
        "eos_token_id": [end, text_end],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }


def _write_byte_level(folder: Path) -> None:
    """Tokenizer files as Qwen3 has them: byte-level BPE, NFC, no BOS, specials behind the learnt vocabulary."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    _write_settings(folder, settings, special, THINKING)


def _write_sentencepiece(
    folder: Path,
    *,
    train: dict[str, Any],
    settings: dict[str, Any],
    template: str,
    dummy_prefix: bool,
    special: list[str],
) -> None:
    """``tokenizer.model`` trained on ``text()``, and the ``tokenizer.json`` that transformers derives from such a file."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **train,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    _write_tokenizer_json(
        folder, pieces, special, [*train.get("user_defined_symbols", [])], dummy_prefix=dummy_prefix
    )
    _write_settings(folder, settings, special, template)


def _write_tokenizer_json(
    folder: Path, pieces: Any, special: list[str], defined: list[str], *, dummy_prefix: bool
) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    learnt = {
        piece: i
        for piece, i in vocabulary.items()
        if not (pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i) or piece in defined)
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(learnt, key=lambda piece: -pieces.get_score(learnt[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in learnt and piece[cut:] in learnt
    ]
    unknown = pieces.id_to_piece(pieces.unk_id())
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if dummy_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    bos = pieces.id_to_piece(pieces.bos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, pieces.bos_id())]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_settings(folder: Path, settings: dict[str, Any], special: list[str], template: str) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in saved["added_tokens"]
    }
    shared = {
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    _write_json(folder / "tokenizer_config.json", settings | shared)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    named = {
        key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)
    }
    _write_json(folder / "special_tokens_map.json", named)


def _vocabulary(folder: Path) -> int:
    """Number of tokens, added ones included."""
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids: list[int] = [*saved["model"]["vocab"].values(), *(token["id"] for token in saved["added_tokens"])]
    return 1 + max(ids)


def _id(folder: Path, token: str) -> int:
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    found: dict[str, int] = {added["content"]: added["id"] for added in saved["added_tokens"]}
    return found[token]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
