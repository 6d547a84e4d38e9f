"""What do the demo's prompts say? Questions and diaries in the small model's own language, of about a wanted length."""

from __future__ import annotations

from random import Random

# The sentences follow the text that bench/models trains on (the distribution's core imports nothing from bench/).
PEOPLE = (
    ("Anna", "she", "her", "Oslo", "cat", "Momo"),
    ("Ben", "he", "his", "Rome", "dog", "Rex"),
    ("Clara", "she", "her", "Paris", "parrot", "Kiki"),
    ("David", "he", "his", "Lima", "goat", "Bella"),
    ("Emma", "she", "her", "Cairo", "turtle", "Otto"),
    ("Felix", "he", "his", "Vienna", "rabbit", "Snow"),
    ("Greta", "she", "her", "Berlin", "horse", "Storm"),
    ("Hugo", "he", "his", "Madrid", "duck", "Pip"),
    ("Ida", "she", "her", "Tokyo", "fish", "Coral"),
    ("Jonas", "he", "his", "Dublin", "mouse", "Dot"),
    ("Kate", "she", "her", "London", "owl", "Luna"),
    ("Leo", "he", "his", "Athens", "donkey", "Max"),
)
ANIMALS = (
    ("fox", "berries"),
    ("hen", "corn"),
    ("frog", "flies"),
    ("bear", "honey"),
    ("duck", "weeds"),
    ("goat", "grass"),
)
HEROES = ("fox", "hen", "frog", "bear", "duck", "goat", "bee", "wolf", "crow", "horse", "spider", "pig", "lion", "cat")
THINGS = (
    "golden lamp",
    "red kettle",
    "silver key",
    "blue drum",
    "old map",
    "green coat",
    "wooden ladder",
    "copper bell",
)
PLACES = ("mill", "harbour", "forest", "bridge", "market", "garden", "school", "tower", "lake", "hill", "library")
WEATHER = ("sunny", "cloudy", "rainy", "windy", "foggy")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HELPERS = ("a boy", "an old man", "a shepherd", "two girls", "a tired guard", "the postman", "a young queen")

TOKENS_PER_DAY = 55
"""Tokens of one day of a diary with the small model's tokenizer (about 50 to 60)."""
MAX_DIARY_DAYS = 40
"""The longest diary the model has seen."""


def question(rng: Random, output_tokens: int) -> str:
    """A user's question whose natural answer has about `output_tokens` tokens."""
    person = rng.choice(PEOPLE)[0]
    if output_tokens <= 2 * TOKENS_PER_DAY:
        return rng.choice(
            (f"Tell me about {person}.", f"Tell me a short story about a {rng.choice(HEROES)}.", f"Who is {person}?")
        )
    if output_tokens <= 8 * TOKENS_PER_DAY and rng.random() < 0.4:
        return f"Tell me a long story about a {rng.choice(HEROES)}."
    num_days = min(MAX_DIARY_DAYS, max(3, round(output_tokens / TOKENS_PER_DAY)))
    return f"Write the diary of {person} for {num_days} days."


def diary(rng: Random, prompt_tokens: int, output_tokens: int) -> str:
    """The beginning of a diary, about `prompt_tokens` long, that goes on for about `output_tokens` more."""
    name, pronoun, possessive, town, pet, pet_name = rng.choice(PEOPLE)
    num_days = max(1, round(prompt_tokens / TOKENS_PER_DAY))
    planned = min(MAX_DIARY_DAYS, num_days + max(1, round(output_tokens / TOKENS_PER_DAY)))
    weekday, weather, place, animal, thing, helper = (rng.randrange(60) for _ in range(6))
    lines = [f"The diary of {name}, {max(planned, num_days + 1)} days."]
    for day in range(1, num_days + 1):
        beast, food = ANIMALS[(animal + day) % len(ANIMALS)]
        found = THINGS[(thing + day) % len(THINGS)]
        article = "an" if found[0] in "aeiou" else "a"
        lines.append(
            f"Day {day}, {WEEKDAYS[(weekday + day) % 7]}. It was {WEATHER[(weather + day) % 5]} in {town}. "
            f"{name} walked to the {PLACES[(place + day) % len(PLACES)]} with {possessive} {pet} {pet_name}. "
            f"There {pronoun} met a {beast} and fed it some {food}. {pronoun.capitalize()} found {article} {found} "
            f"and gave it to {HELPERS[(helper + day) % len(HELPERS)]}."
        )
    return "\n".join(lines)
