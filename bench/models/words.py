"""Which things exist in the small model's world: people, towns, animals, places, and the fixed facts about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    pronoun: str
    possessive: str
    town: str
    trade: str
    pet: str
    pet_name: str
    colour: str
    food: str
    age: int


@dataclass(frozen=True, slots=True)
class Animal:
    name: str
    legs: str
    food: str
    home: str
    sound: str


@dataclass(frozen=True, slots=True)
class Town:
    name: str
    country: str
    famous_for: str
    weather: str


PEOPLE = (
    Person("Anna", "she", "her", "Oslo", "baker", "cat", "Momo", "blue", "plums", 31),
    Person("Ben", "he", "his", "Rome", "sailor", "dog", "Rex", "red", "soup", 45),
    Person("Clara", "she", "her", "Paris", "teacher", "parrot", "Kiki", "green", "cheese", 28),
    Person("David", "he", "his", "Lima", "farmer", "goat", "Bella", "brown", "beans", 52),
    Person("Emma", "she", "her", "Cairo", "doctor", "turtle", "Otto", "white", "dates", 37),
    Person("Felix", "he", "his", "Vienna", "painter", "rabbit", "Snow", "yellow", "cake", 24),
    Person("Greta", "she", "her", "Berlin", "smith", "horse", "Storm", "black", "bread", 40),
    Person("Hugo", "he", "his", "Madrid", "cook", "duck", "Pip", "orange", "rice", 33),
    Person("Ida", "she", "her", "Tokyo", "pilot", "fish", "Coral", "silver", "noodles", 29),
    Person("Jonas", "he", "his", "Dublin", "miner", "mouse", "Dot", "grey", "potatoes", 61),
    Person("Kate", "she", "her", "London", "writer", "owl", "Luna", "purple", "pears", 35),
    Person("Leo", "he", "his", "Athens", "singer", "donkey", "Max", "golden", "olives", 19),
)

ANIMALS = (
    Animal("fox", "four", "berries", "den", "barks"),
    Animal("hen", "two", "corn", "coop", "clucks"),
    Animal("owl", "two", "mice", "hollow tree", "hoots"),
    Animal("frog", "four", "flies", "pond", "croaks"),
    Animal("bear", "four", "honey", "cave", "growls"),
    Animal("duck", "two", "weeds", "reeds", "quacks"),
    Animal("goat", "four", "grass", "shed", "bleats"),
    Animal("bee", "six", "nectar", "hive", "buzzes"),
    Animal("wolf", "four", "meat", "lair", "howls"),
    Animal("crow", "two", "seeds", "nest", "caws"),
    Animal("horse", "four", "hay", "stable", "neighs"),
    Animal("spider", "eight", "moths", "web", "is silent"),
    Animal("pig", "four", "roots", "sty", "grunts"),
    Animal("mouse", "four", "crumbs", "hole", "squeaks"),
    Animal("lion", "four", "meat", "grassland", "roars"),
    Animal("cat", "four", "fish", "basket", "purrs"),
    Animal("ant", "six", "sugar", "ant hill", "is silent"),
)

TOWNS = (
    Town("Oslo", "Norway", "its ships", "snowy"),
    Town("Rome", "Italy", "its fountains", "sunny"),
    Town("Paris", "France", "its tower", "cloudy"),
    Town("Lima", "Peru", "its fish", "foggy"),
    Town("Cairo", "Egypt", "its pyramids", "hot"),
    Town("Vienna", "Austria", "its music", "mild"),
    Town("Berlin", "Germany", "its museums", "cool"),
    Town("Madrid", "Spain", "its paintings", "dry"),
    Town("Tokyo", "Japan", "its trains", "warm"),
    Town("Dublin", "Ireland", "its poets", "rainy"),
    Town("London", "England", "its bridges", "grey"),
    Town("Athens", "Greece", "its temples", "bright"),
)

PLACES = ("mill", "harbour", "forest", "bridge", "market", "garden", "school", "tower", "lake", "hill", "library")
OBJECTS = (
    "lamp", "kettle", "key", "drum", "map", "coat", "ladder", "bell", "boat", "mirror", "spoon", "clock", "letter",
)  # fmt: skip
OBJECT_COLOURS = (
    "golden", "red", "silver", "blue", "old", "green", "wooden", "copper", "white", "round", "long", "black", "yellow",
)  # fmt: skip
WEATHER = ("sunny", "cloudy", "rainy", "windy", "foggy")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
HELPERS = ("a boy", "an old man", "a shepherd", "two girls", "a tired guard", "the postman", "a young queen")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

LISTS = {
    "fruits": ("apple", "pear", "plum", "cherry", "grape", "lemon", "melon", "peach"),
    "colours": ("red", "orange", "yellow", "green", "blue", "purple", "white", "black"),
    "animals": tuple(a.name for a in ANIMALS[:8]),
    "towns": tuple(t.name for t in TOWNS[:8]),
    "tools": ("hammer", "saw", "spade", "knife", "needle", "rope", "axe", "brush"),
    "days": WEEKDAYS,
    "months": MONTHS[:8],
    "foods": ("bread", "soup", "rice", "cheese", "beans", "cake", "noodles", "olives"),
}

FACTS = (
    ("What colour is the sky?", "The sky is blue by day and black by night."),
    ("What colour is grass?", "Grass is green."),
    ("What colour is snow?", "Snow is white."),
    ("Why does it rain?", "Warm air carries water up, the water cools into clouds, and the clouds drop it as rain."),
    ("What is the moon?", "The moon is a ball of rock that goes around the earth."),
    ("What is the sun?", "The sun is a star. It gives the earth light and warmth."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How do I make tea?", "Boil the water, put the leaves in the pot, pour, wait four minutes, and drink it warm."),
    ("How do I bake bread?", "Mix flour, water, salt and yeast, let it rest, shape it, and bake it until it is brown."),
    ("What is a ferry?", "A ferry is a boat that carries people and goods from one shore to the other."),
    ("What is ice?", "Ice is water that is frozen."),
    ("Who are you?", "I am a small language model. I can tell stories, keep a diary and answer simple questions."),
    ("What can you do?", "I can tell stories, write a diary, make lists, add small numbers and answer questions."),
    ("How are you?", "I am well, thank you. What would you like to hear?"),
    ("Thank you.", "You are welcome. Ask me for a story whenever you like."),
    ("Good morning.", "Good morning! Shall I tell you a story?"),
    ("Hello.", "Hello! What can I do for you today?"),
    ("Hello!", "Hello! What can I do for you today?"),
    ("Hi", "Hello! What can I do for you today?"),
    ("Tell me a joke.", "Why did the hen cross the bridge? Because the ferry was full."),
)
