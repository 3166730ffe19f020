"""Rows for the tasks whose training data the project makes itself.

Pure: the same split gives the same rows each time. The held-out split shares neither wordings nor
fillers (products, names, years) with the training split, so a score on it is not memory.
"""

import random
from calendar import month_abbr, month_name, monthrange
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Literal

import msgspec

Split = Literal["train", "dev"]

_SEEDS: Mapping[Split, int] = {"train": 11, "dev": 12}
_COUNTS: Mapping[Split, int] = {"train": 512, "dev": 200}


class Row(msgspec.Struct, frozen=True):
    """One example: what is asked, the right answer, and the split it belongs to."""

    prompt: str
    response: str
    split: Split


_PRODUCTS: Mapping[Split, Sequence[str]] = {
    "train": ("kettle", "lamp", "bicycle", "jacket", "camera", "tent", "desk", "blender"),
    "dev": ("toaster", "backpack", "guitar", "heater", "monitor", "stroller"),
}
_DAYS: Mapping[Split, Sequence[str]] = {
    "train": ("Monday", "Tuesday", "last week", "yesterday", "in March", "on the 3rd"),
    "dev": ("Friday", "this morning", "in July", "two days ago"),
}
_TICKETS: Mapping[Split, Mapping[str, Sequence[str]]] = {
    "train": {
        "billing": (
            "I was charged twice for the {product}.",
            "The invoice for my {product} shows the wrong amount.",
            "Why did my card get billed {day}?",
            "The discount code was not applied to the {product}.",
            "I need a receipt with VAT for the {product}.",
            "My payment for the {product} was declined {day}.",
        ),
        "shipping": (
            "My {product} has not arrived yet.",
            "The tracking number of my {product} does not work.",
            "When will the {product} be delivered?",
            "The courier left the {product} at the wrong house {day}.",
            "Can you send the {product} to another address?",
            "The parcel with my {product} has been stuck since {day}.",
        ),
        "returns": (
            "I want to send the {product} back.",
            "The {product} is too small, can I exchange it?",
            "How do I return the {product} I bought {day}?",
            "I changed my mind about the {product} and want to give it back.",
            "Please send me a return label for the {product}.",
            "Can I swap the {product} for another colour?",
        ),
        "technical": (
            "The {product} does not turn on.",
            "My {product} stopped working {day}.",
            "The {product} makes a strange noise.",
            "How do I update the software of my {product}?",
            "The {product} shows an error since {day}.",
            "A button of the {product} is broken.",
        ),
        "account": (
            "I forgot my password.",
            "I cannot log in since {day}.",
            "Please change the email address of my profile.",
            "How do I delete my user profile?",
            "Somebody else signed in as me {day}.",
            "I want to change my user name.",
        ),
    },
    "dev": {
        "billing": (
            "You took the money for the {product} two times!",
            "There is a fee on my bill {day} that I do not understand.",
            "Can I pay for the {product} in instalments?",
            "The price I paid for the {product} is higher than advertised.",
        ),
        "shipping": (
            "Where is my {product}? I ordered it {day}.",
            "The {product} was due {day} and still is not here.",
            "How long does the delivery of a {product} take?",
            "The driver did not find my house {day}.",
        ),
        "returns": (
            "I don't like the {product}, how can I send it back to you?",
            "The {product} is the wrong size and I would like to exchange it.",
            "Until when may I return a {product} bought {day}?",
            "I'd rather have a different {product}, can I swap it?",
        ),
        "technical": (
            "The {product} broke {day} and does nothing any more.",
            "My {product} keeps switching itself off.",
            "The screen of the {product} stays black.",
            "The {product} will not connect to the wifi.",
        ),
        "account": (
            "The site says my password is wrong.",
            "How can I sign in with a new email address?",
            "Close my profile, please, I registered {day}.",
            "I did not get the code to log in {day}.",
        ),
    },
}

_YEARS: Mapping[Split, range] = {"train": range(1950, 2020), "dev": range(2020, 2040)}
_WORDINGS: Mapping[Split, Sequence[str]] = {
    "train": (
        "{day} {month} {year}",
        "{month} {day}, {year}",
        "the {ordinal} of {month} {year}",
        "{weekday}, {month} {ordinal}, {year}",
        "{day} {short} {year}",
        "{weekday} {day} {month} {year}",
    ),
    "dev": (
        "{month} the {ordinal}, {year}",
        "{weekday}, {day} {short} {year}",
        "{short} {day}, {year}",
        "{ordinal} {month} {year}",
    ),
}


def ticket_rows(split: Split, count: int = 0) -> list[Row]:
    """Customers' messages and the department each belongs to, in equal numbers; `count` of them in
    place of the usual number, and the usual ones are the first."""
    chance = random.Random(_SEEDS[split])
    labels = sorted(_TICKETS[split])
    rows: list[Row] = []
    for index in range(count or _COUNTS[split]):
        label = labels[index % len(labels)]
        wording = chance.choice(_TICKETS[split][label])
        product, day = chance.choice(_PRODUCTS[split]), chance.choice(_DAYS[split])
        rows.append(Row(wording.format(product=product, day=day), label, split))
    return rows


def date_rows(split: Split, count: int = 0) -> list[Row]:
    """Dates in many wordings and in ISO 8601; `count` as above."""
    chance = random.Random(_SEEDS[split])
    rows: list[Row] = []
    for _ in range(count or _COUNTS[split]):
        year, month = chance.choice(_YEARS[split]), chance.randint(1, 12)
        day = date(year, month, chance.randint(1, monthrange(year, month)[1]))
        rows.append(Row(_worded(day, chance.choice(_WORDINGS[split])), day.isoformat(), split))
    return rows


def _worded(day: date, wording: str) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return wording.format(
        day=day.day,
        ordinal=f"{day.day}{'th' if day.day in {11, 12, 13} else suffix}",
        month=month_name[day.month],
        short=month_abbr[day.month],
        weekday=day.strftime("%A"),
        year=day.year,
    )
