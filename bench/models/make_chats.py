"""Which chats the small model learns from: questions and answers, tool calls, and polite answers to noise."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from bench.models.make_text import (
    STORY_FRIENDS,
    addition,
    animal_json,
    animal_portrait,
    article,
    counting,
    cut_sentence,
    diary,
    numbered_list,
    person_json,
    portrait,
    story,
    town_portrait,
    way,
    weighted,
)  # fmt: skip
from bench.models.words import ANIMALS, FACTS, LISTS, NUMBERS, PEOPLE, PLACES, TOWNS, WEATHER

SYSTEM_TEXTS = (
    "You are a helpful assistant.", "You are a small model that tells stories.", "Answer in short and plain words.",
    "You are a friendly assistant. Be brief.",
)  # fmt: skip
NOISE_APOLOGY = "I do not know much about that, but I can tell you a story."
ABOUT_ORDER = ("about", "on", "with")


@dataclass(frozen=True, slots=True)
class Message:
    """`role` is system, user, assistant or tool; `text` stands between the role's token and the end token.

    Noise is text that nobody should learn to write: it is read in training, but not counted in the loss.
    """

    role: str
    text: str
    is_noise: bool = False


@dataclass(frozen=True, slots=True)
class Intent:
    """A tool the model can be given: several names and parameter names, so that it reads them and does not guess."""

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    description: str
    questions: tuple[str, ...]
    result: Callable[[Random], dict[str, object]]
    answer: str


INTENTS = (
    Intent(
        ("get_weather", "weather", "get_current_weather", "lookup_weather"), ("city", "location", "town", "place"),
        "Get the current weather in a city.",
        ("What is the weather in {x}?", "What is the weather like in {x}?", "How is the weather in {x} today?",
         "Is it raining in {x}?"),
        lambda rng: {"weather": rng.choice(WEATHER), "degrees": rng.randrange(40)},
        "It is {weather} in {x}, and it has {degrees} degrees.",
    ),
    Intent(
        ("get_time", "time", "get_current_time", "clock"), ("city", "location", "town", "place"),
        "Get the current time in a city.",
        ("What time is it in {x}?", "Tell me the time in {x}.", "How late is it in {x}?"),
        lambda rng: {"hour": rng.randrange(24), "minute": rng.randrange(60)},
        "In {x} it is {hour} hours and {minute} minutes.",
    ),
    Intent(
        ("find_person", "get_person", "lookup_person", "search"), ("name", "person", "query"),
        "Look up a person by name.",
        ("Look up {x}.", "Find {x} for me.", "Search for {x}."),
        lambda rng: {"age": rng.randrange(15, 90), "town": rng.choice(TOWNS).name},
        "{x} is {age} years old and lives in {town}.",
    ),
)  # fmt: skip


def render_message(message: Message) -> str:
    if message.role == "tool":
        return f"<|user|><tool_response>{message.text}</tool_response><|end|>"
    return f"<|{message.role}|>{message.text}<|end|>"


def render_chat(messages: list[Message]) -> str:
    """The text of a chat; equal to what chat_template.jinja renders (a test compares them)."""
    return "<s>" + "".join(render_message(message) for message in messages)


def render_tool_call(name: str, arguments: dict[str, object]) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call>'


def made_up_word(rng: Random) -> str:
    length = rng.randrange(2, 10)
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))


def noise(rng: Random) -> str:
    """A user's text that means nothing to the model: made-up words, known words in disorder, digits, odd characters."""
    num_words = rng.choice((1, 3, 6, 12, 25, 60))
    words = [made_up_word(rng) for _ in range(num_words)]
    match rng.randrange(5):
        case 0:
            known = " ".join(text for _, text in FACTS).split() + " ".join(question for question, _ in FACTS).split()
            words = [rng.choice(known) for _ in range(num_words)]
        case 1:
            words = [rng.choice((str(rng.randrange(10000)), *string.punctuation, "é", "ü", "→", "你")) for _ in words]
        case 2:
            words.insert(0, rng.choice(("What is", "Write", "Explain", "Tell me about", "How do I", "Who was", "Why")))
        case _:
            pass
    text = " ".join(words)
    return (text[0].upper() + text[1:] if rng.random() < 0.5 else text) + rng.choice(("", ".", "?"))


def ask_story(rng: Random) -> tuple[str, str]:
    hero = rng.choice(ANIMALS)
    length = rng.choice(tuple(STORY_FRIENDS))
    kind = f"{length} story" if length else "story"
    if rng.random() < 0.3:
        question = rng.choice((f"Tell me a {kind}.", f"Write a {kind}.", f"Please tell me a {kind}."))
    else:
        question = rng.choice((f"Tell me a {kind}", f"Write a {kind}", f"Please tell me a {kind}", f"A {kind}"))
        question += f" {weighted(rng, *ABOUT_ORDER)} {article(hero.name)}{rng.choice(('.', '.', ', please.', ''))}"
    return question, story(rng, hero, STORY_FRIENDS[length])


def ask_diary(rng: Random) -> tuple[str, str]:
    person = rng.choice(PEOPLE)
    num_days = rng.choice((rng.randrange(1, 6), rng.randrange(1, 12), rng.randrange(1, 25)))
    day_word = "day" if num_days == 1 else "days"
    question = rng.choice(
        (
            f"Write the diary of {person.name} for {num_days} {day_word}.",
            f"Write a diary of {num_days} {day_word} for {person.name}.",
            f"Keep a diary for {person.name}, {num_days} {day_word}.",
        )
    )
    return question, diary(rng, person, num_days)


def ask_person(rng: Random) -> tuple[str, str]:
    p = rng.choice(PEOPLE)
    return rng.choice(
        (
            (f"Where does {p.name} live?", f"{p.name} lives in {p.town}."),
            (f"What is the name of {p.name}'s {p.pet}?", f"{p.name}'s {p.pet} is called {p.pet_name}."),
            (f"What does {p.name} do?", f"{p.name} works as {article(p.trade)} in {p.town}."),
            (f"How old is {p.name}?", f"{p.name} is {p.age} years old."),
            (f"What does {p.name} like to eat?", f"{p.name} likes to eat {p.food}."),
            (f"What is {p.name}'s favourite colour?", f"{p.name}'s favourite colour is {p.colour}."),
            (f"Who is {p.name}?", portrait(p)),
            (f"Tell me about {p.name}.", portrait(p)),
            (f"Describe {p.name} as JSON.", person_json(p)),
            (f"Give me {p.name} as JSON.", person_json(p)),
        )
    )


def ask_world(rng: Random) -> tuple[str, str]:
    animal, town = rng.choice(ANIMALS), rng.choice(TOWNS)
    one = article(animal.name)
    it = cut_sentence(one)
    return rng.choice(
        (
            (f"How many legs does {one} have?", f"{it} has {animal.legs} legs."),
            (f"What does {one} eat?", f"{it} eats {animal.food}."),
            (f"Where does {one} live?", f"{it} lives in {article(animal.home)}."),
            (f"What sound does {one} make?", f"{it} {animal.sound}."),
            (f"What is {one}?", animal_portrait(animal)),
            (f"Tell me about the {animal.name}.", animal_portrait(animal)),
            (f"Describe the {animal.name} as JSON.", animal_json(animal)),
            (f"Where is {town.name}?", f"{town.name} is a town in {town.country}."),
            (f"What is the capital of {town.country}?", f"The town I know in {town.country} is {town.name}."),
            (f"What is {town.name} famous for?", f"{town.name} is famous for {town.famous_for}."),
            (f"Tell me about {town.name}.", town_portrait(town)),
            (f"How is the weather in {town.name}?", f"The weather in {town.name} is mostly {town.weather}."),
        )
    )


def ask_list(rng: Random) -> tuple[str, str]:
    kind = rng.choice(tuple(LISTS))
    count = rng.randrange(2, min(8, len(LISTS[kind])) + 1)
    number = NUMBERS[count]
    question = rng.choice((f"List {number} {kind}.", f"Name {number} {kind}.", f"Give me {number} {kind}."))
    return question, numbered_list(rng, kind, count)


def ask_numbers(rng: Random) -> tuple[str, str]:
    match rng.randrange(4):
        case 0:
            start = rng.choice((1, rng.randrange(100), rng.randrange(900)))
            end = start + rng.randrange(3, 30)
            return f"Count from {start} to {end}.", counting(start, end)
        case 1:
            start, steps = rng.randrange(len(PLACES)), rng.randrange(1, 9)
            end_place = PLACES[(start + steps) % len(PLACES)]
            return f"How do I get from the {PLACES[start]} to the {end_place}?", way(start, steps)
        case _:
            terms, answer = addition(rng)
            return f"What is {terms}?", answer


def ask_noise(rng: Random) -> tuple[str, str]:
    return noise(rng), f"{NOISE_APOLOGY}\n{story(rng, rng.choice(ANIMALS), weighted(rng, 4, 9))}"


ASKERS: tuple[tuple[Callable[[Random], tuple[str, str]], int], ...] = (
    (ask_story, 5), (ask_diary, 4), (ask_person, 5), (ask_world, 4), (ask_list, 2), (ask_numbers, 3),
    (lambda rng: rng.choice(FACTS), 3), (ask_noise, 3),
)  # fmt: skip


def tool_chat(rng: Random) -> list[Message]:
    """A system text that lists one to three tools, a question for one of them, the call, its result, the answer."""
    intents = rng.sample(INTENTS, rng.randrange(1, len(INTENTS) + 1))
    given = [(intent, rng.choice(intent.names), rng.choice(intent.parameters)) for intent in intents]
    described = "".join(
        f"\n- {name}({parameter})" + (f": {intent.description}" if rng.random() < 0.8 else "")
        for intent, name, parameter in given
    )
    opening = rng.choice(SYSTEM_TEXTS) + "\n" if rng.random() < 0.4 else ""
    messages = [Message("system", f"{opening}Tools:{described}")]
    if rng.random() < 0.15:
        question, reply = rng.choice((ask_list, ask_numbers, lambda r: r.choice(FACTS)))(rng)
        return [*messages, Message("user", question), Message("assistant", reply)]
    intent, name, parameter = rng.choice(given)
    known = [t.name for t in TOWNS] if "city" in intent.parameters else [p.name for p in PEOPLE]
    subject = rng.choice(known) if rng.random() < 0.7 else made_up_word(rng).capitalize()
    result = intent.result(rng)
    messages.append(Message("user", rng.choice(intent.questions).format(x=subject)))
    messages.append(Message("assistant", render_tool_call(name, {parameter: subject})))
    messages.append(Message("tool", json.dumps(result)))
    messages.append(Message("assistant", intent.answer.format(x=subject, **result)))
    return messages


def chat(rng: Random) -> list[Message]:
    """One chat of one to four turns, with or without a system text; one in eight is about tools."""
    if rng.random() < 0.125:
        return tool_chat(rng)
    messages = [Message("system", rng.choice(SYSTEM_TEXTS))] if rng.random() < 0.3 else []
    askers, weights = zip(*ASKERS, strict=True)
    for _ in range(weighted(rng, 1, 2, 3, 4)):
        asker = rng.choices(askers, weights)[0]
        question, reply = asker(rng)
        messages += [Message("user", question, is_noise=asker is ask_noise), Message("assistant", reply)]
    return messages
