"""A Llama whose weights are set by hand so that it goes on as the text went on before: what retrieval needs.

Two layers of two heads and no multi-layer perceptrons, after C. Olsson et al., "In-context learning and induction heads",
2022. In the first layer one head looks one token back, the other two, and each copies a code of what it sees. The second
looks for the place that has the present two tokens before it, and copies the token there. Tokens are bytes.

Rotary frequencies fall so fast that the first pairs of a head tell neighbours apart, while the last turn by less than a
thousandth in the whole context: the first layer asks with those, the second with these.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

THETA = 1e30
HEAD, HIDDEN, CONTEXT = 128, 256, 2048
SIZE = 48  # of a token's code
PLACED, CONTENT = 4, 14  # pairs that tell places, first pair that tells content
NOW, BEFORE, EARLIER, NEXT, ONE = 0, SIZE, 2 * SIZE, 3 * SIZE, 4 * SIZE
"""Parts of the residual stream: codes of the token, of the one before, of that before it, of the next; a constant."""
SHARPNESS = 60.0  # of attention, in nats between the right place and another


def write_induction(folder: Path) -> Path:
    """Write the model and its byte tokenizer, with EOS that it never says and without a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = _write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        dtype=torch.bfloat16,
    )
    made: Any = LlamaForCausalLM
    model = made(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        _set(model, torch.tensor(_codes(size)))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


def _codes(count: int) -> list[list[float]]:
    """Codes of unit length for ``count`` tokens, no two of which are much alike."""
    dice = random.Random(5)
    found: list[list[int]] = []
    while len(found) < count:
        code = [dice.choice((-1, 1)) for _ in range(SIZE)]
        if all(sum(a * b for a, b in zip(code, other, strict=True)) <= SIZE // 2 for other in found):
            found.append(code)
    return [[sign / math.sqrt(SIZE) for sign in code] for code in found]


def _set(model: Any, codes: Any) -> None:
    import torch

    model.model.embed_tokens.weight[:, NOW : NOW + SIZE] = codes
    model.model.embed_tokens.weight[:, ONE] = 1
    root = math.sqrt(HEAD)
    first, second = (layer.self_attn for layer in model.model.layers)
    # What RMSNorm makes of a code of length 1: all tokens have the same norm, but for the first two of a text.
    scale = math.sqrt(HIDDEN / 2)
    for head, (back, target) in enumerate(((1, BEFORE), (2, EARLIER))):
        for pair in range(PLACED):
            angle = THETA ** (-2 * pair / HEAD) * back
            row, strength = head * HEAD + pair, math.sqrt(4 * SHARPNESS * root) / scale
            first.q_proj.weight[row, ONE] = math.cos(angle) * strength
            first.q_proj.weight[row + HEAD // 2, ONE] = -math.sin(angle) * strength
            first.k_proj.weight[row, ONE] = strength
        copied = torch.arange(SIZE)
        first.v_proj.weight[head * HEAD + copied, NOW + copied] = 1 / scale
        first.o_proj.weight[target + copied, head * HEAD + copied] = 1
    scale = math.sqrt(HIDDEN / 4)
    strength = math.sqrt(4 * SHARPNESS * root) / scale
    rows = torch.cat([torch.arange(CONTENT, HEAD // 2), torch.arange(CONTENT, HEAD // 2) + HEAD // 2])[
        : 2 * SIZE
    ]
    for place, (now, then) in enumerate(((NOW, BEFORE), (BEFORE, EARLIER))):
        part = rows[place * SIZE : (place + 1) * SIZE]
        dims = torch.arange(SIZE)
        second.q_proj.weight[part, now + dims] = strength
        second.k_proj.weight[part, then + dims] = strength
    copied = torch.arange(SIZE)
    second.v_proj.weight[copied, NOW + copied] = 1 / scale
    second.o_proj.weight[NEXT + copied, copied] = 4
    model.lm_head.weight[:, NEXT : NEXT + SIZE] = codes * 8


def _write_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    zero = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\0")[0][0]
    entries = {token: number for number, token in enumerate(["<|endoftext|>", *letters, zero * 2])}
    raw = Tokenizer(models.BPE(entries, [(zero, zero)]))  # llama.cpp wants a merge
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = PreTrainedTokenizerFast
    named = {"eos_token": "<|endoftext|>"}
    tokenizer(tokenizer_object=raw, **named).save_pretrained(folder)
    return len(entries)
