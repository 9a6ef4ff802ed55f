"""One question in each of many languages, asked of a model whose own card names the language.

Every one asks for the capital of France, to be answered with one word: the answer is the same name nearly everywhere, so
that what a language loses shows as a loss.
"""

# ruff: noqa: RUF001 - letters of other alphabets are meant

from __future__ import annotations

from collections.abc import Iterable

QUESTIONS = {
    "ar": "ما هي عاصمة فرنسا؟ أجب بكلمة واحدة.",
    "bg": "Коя е столицата на Франция? Отговори с една дума.",
    "cs": "Jaké je hlavní město Francie? Odpověz jedním slovem.",
    "da": "Hvad er hovedstaden i Frankrig? Svar med ét ord.",
    "de": "Was ist die Hauptstadt von Frankreich? Antworte mit einem Wort.",
    "el": "Ποια είναι η πρωτεύουσα της Γαλλίας; Απάντησε με μία λέξη.",
    "et": "Mis on Prantsusmaa pealinn? Vasta ühe sõnaga.",
    "fa": "پایتخت فرانسه کجاست؟ با یک کلمه پاسخ بده.",
    "fi": "Mikä on Ranskan pääkaupunki? Vastaa yhdellä sanalla.",
    "fr": "Quelle est la capitale de la France ? Réponds en un seul mot.",
    "he": "מהי בירת צרפת? ענה במילה אחת.",
    "hi": "फ़्रांस की राजधानी क्या है? एक शब्द में उत्तर दो।",
    "hr": "Koji je glavni grad Francuske? Odgovori jednom riječju.",
    "hu": "Mi Franciaország fővárosa? Válaszolj egy szóval.",
    "id": "Apa ibu kota Prancis? Jawab dengan satu kata.",
    "it": "Qual è la capitale della Francia? Rispondi con una parola.",
    "ja": "フランスの首都はどこですか。一語で答えてください。",
    "ko": "프랑스의 수도는 어디입니까? 한 단어로 대답하세요.",
    "lt": "Kokia yra Prancūzijos sostinė? Atsakyk vienu žodžiu.",
    "lv": "Kas ir Francijas galvaspilsēta? Atbildi ar vienu vārdu.",
    "nl": "Wat is de hoofdstad van Frankrijk? Antwoord met één woord.",
    "no": "Hva er hovedstaden i Frankrike? Svar med ett ord.",
    "pl": "Jaka jest stolica Francji? Odpowiedz jednym słowem.",
    "pt": "Qual é a capital da França? Responde com uma palavra.",
    "ro": "Care este capitala Franței? Răspunde cu un singur cuvânt.",
    "ru": "Какая столица Франции? Ответь одним словом.",
    "sk": "Aké je hlavné mesto Francúzska? Odpovedz jedným slovom.",
    "sl": "Katero je glavno mesto Francije? Odgovori z eno besedo.",
    "sr": "Који је главни град Француске? Одговори једном речју.",
    "sv": "Vad är Frankrikes huvudstad? Svara med ett ord.",
    "th": "เมืองหลวงของฝรั่งเศสคือเมืองอะไร ตอบคำเดียว",
    "tr": "Fransa'nın başkenti neresidir? Tek kelimeyle cevap ver.",
    "uk": "Яка столиця Франції? Відповідай одним словом.",
    "vi": "Thủ đô của Pháp là gì? Trả lời bằng một từ.",
    "zh": "法国的首都是哪里？请用一个词回答。",
}
"""By ISO 639-1 code. English and the languages of Spain have questions of their own (``prompts``)."""
SAME = {"nb": "no", "nn": "no"}


def questions(languages: Iterable[str]) -> dict[str, str]:
    """The question of each of ``languages`` (as a model card names them: ``pt``, ``zh-CN``) that there is one for."""
    codes = [language.lower().partition("-")[0] for language in languages]
    known = dict.fromkeys(SAME.get(code, code) for code in codes)
    return {code: QUESTIONS[code] for code in known if code in QUESTIONS}
