"""The training text of the small model: repeatable, clean, and in the form that its chat template gives."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from random import Random

import jinja2
import pytest

from bench.models.make_chats import Message, chat, render_chat, render_tool_call, tool_chat
from bench.models.make_text import diary, person_json, plain_documents, story
from bench.models.words import ANIMALS, OBJECT_COLOURS, OBJECTS, PEOPLE, WEEKDAYS

TEMPLATE = Path(__file__).parents[2] / "bench" / "models" / "chat_template.jinja"
NUM_DOCUMENTS = 200


def documents(seed: int) -> list[str]:
    return list(islice(plain_documents(seed), NUM_DOCUMENTS))


def chats(seed: int) -> list[list[Message]]:
    rng = Random(seed)
    return [chat(rng) for _ in range(NUM_DOCUMENTS)]


def render_with_template(messages: list[dict[str, object]], **given: object) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers sets it up
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(messages=messages, bos_token="<s>", **given)


def test_the_same_seed_gives_the_same_text() -> None:
    assert documents(3) == documents(3)
    assert chats(3) == chats(3)


def test_different_seeds_give_different_text() -> None:
    assert documents(3) != documents(4)
    assert chats(3) != chats(4)


def test_documents_hardly_repeat() -> None:
    longer = [text for text in documents(5) if len(text) > 300]
    assert len(set(longer)) == len(longer)


def test_plain_text_is_printable_ascii() -> None:
    for text in documents(6):
        assert text.isascii()
        assert all(character.isprintable() or character == "\n" for character in text)


def test_chats_are_clean_utf8_without_control_tokens_in_their_texts() -> None:
    for messages in chats(7):
        for message in messages:
            assert message.text.encode("utf-8").decode("utf-8") == message.text
            assert message.text.strip() == message.text != ""
            assert "<|" not in message.text
            assert "<s>" not in message.text


def test_text_is_made_of_sentences() -> None:
    for text in documents(8):
        if text.startswith("{"):
            json.loads(text)
            continue
        assert re.fullmatch(r'[A-Z].*[.!?]"?', text, flags=re.DOTALL)
        assert "  " not in text
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text)


def test_a_diary_counts_its_days_and_weekdays_on() -> None:
    text = diary(Random(1), PEOPLE[0], 12)
    found = re.findall(r"^Day (\d+), (\w+)\.", text, flags=re.MULTILINE)
    assert [int(day) for day, _ in found] == list(range(1, 13))
    first = WEEKDAYS.index(found[0][1])
    assert [weekday for _, weekday in found] == [WEEKDAYS[(first + day) % 7] for day in range(12)]


def test_a_story_has_as_many_friends_as_it_says() -> None:
    text = story(Random(2), ANIMALS[0], 6)
    assert "to ask 6 friends" in text
    assert len(re.findall(r"^The \w+(?: and last)? friend was", text, flags=re.MULTILINE)) == 6


def test_every_object_has_a_colour() -> None:
    assert len(OBJECTS) == len(OBJECT_COLOURS)


def test_a_person_as_json_is_json() -> None:
    assert json.loads(person_json(PEOPLE[2]))["town"] == PEOPLE[2].town


def test_tool_calls_name_a_tool_that_was_given() -> None:
    rng = Random(9)
    num_calls = 0
    for _ in range(100):
        messages = tool_chat(rng)
        for message in messages:
            if message.text.startswith("<tool_call>"):
                call = json.loads(message.text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
                (parameter,) = call["arguments"]
                assert f"- {call['name']}({parameter})" in messages[0].text
                num_calls += 1
    assert num_calls > 50


@pytest.mark.parametrize("seed", range(20))
def test_the_chat_template_renders_chats_as_the_training_text_does(seed: int) -> None:
    messages = chat(Random(seed))
    given: list[dict[str, object]] = [{"role": message.role, "content": message.text} for message in messages]
    assert render_with_template(given) == render_chat(messages)


def test_the_chat_template_renders_tools_and_calls_as_the_training_text_does() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "get_weather", "description": "Get the current weather in a city.", "parameters": parameters}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    result = '{"weather": "snowy", "degrees": 3}'
    rendered = render_with_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the weather in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": result},
        ],
        tools=[{"type": "function", "function": function}],
        add_generation_prompt=True,
    )
    expected = render_chat(
        [
            Message("system", "Be brief.\nTools:\n- get_weather(city): Get the current weather in a city."),
            Message("user", "What is the weather in Oslo?"),
            Message("assistant", render_tool_call("get_weather", {"city": "Oslo"})),
            Message("tool", result),
        ]
    )
    assert rendered == expected + "<|assistant|>"
    assert render_with_template([], tools=None) != rendered
