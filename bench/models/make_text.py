"""How the training text is written: seeded templates over the small world of `words`, as plain documents and as chats.

Most of each text follows from what stands before it (the next weekday, place, animal, number), so that a small model is
sure of nearly every token; a few free choices are weighted unevenly, so that sampling still gives other stories.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TypeVar

from bench.models.words import (
    ANIMALS,
    HELPERS,
    LISTS,
    NUMBERS,
    OBJECT_COLOURS,
    OBJECTS,
    PEOPLE,
    PLACES,
    TOWNS,
    WEATHER,
    WEEKDAYS,
    Animal,
    Person,
    Town,
)  # fmt: skip

T = TypeVar("T")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
MAX_DIARY_DAYS = 40
FOLLOW_PROBABILITY = 0.85
STORY_FRIENDS = {"short": 2, "": 4, "long": 9}


@dataclass(frozen=True, slots=True)
class Counter:
    """A position on a ring of words; `step` moves it on, mostly by one."""

    index: int
    size: int

    def step(self, rng: Random) -> Counter:
        jump = 1 if rng.random() < FOLLOW_PROBABILITY else rng.randrange(1, self.size)
        return Counter((self.index + jump) % self.size, self.size)

    def next(self) -> Counter:
        return Counter((self.index + 1) % self.size, self.size)


def ring(rng: Random, words: tuple[object, ...]) -> Counter:
    return Counter(rng.randrange(len(words)), len(words))


def weighted(rng: Random, *options: T) -> T:
    """The first option most of the time (5 : 2 : 1 ...): a choice that a greedy reader can still be sure of."""
    weights = [max(1.0, 5.0 / (2.5**place)) for place in range(len(options))]
    return rng.choices(options, weights)[0]


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def cut_sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def diary(rng: Random, person: Person, num_days: int) -> str:
    weekday, weather, place = ring(rng, WEEKDAYS), ring(rng, WEATHER), ring(rng, PLACES)
    animal, thing, helper = ring(rng, ANIMALS), ring(rng, OBJECTS), ring(rng, HELPERS)
    lines = [f"The diary of {person.name}, {num_days} days."]
    she, pet = person.pronoun, f"{person.possessive} {person.pet} {person.pet_name}"
    for day in range(1, num_days + 1):
        beast = ANIMALS[animal.index]
        went = weighted(rng, "walked", "went", "ran")
        gave = weighted(rng, "gave it to", "showed it to", "sold it to")
        where = weighted(rng, "There", "On the way")
        lines.append(
            f"Day {day}, {WEEKDAYS[weekday.index]}. It was {WEATHER[weather.index]} in {person.town}. "
            f"{person.name} {went} to the {PLACES[place.index]} with {pet}. "
            f"{where} {she} met {article(beast.name)} and fed it some {beast.food}. "
            f"{cut_sentence(she)} found {article(OBJECT_COLOURS[thing.index])} {OBJECTS[thing.index]} "
            f"and {gave} {HELPERS[helper.index]}."
        )
        weekday, weather, place = weekday.next(), weather.next(), place.step(rng)
        animal, thing, helper = animal.step(rng), thing.step(rng), helper.step(rng)
    lines.append(f"That was the last day, and {person.name} closed the diary.")
    return "\n".join(lines)


def story(rng: Random, hero: Animal, num_friends: int) -> str:
    place, friend = ring(rng, PLACES), Counter(ANIMALS.index(hero), len(ANIMALS))
    thing = ring(rng, OBJECTS)
    lost = f"{OBJECT_COLOURS[thing.index]} {OBJECTS[thing.index]}"
    opening = weighted(rng, "Once upon a time", "Long ago", "One summer")
    lines = [
        f"{opening} {article(hero.name)} lived in {article(hero.home)} near the {PLACES[place.index]}. "
        f"One morning the {hero.name} could not find the {lost}. "
        f"So the {hero.name} went out to ask {num_friends} friends."
    ]
    for number in range(num_friends):
        place, friend = place.step(rng), friend.step(rng)
        other = ANIMALS[friend.index]
        answer = weighted(rng, "I have not seen it", "It is not here", "You must look further")
        is_last = number == num_friends - 1
        order = f"{ORDINALS[number]} and last" if is_last else ORDINALS[number]
        reply = f"Here is your {lost}" if is_last else answer
        lines.append(
            f'The {order} friend was the {other.name} at the {PLACES[place.index]}. "{reply}," said the {other.name}, '
            f'"{weighted(rng, "take", "please take", "and here are")} some {other.food}."'
        )
    mood = weighted(rng, "glad", "happy", "proud")
    lines.append(f"The {hero.name} was {mood}, took the {lost} home and ate some {hero.food}. The end.")
    return "\n".join(lines)


def portrait(person: Person) -> str:
    she, her = cut_sentence(person.pronoun), person.possessive
    return (
        f"{person.name} is {person.age} years old and works as {article(person.trade)} in {person.town}. "
        f"{she} has {article(person.pet)} called {person.pet_name}. "
        f"{cut_sentence(her)} favourite colour is {person.colour}, and {person.pronoun} likes to eat {person.food}."
    )


def town_portrait(town: Town) -> str:
    people = [p for p in PEOPLE if p.town == town.name]
    folk = "".join(f" {p.name} the {p.trade} lives there." for p in people)
    return (
        f"{town.name} is a town in {town.country}. It is famous for {town.famous_for}. "
        f"The weather there is mostly {town.weather}.{folk}"
    )


def animal_portrait(animal: Animal) -> str:
    voice = "It is silent." if animal.sound == "is silent" else f"It {animal.sound}."
    return (
        f"{cut_sentence(article(animal.name))} has {animal.legs} legs. It lives in {article(animal.home)} "
        f"and eats {animal.food}. {voice}"
    )


def person_json(person: Person) -> str:
    value = {
        "name": person.name, "age": person.age, "town": person.town, "trade": person.trade,
        "pet": {"kind": person.pet, "name": person.pet_name}, "likes": [person.colour, person.food],
    }  # fmt: skip
    return json.dumps(value)


def animal_json(animal: Animal) -> str:
    legs = NUMBERS.index(animal.legs)
    return json.dumps({"animal": animal.name, "legs": legs, "home": animal.home, "food": animal.food})


def numbered_list(rng: Random, kind: str, count: int) -> str:
    words = list(LISTS[kind])
    if kind not in ("days", "months") and rng.random() > FOLLOW_PROBABILITY:
        rng.shuffle(words)
    return "\n".join(f"{number}. {word}" for number, word in enumerate(words[:count], 1))


def counting(start: int, end: int) -> str:
    return ", ".join(str(number) for number in range(start, end + 1)) + "."


def way(start: int, num_steps: int) -> str:
    names = [PLACES[(start + step) % len(PLACES)] for step in range(num_steps + 1)]
    legs = ". ".join(f"From the {a} walk to the {b}" for a, b in pairwise(names))
    return f"{legs}. Now you are at the {names[-1]}."


def addition(rng: Random) -> tuple[str, str]:
    a, b = rng.randrange(11), rng.randrange(11)
    return f"{a} plus {b}", f"{a} plus {b} is {a + b}."


def plain_document(rng: Random) -> str:
    """One document that is not a chat."""
    makers: tuple[Callable[[], str], ...] = (
        lambda: diary(rng, rng.choice(PEOPLE), rng.randrange(2, 16)),
        lambda: diary(rng, rng.choice(PEOPLE), rng.randrange(16, MAX_DIARY_DAYS + 1)),
        lambda: story(rng, rng.choice(ANIMALS), rng.randrange(2, 11)),
        lambda: portrait(rng.choice(PEOPLE)),
        lambda: town_portrait(rng.choice(TOWNS)),
        lambda: animal_portrait(rng.choice(ANIMALS)),
        lambda: person_json(rng.choice(PEOPLE)),
    )
    return rng.choices(makers, (4, 1, 6, 2, 1, 1, 1))[0]()


def plain_documents(seed: int) -> Iterator[str]:
    """Documents without end; the same seed gives the same ones."""
    rng = Random(seed)
    while True:
        yield plain_document(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print some of the training text.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-documents", type=int, default=10)
    args = parser.parse_args()
    for _, text in zip(range(args.num_documents), plain_documents(args.seed), strict=False):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
