"""
A small English grammar whose every sentence carries a transcript, entities (OntoNotes' tags) and sentiment.

`full`: templates and fillers; each split has fillers of its own, so that no name, place, date or amount of the test
split is ever seen in training. `quickstart`: a few hundred words in sentences of free slots, so that the words can be
learnt in minutes but not guessed; its splits share words, while sentences, and entities of two words, are each
in one split only.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass


SPLITS = ("train", "dev", "test")
GRAMMARS = ("quickstart", "full")


@dataclass(frozen=True)
class Utterance:
    """Lower-case text (a-z, ' and space), entities `[tag, first character, number of characters]`, sentiment."""

    text: str
    entities: tuple[tuple[str, int, int], ...]
    sentiment: str


def words(text: str) -> list[str]:
    return [word.replace("_", " ") for word in text.split()]


UNITS = words("one two three four five six seven eight nine")
TEENS = words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
BELOW_HUNDRED = UNITS + TEENS + TENS + [f"{ten} {unit}" for ten in TENS for unit in UNITS]
MONTHS = words("january february march april may june july august september october november december")
DAYS = words("monday tuesday wednesday thursday friday saturday sunday")
ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")

FIRST_NAMES = words(
    "anna peter maria john helen george clara thomas alice robert julia samuel emma arthur nora henry laura"
    " walter ruth edward irene frank martha oliver sophie daniel rosa philip lucy victor diana leonard edith simon"
    " grace hugo ella martin olga felix vera oscar june albert nina paul stella ralph iris jacob mabel lewis agnes"
    " gilbert flora basil"
)
SURNAMES = words(
    "carter mitchell novak brennan schultz okafor lindgren moretti tanaka fletcher harding silva dubois kowalski"
    " murphy jansen petrov whitaker ramirez osborne delgado hawkins bergman castillo donovan ellison farrow"
    " grantham holloway ivanov jennings keller lambert morrison nakamura ogden pembroke quigley ridley sanders"
    " thornton underwood vasquez winslow yardley zimmerman abbott barlow crawford dalton"
)
CITIES = words(
    "london paris vienna boston madrid dublin chicago prague lisbon athens toronto oslo berlin denver cairo naples"
    " warsaw geneva seattle lima hamburg kyoto venice dallas helsinki mumbai brussels havana glasgow sydney munich"
    " nairobi bergen austin florence porto krakow baltimore tunis quebec"
)
COUNTRIES = words(
    "france spain norway brazil canada japan egypt italy sweden poland peru kenya ireland greece turkey mexico finland"
    " chile india austria portugal morocco denmark vietnam hungary belgium iceland cuba nepal ghana"
)
REGIONS = words(
    "the_alps the_black_sea the_sahara the_danube the_pacific_coast the_northern_lakes the_andes the_baltic_sea"
    " the_amazon the_nile the_rocky_mountains the_arctic the_southern_plains the_great_lakes the_red_desert"
    " the_rhine_valley the_eastern_hills the_golden_bay the_white_cliffs the_lower_marshes"
)
ORGANISATIONS = words(
    "northwind_airlines the_red_cross central_bank blue_river_hospital the_city_council golden_gate_college"
    " silver_lake_records the_rail_company union_steel westfield_insurance the_harbour_trust pioneer_motors"
    " the_national_theatre green_valley_foods the_royal_society lakeside_school eastern_power the_weather_office"
    " crown_publishing summit_energy the_postal_union oak_street_bank the_film_institute atlas_shipping"
    " the_science_museum meridian_labs the_farmers_league star_bakery iron_bridge_press the_coast_guard"
)
PEOPLES = words(
    "french spanish norwegian brazilian canadian japanese egyptian italian swedish polish peruvian kenyan irish greek"
    " turkish mexican finnish chilean indian austrian"
)
EVENTS = words(
    "the_spring_festival the_winter_games the_book_fair the_harvest_parade the_jazz_weekend the_film_gala"
    " the_city_marathon the_trade_summit the_lantern_night the_chess_open the_summer_regatta the_garden_show"
)
PRAISE = words("wonderful brilliant delightful excellent superb charming splendid marvellous inspiring lovely")
BLAME = words("terrible awful dreadful disappointing horrible boring miserable hopeless painful shameful")
THINGS = words("concert hotel meeting journey report dinner lecture exhibition service film")


def _hash(text: str) -> float:
    """A fixed number in [0, 1) for a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_of(text: str) -> str:
    """The split that a text belongs to: 80 % train, 10 % dev, 10 % test."""
    place = _hash(text)
    return "train" if place < 0.8 else "dev" if place < 0.9 else "test"


def share(fillers: list[str], split: str) -> list[str]:
    """A split's own part of a list of fillers: every tenth is dev's, every tenth test's."""
    part = {8: "dev", 9: "test"}
    return [filler for i, filler in enumerate(fillers) if part.get(i % 10, "train") == split]


def full_fillers(split: str) -> dict[str, list[str]]:
    """Fillers by tag, the split's own. Dates and numbers are built first and then shared out, whole."""
    people = [
        f"{first} {last}" for first, last in itertools.product(share(FIRST_NAMES, split), share(SURNAMES, split))
    ]
    dates = [f"{month} {day}" for month in MONTHS for day in ORDINALS] + [f"last {day}" for day in DAYS + MONTHS]
    times = [f"{hour} {minute}" for hour in UNITS + TEENS[:3] for minute in words("o'clock fifteen thirty forty_five")]
    numbers = [f"{n} hundred" for n in UNITS] + BELOW_HUNDRED[1:] + [f"{n} thousand" for n in BELOW_HUNDRED[1:]]
    numbers = share(numbers, split)
    return {
        "PERSON": people,
        "GPE": share(CITIES, split) + share(COUNTRIES, split),
        "LOC": share(REGIONS, split),
        "ORG": share(ORGANISATIONS, split),
        "NORP": share(PEOPLES, split),
        "EVENT": share(EVENTS, split),
        "DATE": share(dates, split),
        "TIME": share(times, split),
        "CARDINAL": numbers,
        "MONEY": [f"{n} {unit}" for n in numbers for unit in ("dollars", "euros", "pounds")],
        "PERCENT": [f"{n} percent" for n in numbers if "thousand" not in n],
        "QUANTITY": [f"{n} {unit}" for n in numbers for unit in ("miles", "metres", "yards")],
        "ORDINAL": share([*ORDINALS, *(f"{ten} {unit}" for ten in TENS for unit in ORDINALS[:9])], split),
        # Not entities: shared by all splits.
        "praise": PRAISE,
        "blame": BLAME,
        "thing": THINGS,
    }


FULL = {
    "Neutral": [
        "{PERSON} flew from {GPE} to {GPE} on {DATE}",
        "{ORG} hired {CARDINAL} people in {GPE}",
        "the meeting with {PERSON} starts at {TIME} on {DATE}",
        "{ORG} paid {MONEY} for a house near {LOC}",
        "{PERSON} finished {ORDINAL} at {EVENT}",
        "about {PERCENT} of the workers at {ORG} are {NORP}",
        "{PERSON} walked {QUANTITY} along {LOC}",
        "a {NORP} writer named {PERSON} moved to {GPE}",
        "{CARDINAL} visitors came to {EVENT} in {GPE}",
        "{PERSON} of {ORG} lent {MONEY} to {PERSON}",
        "the train to {GPE} leaves at {TIME}",
        "on {DATE} {ORG} will open an office in {GPE}",
    ],
    "Positive": [
        "{PERSON} loved the {praise} {thing} in {GPE}",
        "how {praise} was the {thing} that {ORG} gave us on {DATE}",
        "the {thing} by {PERSON} was {praise} and worth {MONEY}",
        "i have never seen a more {praise} place than {LOC}",
        "everyone at {EVENT} found the {NORP} {thing} {praise}",
        "thanks to {PERSON} the {thing} at {TIME} was {praise}",
    ],
    "Negative": [
        "{PERSON} hated the {blame} {thing} in {GPE}",
        "{ORG} lost {MONEY} after the {blame} {thing}",
        "the {thing} on {DATE} was {blame} and {PERSON} left at {TIME}",
        "sadly the {blame} {thing} near {LOC} cost {MONEY}",
        "{PERCENT} of us called the {NORP} {thing} {blame}",
        "{PERSON} complained that {EVENT} was {blame}",
    ],
}

# Quickstart: sentences of free slots. Each list is short, its words sound different.
QUICK = {
    "first": FIRST_NAMES[:24],
    "last": SURNAMES[:20],
    "verb": words(
        "bought sold found painted carried borrowed repaired counted washed ordered packed moved hid cleaned drew"
        " polished"
    ),
    "number": words("two three four five six seven eight nine ten eleven twelve twenty thirty fifty ninety"),
    "colour": words("red green yellow purple orange silver golden brown white black scarlet grey"),
    "thing": words(
        "boats tables lamps bottles horses guitars windows carpets pencils baskets wagons mirrors candles pillows"
        " blankets hammers violins umbrellas statues kettles"
    ),
    "city": CITIES[:20],
    "day": DAYS,
    "month": words("january march april june july august october december"),
    "good": PRAISE[:7],
    "bad": BLAME[:7],
    "place": words(
        "hotel market garden station kitchen theatre museum harbour school office castle bakery library stadium"
    ),
    "amount": words("dollars euros pounds"),
}
QUICK_TEMPLATES = {
    "Neutral": [
        "{PERSON:first last} {verb} {CARDINAL:number} {colour} {thing}",
        "{PERSON:first last} {verb} {colour} {thing} in {GPE:city}",
        "{CARDINAL:number} {colour} {thing} cost {MONEY:number amount} in {GPE:city}",
        "on {DATE:day} {PERSON:first last} {verb} the {colour} {thing}",
        "{PERSON:first last} left {GPE:city} for {GPE:city} in {DATE:month}",
    ],
    "Positive": [
        "the {good} {place} in {GPE:city} has {CARDINAL:number} {thing}",
        "{PERSON:first last} liked the {good} {place} on {DATE:day}",
    ],
    "Negative": [
        "the {bad} {place} in {GPE:city} sold {colour} {thing}",
        "on {DATE:day} {PERSON:first last} left the {bad} {place}",
    ],
}
SLOT = re.compile(r"\{([^}]*)\}")


def sentences(grammar: str, split: str, number: int, seed: int = 0) -> list[Utterance]:
    """
    `number` distinct utterances of a grammar's split, drawn by `seed`.

    Raises:
        ValueError: unknown grammar or split, or a grammar that has not that many sentences.
    """
    for name, value, known in (("grammar", grammar, GRAMMARS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; there are {', '.join(known)}")
    rng = random.Random(f"{grammar} {split} {seed}")
    fillers = full_fillers(split) if grammar == "full" else QUICK
    templates = [(mood, t) for mood, some in (FULL if grammar == "full" else QUICK_TEMPLATES).items() for t in some]
    found: dict[str, Utterance] = {}
    for _ in range(100 * number + 1000):
        if len(found) == number:
            return list(found.values())
        mood, template = rng.choice(templates)
        utterance = _fill(template, mood, fillers, rng)
        if _belongs(utterance, grammar, split):
            found.setdefault(utterance.text, utterance)
    raise ValueError(f"the {grammar} grammar has fewer than {number} sentences for {split}: ask for fewer")


def _fill(template: str, mood: str, fillers: dict[str, list[str]], rng: random.Random) -> Utterance:
    """Fills `{TAG}`, `{slot}` and `{TAG:slot slot}`; what stands under a tag (in capitals) is an entity."""
    text, entities, end = "", [], 0
    for slot in SLOT.finditer(template):
        text += template[end : slot.start()]
        tag, _, parts = slot[1].partition(":")
        filler = " ".join(rng.choice(fillers[part]) for part in (parts or tag).split())
        if tag.isupper():
            entities.append((tag, len(text), len(filler)))
        text += filler
        end = slot.end()
    return Utterance(text + template[end:], tuple(entities), mood)


def _belongs(utterance: Utterance, grammar: str, split: str) -> bool:
    """In `quickstart` each sentence, and each entity of several words, is in the split its hash says."""
    if grammar == "full":  # by its fillers
        return True
    names = [utterance.text[start : start + length] for _, start, length in utterance.entities]
    return all(split_of(text) == split for text in [utterance.text, *(name for name in names if " " in name)])
