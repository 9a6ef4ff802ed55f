"""The built-in prompts of the check ``behaviour``: short questions that a chat model ends within a few dozen tokens.

English, Spanish, Catalan, Basque and Galician; single and several turns, with and without a system message, with tools
that a question asks for, with the result of a tool, and with tools that nobody needs.
"""

from __future__ import annotations

from quantool.validation._chat.conversations import (
    Conversation,
    Message,
    assistant,
    call,
    result,
    system,
    user,
)


def _tool(name: str, description: str, **fields: str) -> Message:
    """A function all of whose parameters are required; ``fields`` are their JSON types."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {field: {"type": kind} for field, kind in fields.items()},
                "required": list(fields),
            },
        },
    }


WEATHER = _tool("get_weather", "Get current temperature for a given location.", location="string")
ALARM = _tool("set_alarm", "Set an alarm.", time="string")
MONEY = _tool(
    "convert_currency", "Convert an amount of money.", amount="number", source="string", target="string"
)

QUESTIONS = {
    "en": (
        "What is the capital of France? Answer with one word.",
        "What is 12 plus 30? Only the number.",
        "Name the four seasons, separated by commas.",
        "Hello! Who are you?",
        "Is ice colder than steam? Answer yes or no.",
        "Write one line of Python that prints the sum of 2 and 3.",
    ),
    "es": (
        "¿Cuál es la capital de España? Responde con una palabra.",
        "¿Cómo se guarda un documento?",
        "Cuenta del uno al cinco.",
        "¡Hola! ¿Qué sabes hacer?",
    ),
    "ca": (
        "Quina és la capital de Catalunya? Respon amb una paraula.",
        "Com puc imprimir una pàgina?",
        "Digues els dies de la setmana.",
        "Bon dia! Com estàs?",
    ),
    "eu": (
        "Zein da Frantziako hiriburua? Erantzun hitz batez.",
        "Nola gorde dezaket dokumentu bat?",
        "Esan asteko egunak.",
        "Kaixo! Nor zara?",
    ),
    "gl": (
        "Cal é a capital de Galicia? Responde cunha palabra.",
        "Como podo imprimir unha páxina?",
        "Conta do un ao cinco.",
        "Bo día! Como estás?",
    ),
}

TURNS = (
    Conversation("system, en", (system("Answer in one short sentence."), user("Why do leaves fall?"))),
    Conversation("system, ca", (system("Respon sempre en català."), user("What colour is the sky?"))),
    Conversation(
        "several turns, en",
        (user("My name is Ana."), assistant("Nice to meet you, Ana."), user("What is my name?")),
    ),
    Conversation(
        "several turns, es",
        (
            system("Eres breve."),
            user("¿Cuánto es 2 + 2?"),
            assistant("4"),
            user("¿Y 3 + 3?"),
        ),
    ),
    Conversation(
        "several turns, eu",
        (user("Kaixo!"), assistant("Kaixo! Zertan lagundu dezaket?"), user("Eskerrik asko.")),
    ),
)

CALLS = (
    Conversation("call, en", (user("What is the weather in Girona?"),), (WEATHER, ALARM, MONEY)),
    Conversation("call, es", (user("¿Qué tiempo hace hoy en Sevilla?"),), (WEATHER, MONEY)),
    Conversation("call, ca", (user("Quin temps fa avui a Girona?"),), (WEATHER,)),
    Conversation("call, eu", (user("Zer eguraldi egiten du gaur Bilbon?"),), (WEATHER, ALARM)),
    Conversation("call, gl", (user("Que tempo vai hoxe en Vigo?"),), (ALARM, WEATHER)),
    Conversation("call, alarm", (user("Wake me up at 07:30."),), (ALARM, WEATHER)),
    Conversation("call, money", (user("Convert 250 EUR to USD."),), (WEATHER, ALARM, MONEY)),
    Conversation(
        "call after a system message",
        (system("Use a tool when one fits."), user("Set an alarm for 18:00.")),
        (MONEY, ALARM),
    ),
    Conversation("tools that nobody needs", (user("Thank you, goodbye!"),), (WEATHER,)),
    Conversation(
        "result of a tool",
        (
            user("What is the weather in Vigo?"),
            assistant("", call({"location": "Vigo"})),
            result('{"temperature": 17, "sky": "cloudy"}'),
        ),
        (WEATHER,),
    ),
)

BUILT_IN: tuple[Conversation, ...] = (
    *(
        Conversation(f"question {number}, {language}", (user(text),))
        for language, texts in QUESTIONS.items()
        for number, text in enumerate(texts, 1)
    ),
    *TURNS,
    *CALLS,
)
