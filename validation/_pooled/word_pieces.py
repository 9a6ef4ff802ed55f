"""What BERT's tokenizer does with a text before it cuts words, which llama.cpp leaves out.

tokenizers, ``normalizers/bert.rs`` (``do_clean_text``: control characters go, white space becomes a space) and
``models/wordpiece`` (``max_input_chars_per_word``: a longer word is unknown). llama.cpp's ``llm_tokenizer_wpm`` keeps the
former as parts of words and cuts the latter.
"""

from __future__ import annotations

import unicodedata

LONGEST_WORD = 100
REPLACEMENT = "\ufffd"
UNKNOWN = "[UNK]"


def cleaned(text: str) -> str:
    """The text that llama.cpp has to be given for the ids that BERT's tokenizer makes of ``text``."""
    kept = [
        " " if character.isspace() else character
        for character in text
        if character in "\t\n\r"
        or (character != REPLACEMENT and not unicodedata.category(character).startswith("C"))
    ]
    words = "".join(kept).split(" ")
    return " ".join(UNKNOWN if len(word) > LONGEST_WORD else word for word in words)
