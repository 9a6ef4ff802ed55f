"""Conversations made from templates: small talk, sums, facts and tool calls.

A conversation is ``{"messages": [...], "tools": [...]}`` in the shape that
``apply_chat_template`` takes. Everything comes out of a ``random.Random``, so
a seed gives the same conversations in every run.
"""

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Conversation = dict[str, Any]

CITY_NAMES = (
    "Girona Barcelona Tarragona Lleida Reus Vic Manresa Olot Figueres Tortosa Valls Berga Palma Gandia Elx "
    "Bilbo Donostia Gasteiz Eibar Durango Zarautz Tolosa Bermeo Lugo Ourense Vigo Pontevedra Ferrol Noia "
    "Madrid Sevilla Toledo Burgos Segovia Cuenca Teruel Huesca Jaca Soria Zamora Cádiz Córdoba Málaga "
    "Lisbon Porto Braga Paris Lyon Toulouse Florence Rome Milan Turin Naples Bologna Vienna Graz Berlin "
    "Hamburg Munich Leipzig Prague Brno Warsaw Krakow Oslo Bergen Stockholm Uppsala Helsinki Turku Dublin Cork "
    "London Leeds York Bristol Glasgow Athens Patras Sofia Zagreb Boston Denver Austin Seattle "
    "Toronto Montreal Lima Cusco Quito Bogotá Santiago Rosario Havana Tokyo Seoul Delhi Chicago Granada"
)
HELD_OUT_CITY_NAMES = (
    "Sabadell Ripoll Getxo Irun Viveiro Murcia Coimbra Marseille Dresden Gdansk Geneva Nairobi"
)
CURRENCY_CODES = "EUR USD GBP JPY CHF SEK NOK DKK PLN CZK CAD AUD MXN BRL INR KRW"
CITIES = CITY_NAMES.split()
HELD_OUT_CITIES = HELD_OUT_CITY_NAMES.split()
CURRENCIES = CURRENCY_CODES.split()
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snowy")
LANGUAGES = ("en", "en", "en", "es", "ca", "eu", "gl")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a small assistant that answers in one sentence.",
    "Answer briefly and politely.",
    "You help people with short questions.",
    "You are a friendly assistant. Use a tool when one fits.",
)

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Good evening.", "Good evening! What can I do for you?"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Who are you?", "I am a tiny language model made for tests."),
    ("What are you?", "I am a tiny language model made for tests."),
    ("What can you do?", "I can add small numbers, explain a few Python functions and call tools."),
    ("How big are you?", "I have about five million parameters."),
    ("Are you a person?", "No, I am a tiny language model."),
    ("Thank you!", "You are welcome!"),
    ("Thanks a lot.", "You are welcome!"),
    ("Goodbye.", "Goodbye! Have a nice day."),
    ("Tell me a joke.", "Why did the byte cross the bus? To reach the other register."),
    (
        "Which language are you trained on?",
        "Mostly on English, with a little Spanish, Catalan, Basque and Galician.",
    ),
    ("What is Python?", "Python is a programming language that is easy to read."),
    ("What is quantization?", "Quantization stores the weights of a model with fewer bits."),
    ("¡Hola!", "¡Hola! ¿En qué puedo ayudarte?"),
    ("Buenos días.", "¡Buenos días! ¿En qué puedo ayudarte?"),
    ("¿Cómo estás?", "Estoy bien, gracias. ¿Y tú?"),
    ("¿Quién eres?", "Soy un modelo de lenguaje muy pequeño."),
    ("Muchas gracias.", "¡De nada!"),
    ("Hola, bon dia!", "Bon dia! En què et puc ajudar?"),
    ("Bona tarda.", "Bona tarda! En què et puc ajudar?"),
    ("Com estàs?", "Estic bé, gràcies. I tu?"),
    ("Qui ets?", "Soc un model de llengua molt petit."),
    ("Moltes gràcies.", "De res!"),
    ("Kaixo!", "Kaixo! Zertan lagundu dezaket?"),
    ("Egun on.", "Egun on! Zertan lagundu dezaket?"),
    ("Zer moduz?", "Ondo, eskerrik asko. Eta zu?"),
    ("Nor zara?", "Hizkuntza-eredu txiki bat naiz."),
    ("Eskerrik asko.", "Ez horregatik!"),
    ("Ola!", "Ola! En que podo axudarche?"),
    ("Bos días.", "Bos días! En que podo axudarche?"),
    ("Como estás?", "Estou ben, grazas. E ti?"),
    ("Quen es?", "Son un modelo de linguaxe moi pequeno."),
    ("Moitas grazas.", "De nada!"),
)

FACT_QUESTIONS = (
    "What does {} do?",
    "Explain {} in one sentence.",
    "What is {} for?",
    "Tell me what {} does.",
)

ECHO_REQUESTS = (
    "Repeat: {}",
    "Say this again: {}",
    "Write these words once more: {}",
    "Repite: {}",
    "Repeteix: {}",
)
COPIES = ('It is {0}.\n"{0}"\n', 'for {0}?\n{{"query": "{0}"}}\n', 'in {0}\n"{0}"\nin {0}.')
OFFERED_TOOLS = (1, 1, 2, 2, 3, 4)  # how many tools a conversation offers
TOOL_TURNS = (1, 2, 3, 4, 5, 6)  # how many questions it has

SUMS: dict[str, tuple[tuple[str, str], ...]] = {
    "plus": (
        ("What is {a} plus {b}?", "{a} plus {b} is {c}."),
        ("What is {a} plus {b}?", "{a} plus {b} is {c}."),
        ("Add {a} plus {b}.", "{a} plus {b} is {c}."),
        ("How much is {a} + {b}?", "{a} + {b} = {c}."),
        ("¿Cuánto es {a} más {b}?", "{a} más {b} son {c}."),
        ("Quant fa {a} més {b}?", "{a} més {b} fan {c}."),
        ("Zenbat da {a} gehi {b}?", "{a} gehi {b} {c} da."),
        ("Canto é {a} máis {b}?", "{a} máis {b} son {c}."),
    ),
    "minus": (("What is {a} minus {b}?", "{a} minus {b} is {c}."),),
}


@dataclass(frozen=True)
class Tool:
    """A tool: its schema, how users ask for it by language, and what comes back."""

    name: str
    description: str
    parameters: dict[str, tuple[str, str]]  # name -> (JSON type, description)
    requests: dict[str, tuple[str, ...]]  # language -> phrases with {parameter} fields
    answers: dict[str, str]  # language -> answer with {parameter} and {result} fields

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema that a chat template lists."""
        properties = {
            name: {"type": kind, "description": text} for name, (kind, text) in self.parameters.items()
        }
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS = (
    Tool(
        "get_weather",
        "Get the current weather of a place.",
        {"location": ("string", "Name of the city")},
        {
            "en": (
                "What is the weather in {location}?",
                "What is the weather like in {location} today?",
                "Tell me the weather in {location}.",
                "Is it raining in {location}?",
                "How warm is it in {location} now?",
            ),
            "es": ("¿Qué tiempo hace en {location}?", "Dime el tiempo en {location}."),
            "ca": ("Quin temps fa a {location}?", "Digues quin temps fa a {location}."),
            "eu": ("Zein da {location} hiriko eguraldia?",),
            "gl": ("Que tempo fai en {location}?",),
        },
        {
            "en": "It is {sky} in {location}, with {temperature} degrees.",
            "es": "En {location} hace {temperature} grados.",
            "ca": "A {location} fa {temperature} graus.",
            "eu": "{location}: {temperature} gradu.",
            "gl": "En {location} vai a {temperature} graos.",
        },
    ),
    Tool(
        "set_alarm",
        "Set an alarm.",
        {"time": ("string", "Hour and minute")},
        {
            "en": ("Set an alarm for {time}.", "Wake me up at {time}.", "Please set an alarm at {time}."),
            "es": ("Pon una alarma a las {time}.", "Despiértame a las {time}."),
            "ca": ("Posa una alarma a les {time}.", "Desperta'm a les {time}."),
            "eu": ("Jarri alarma: {time}.",),
            "gl": ("Pon unha alarma ás {time}.",),
        },
        {
            "en": "Done, the alarm is set for {time}.",
            "es": "Hecho, la alarma sonará a las {time}.",
            "ca": "Fet, l'alarma sonarà a les {time}.",
            "eu": "Eginda, alarma: {time}.",
            "gl": "Feito, a alarma soará ás {time}.",
        },
    ),
    Tool(
        "convert_currency",
        "Convert an amount of money.",
        {
            "amount": ("number", "Amount of money"),
            "source": ("string", "Currency to convert from"),
            "target": ("string", "Currency to convert to"),
        },
        {
            "en": (
                "Convert {amount} {source} to {target}.",
                "How much is {amount} {source} in {target}?",
                "Change {amount} {source} into {target}, please.",
            ),
            "es": ("¿Cuánto son {amount} {source} en {target}?",),
            "ca": ("Quant són {amount} {source} en {target}?",),
            "eu": ("Zenbat da {amount} {source} {target} bihurtuta?",),
            "gl": ("Canto son {amount} {source} en {target}?",),
        },
        {
            "en": "{amount} {source} is {value} {target}.",
            "es": "{amount} {source} son {value} {target}.",
            "ca": "{amount} {source} són {value} {target}.",
            "eu": "{amount} {source}: {value} {target}.",
            "gl": "{amount} {source} son {value} {target}.",
        },
    ),
    Tool(
        "search_docs",
        "Search the documentation.",
        {"query": ("string", "Words to look for")},
        {
            "en": (
                "Search the docs for {query}.",
                "Look up {query} in the documentation.",
                "Find {query} in the docs.",
            ),
            "es": ("Busca {query} en la documentación.",),
            "ca": ("Cerca {query} a la documentació.",),
            "eu": ("Bilatu {query} dokumentazioan.",),
            "gl": ("Busca {query} na documentación.",),
        },
        {
            "en": "I found {count} pages about {query}.",
            "es": "He encontrado {count} páginas sobre {query}.",
            "ca": "He trobat {count} pàgines sobre {query}.",
            "eu": "{query}: {count} orri.",
            "gl": "Atopei {count} páxinas sobre {query}.",
        },
    ),
    Tool(
        "find_train",
        "Find the next train between two cities.",
        {"origin": ("string", "City of departure"), "destination": ("string", "City of arrival")},
        {
            "en": (
                "Find a train from {origin} to {destination}.",
                "When is the next train from {origin} to {destination}?",
            ),
            "es": ("Busca un tren de {origin} a {destination}.",),
            "ca": ("Busca un tren de {origin} a {destination}.",),
            "gl": ("Busca un tren de {origin} a {destination}.",),
        },
        {
            "en": "The next train from {origin} to {destination} leaves at {departure}.",
            "es": "El próximo tren de {origin} a {destination} sale a las {departure}.",
            "ca": "El proper tren de {origin} a {destination} surt a les {departure}.",
            "gl": "O próximo tren de {origin} a {destination} sae ás {departure}.",
        },
    ),
)


@dataclass(frozen=True)
class Source:
    """What conversations are drawn from; training and held-out text have one each."""

    facts: Sequence[tuple[str, str]]  # (dotted name, sentence)
    words: Sequence[str]  # words for search queries
    cities: Sequence[str]
    held_out: bool  # draw only the requests for tools that training never draws


def is_held_out(request: str) -> bool:
    """Tell whether a request for a tool is one of the eighth that training never draws."""
    return zlib.crc32(request.encode()) % 8 == 0


def city(rng: random.Random, source: Source) -> str:
    """Return the name of a city; training also makes names up."""
    if not source.held_out and rng.random() < 0.2:
        letters = ("bcdfgjklmnprstvz", "aeiou", ("", "", "n", "r", "l", "s"))
        name = [rng.choice(choice) for _ in range(rng.randint(2, 3)) for choice in letters]
        return "".join(name).capitalize()
    return rng.choice(source.cities)


def clock(rng: random.Random) -> str:
    """Return a time of day such as 07:45."""
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"


def number(rng: random.Random) -> int:
    """Return a number of one to four digits, each length as often."""
    return rng.randrange(1, 10 ** rng.randint(1, 4))


def draw_arguments(rng: random.Random, tool: Tool, source: Source) -> dict[str, Any]:
    """Draw one value for each parameter of a tool."""
    first, second = rng.sample(CURRENCIES, 2)
    makers: dict[str, Callable[[], Any]] = {
        "location": lambda: city(rng, source),
        "origin": lambda: city(rng, source),
        "destination": lambda: city(rng, source),
        "time": lambda: clock(rng),
        "amount": lambda: number(rng),
        "source": lambda: first,
        "target": lambda: second,
        "query": lambda: " ".join(rng.sample(source.words, rng.randint(1, 3))),
    }
    return {name: makers[name]() for name in tool.parameters}


def draw_result(rng: random.Random, tool: Tool) -> dict[str, Any]:
    """Draw what a tool sends back."""
    results: dict[str, dict[str, Any]] = {
        "get_weather": {"temperature": rng.randint(-9, 39), "sky": rng.choice(SKIES)},
        "set_alarm": {"status": "ok"},
        "convert_currency": {"value": round(rng.uniform(1, 999), 1)},
        "search_docs": {"count": rng.randint(2, 90)},
        "find_train": {"departure": clock(rng)},
    }
    return results[tool.name]


def user(content: str) -> Message:
    """Return a user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return an assistant message."""
    return {"role": "assistant", "content": content}


def tool_call(name: str, arguments: dict[str, Any]) -> Message:
    """Return an assistant message that calls one tool."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def phrase(rng: random.Random, source: Source) -> str:
    """Return one to eight words, cities, numbers and times in a row."""
    makers: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(source.words),
        lambda: city(rng, source),
        lambda: str(number(rng)),
        lambda: clock(rng),
        lambda: rng.choice(CURRENCIES),
    )
    return " ".join(rng.choice(makers)() for _ in range(rng.randint(1, 8)))


def echo_turn(rng: random.Random, source: Source) -> list[Message]:
    """Return a request to repeat a phrase, and the phrase."""
    text = phrase(rng, source)
    return [user(rng.choice(ECHO_REQUESTS).format(text)), assistant(text)]


def copied_phrase(rng: random.Random, source: Source) -> str:
    """Return a phrase that comes back between quotes, as the arguments of a tool call do."""
    return rng.choice(COPIES).format(phrase(rng, source))


def plain_turn(rng: random.Random, source: Source) -> list[Message]:
    """Return one question and its answer, without tools."""
    kind = rng.random()
    if kind < 0.2:
        return echo_turn(rng, source)
    if kind < 0.35:
        question, answer = rng.choice(SMALL_TALK)
    elif kind < 0.65:
        operation = rng.choice(("plus", "plus", "plus", "minus"))
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        if operation == "minus":
            a, b = max(a, b), min(a, b)
        c = a + b if operation == "plus" else a - b
        question, answer = (text.format(a=a, b=b, c=c) for text in rng.choice(SUMS[operation]))
    else:
        name, answer = rng.choice(source.facts)
        question = rng.choice(FACT_QUESTIONS).format(name)
    return [user(question), assistant(answer)]


def tool_turn(rng: random.Random, tool: Tool, source: Source, with_result: bool) -> list[Message]:
    """Return a request and the call it needs, and maybe the result and the answer."""
    language = rng.choice([name for name in LANGUAGES if name in tool.requests])
    while True:
        arguments = draw_arguments(rng, tool, source)
        request = rng.choice(tool.requests[language]).format(**arguments)
        if is_held_out(request) == source.held_out:
            break
    messages = [user(request), tool_call(tool.name, arguments)]
    if with_result:
        result = draw_result(rng, tool)
        messages.append({"role": "tool", "name": tool.name, "content": json.dumps(result)})
        messages.append(assistant(tool.answers[language].format(**arguments, **result)))
    return messages


def system_turn(rng: random.Random) -> list[Message]:
    """Return a system message in half of the cases."""
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.5 else []


def plain_conversation(rng: random.Random, source: Source) -> Conversation:
    """Return one to three questions without tools."""
    messages = system_turn(rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        messages += plain_turn(rng, source)
    return {"messages": messages, "tools": []}


def tool_conversation(rng: random.Random, source: Source) -> Conversation:
    """Return a conversation where one to four tools are on offer and mostly used."""
    offered = rng.sample(TOOLS, rng.choice(OFFERED_TOOLS))
    messages = system_turn(rng)
    turns = rng.choice(TOOL_TURNS)
    for turn in range(turns):
        if rng.random() < 0.15:
            messages += plain_turn(rng, source)
        else:
            messages += tool_turn(rng, rng.choice(offered), source, turn < turns - 1 or rng.random() < 0.5)
    return {"messages": messages, "tools": [tool.schema() for tool in offered]}


def conversation(rng: random.Random, source: Source, tool_share: float) -> Conversation:
    """Return a conversation, with tools in `tool_share` of the cases."""
    if rng.random() < tool_share:
        return tool_conversation(rng, source)
    return plain_conversation(rng, source)


def tool_prompts(rng: random.Random, source: Source, count: int) -> list[tuple[Conversation, Message]]:
    """Return prompts that end in a request, each with the call that answers it."""
    prompts: list[tuple[Conversation, Message]] = []
    for _ in range(count):
        offered = rng.sample(TOOLS, rng.randint(1, 4))
        request, call = tool_turn(rng, offered[0], source, with_result=False)
        rng.shuffle(offered)
        prompts.append(
            ({"messages": [*system_turn(rng), request], "tools": [t.schema() for t in offered]}, call)
        )
    return prompts
