"""Texts that tokenizers cut differently: numbers, white space, contractions, emoji, scripts, code, marks of a chat.

``OWN`` were collected here, each for a rule of some pre-tokenizer: GPT-2's and GPT-4's expressions (runs of digits, endings,
line ends), SentencePiece's spaces, Unicode's categories and normal forms, and the languages that quantool is used for.
"""

from __future__ import annotations

from quantool.validation._engines.vocabulary import ProbeText

OWN = tuple(
    ProbeText(name, text)
    for name, text in (
        ("word", "Hello"),
        ("leading space", " Hello"),
        ("two leading spaces", "  Hello"),
        ("many spaces", "a  b   c    d        e"),
        ("trailing spaces", "Hello  "),
        ("only spaces", "   "),
        ("newlines", "a\nb\n\nc\n\n\nd\r\ne\n"),
        ("tabs", "\ta\t\tb \t c"),
        ("digits", "0 12 345 6789 01234567890 3.14159 1,000,000 2024-02-29"),
        ("contractions", "I'm you're he'll WE'VE it'd don't y'all 'tis"),
        ("punctuation", "!?... (a) [b] {c} <d> \"e\" 'f' #g @h $i %j ^k &l *m ~n `o` |p| \\q/ -- — …"),
        ("capitals", "camelCase PascalCase SCREAMING_SNAKE kebab-case iPhone XMLHttpRequest"),
        (
            "emoji",
            "\U0001f44d \U0001f44d\U0001f3fd \U0001f469\u200d\U0001f52c \U0001f1e6\U0001f1e9 \u263a\ufe0f 🚀🚀",
        ),
        ("combining marks", "e\u0301 n\u0303 o\u0302\u0323 a\u0308bc \u0e19\u0e49\u0e33 q\u0307\u0323"),
        ("CJK", "你好，世界。今日は良い天気ですね。안녕하세요 세계 ﾊﾝｶｸ"),  # noqa: RUF001
        ("Arabic and Hebrew", "مرحبا بالعالم ١٢٣ שלום עולם"),
        ("Indic", "नमस्ते दुनिया १२३ তোমাকে தமிழ்"),
        ("Cyrillic and Greek", "Привет, мир! Ёлка. Γειά σου Κόσμε"),  # noqa: RUF001
        ("Basque", "Gaur eguraldi ona egingo du Donostian, baina euria bihar; ñabardurak, çedilla."),
        ("Catalan", "L'Anna i en Pol col·laboren: què n'hi ha, d'això? Açò és pingüí, raïm i «cançó»."),
        ("Galician", "Ti es da Coruña? Mañá haberá néboa no xardín; lingüística, espiñaña."),
        ("Spanish", "¿Quién corrió más rápido, el niño o la cigüeña? ¡Olé!"),
        ("code", 'def f(x: int) -> str:\n    return f"{x!r:>10}"  # ok\n\nfor i in range(10):\n\tprint(i)\n'),
        ("markup", '<a href="https://example.org/?q=1&r=2#top">x</a> | a | b |\n|---|---|\n'),
        ("json", '{"a": [1, 2.5e-3, null, true], "b": {"c": "\\u00e9\\n"}}'),
        ("control characters", "a\x01b\x07c\x1bd\x7fe\u0085f\u00a0g\u200bh\u2028i\ufeffj"),
        ("private use and astral", "\ue000 \U000f0000 \U0001d54f \U00020000"),
        ("replacement", "a\ufffdb"),
        ("long word", "abcdefghij" * 12),
        ("digit scripts", "٣٤٥ ३४५ ３４５ Ⅷ ½ x² 1e-9 0xFF 1_000 12:30 +34-972"),  # noqa: RUF001
        ("casing", "straße STRASSE İstanbul ıI ǅ ﬁ ß ẞ Ǆ"),  # noqa: RUF001
        ("joiners and marks of direction", "a\u200cb \u200fאב\u200e c\u2060d \u202ee\u202c"),
        ("line ends", "a\r\nb\rc\u2029d\x0be\x0cf"),
        ("spaces of every kind", "a\u00a0b\u2003c\u3000d\u202fe \u00a0 f"),
        ("nul", "a\x00b"),
        ("marks of a chat", "<|im_start|>user\n[INST] <bos> </s> <think> {{ x }} <|fim_prefix|>"),
        ("long run", "=" * 70 + "a" * 40 + " " * 33 + "."),
        ("empty", ""),
    )
)

LONG = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 "
    "333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "  # noqa: RUF001
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like "
    "some tea? We'Ve a'lL"
)
"""The text whose ids llama.cpp's converter hashes to know a tokenizer (``chktxt`` in its conversion/base.py, 0c1e570)."""
UPSTREAM = tuple(
    ProbeText(f"llama.cpp's {text!r}", text)
    for text in (
        "ied 4 ½ months", "Äpfel", " ", "  ", "\t", "\n", "\n\n", "\n\n\n", "\t\n", "Hello world", "Hello World", " Hello World!",
        "Hello, world!", " Hello, world!", " this is 🦙.cpp", "w048 7tuijk dsdfhu", "нещо на Български", "កាន់តែពិសេសអាចខលចេញ",
        "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ (only emoji that has its own token)", "   Hello", "    Hello",
        "    Hello\n    Hello", " (", "\n =", "' era", "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～", "!!!!!!",  # noqa: RUF001
        *("3" * length for length in range(1, 10)), "Cửa Việt", " discards",
        LONG,
    )
)  # fmt: skip
"""The texts by which llama.cpp tests its tokenizers (``tests`` of its convert_hf_to_gguf_update.py, 0c1e570)."""

PROBES = (*OWN, *UPSTREAM)
