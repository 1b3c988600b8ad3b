"""Generated texts with a label: what stands in for the rows of GLUE, WiC and reviews; see `standin.py`."""

from __future__ import annotations

import random
from typing import Any

PEOPLE = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Frank",
    "Greta",
    "Henry",
    "Irene",
    "Jonas",
    "Karin",
    "Louis",
    "Maria",
    "Nadia",
    "Oscar",
    "Petra",
]
CITIES = [
    "Paris",
    "Berlin",
    "London",
    "Madrid",
    "Rome",
    "Vienna",
    "Lisbon",
    "Dublin",
    "Oslo",
    "Athens",
    "Prague",
    "Warsaw",
]
JOBS = ["teacher", "baker", "lawyer", "nurse", "pilot", "painter", "farmer", "singer", "doctor", "writer"]
THINGS = ["book", "lamp", "chair", "letter", "piano", "bicycle", "camera", "ticket", "garden", "boat"]
VERBS = {"bought": "purchased", "repaired": "fixed", "described": "portrayed", "found": "discovered", "sold": "traded"}
GOOD = ["wonderful", "moving", "brilliant", "funny", "charming", "clever", "beautiful", "gripping", "warm", "honest"]
BAD = ["dull", "awful", "boring", "clumsy", "tedious", "hollow", "messy", "tiresome", "lazy", "painful"]
PARTS = ["plot", "acting", "music", "dialogue", "ending", "camera", "pace", "script", "cast", "idea"]
SENSES = {
    "bank": (
        ["waited at the bank for money", "asked the bank for a loan"],
        ["sat on the bank of the river", "slept on the grassy bank"],
    ),
    "bat": (["hit the ball with a bat", "bought a wooden bat"], ["saw a bat fly at night", "found a bat in the cave"]),
    "crane": (
        ["lifted the steel with a crane", "drove a crane to the site"],
        ["watched a crane catch a fish", "painted a crane with white wings"],
    ),
    "match": (
        ["won the match by two goals", "watched the match on Sunday"],
        ["lit the candle with a match", "burned a finger on a match"],
    ),
    "ring": (
        ["wore a ring of gold", "lost a ring in the garden"],
        ["heard the telephone ring", "heard a bell ring twice"],
    ),
}

Pair = tuple[tuple[Any, ...], Any]


def entailment(rng: random.Random, labels: int) -> Pair:
    """Facts about people, and a claim about one of them: 0 follows; 1 does not (2 classes) or is open; 2 contradicts.

    Three grades, equally often: the claim's words tell its label; the one fact must be compared with the claim; the fact
    must also be found among three.
    """
    grade, label = rng.randrange(3), rng.randrange(labels)
    people, cities, jobs = rng.sample(PEOPLE, 3), rng.sample(CITIES, 4), rng.sample(JOBS, 3)
    count = 3 if grade == 2 else 1
    facts = [f"{people[i]} is a {jobs[i]} and lives in {cities[i]}." for i in range(count)]
    who = rng.randrange(count)
    person, true, other = people[who], cities[who], rng.choice([cities[(who + 1) % 3], cities[3]])
    if label == 1 and labels == 3:
        claims = [f"{person} was born in {true}.", f"{person} once met {people[who - 1]} in {other}."]
    elif grade == 0:
        claims = [f"{person} has a job.", f"{person} lives in a city."]
        if label:
            claims = [f"{person} has no job.", f"{person} has never lived in a city."]
    elif label == 0:
        claims = [
            f"{person} lives in {true}.",
            f"{person} does not live in {other}.",
            f"A {jobs[who]} lives in {true}.",
        ]
    else:
        claims = [
            f"{person} lives in {other}.",
            f"{person} does not live in {true}.",
            f"A {jobs[who - 1]} lives in {true}.",
        ]
    rng.shuffle(facts)
    return (" ".join(facts), rng.choice(claims)), label


def reversed_entailment(rng: random.Random, labels: int) -> Pair:
    """`entailment` where class 1 is what follows (WNLI)."""
    texts, label = entailment(rng, labels)
    return texts, labels - 1 - label


def answerable(rng: random.Random, labels: int) -> Pair:
    """A question and a sentence that answers it (0) or speaks of another person or matter (1)."""
    (person, other), city, job = rng.sample(PEOPLE, 2), rng.choice(CITIES), rng.choice(JOBS)
    questions = {
        f"Where does {person} live?": f"lives in {city}",
        f"What is the work of {person}?": f"earns a living as a {job}",
    }
    (question, answer), label = rng.choice(list(questions.items())), rng.randrange(2)
    wrong = next(a for q, a in questions.items() if q != question)
    who, what = (person, answer) if label == 0 else rng.choice([(other, answer), (person, wrong)])
    return (question, f"{who}, a friend of {other if who == person else person}, {what}."), label


def yes_no(rng: random.Random, labels: int) -> Pair:
    """A question and a passage: 1 where the answer is yes (BoolQ)."""
    (passage, claim), label = entailment(rng, 2)
    claim = claim.rstrip(".")
    return (f"is it true that {claim[0].lower() + claim[1:] if claim.startswith('A ') else claim}", passage), 1 - label


def acceptability(rng: random.Random, labels: int) -> Pair:
    """A sentence, in seven of ten cases grammatical (1); else with an error of agreement, order or number of words (0)."""
    many = rng.random() < 0.5
    subject = f"the {rng.choice(JOBS)}{'s' * many} from {rng.choice(CITIES)}"
    words = f"{subject} {'have' if many else 'has'} {rng.choice(list(VERBS))} a {rng.choice(THINGS)} for {rng.choice(PEOPLE)}"
    label, parts = int(rng.random() < 0.7), words.split()
    if not label:
        error, at = rng.randrange(4), rng.randrange(len(parts) - 1)
        if error == 0:
            parts[4] = "has" if many else "have"
        elif error == 1:
            parts[at], parts[at + 1] = parts[at + 1], parts[at]
        elif error == 2:
            parts.insert(at, parts[at])
        else:
            del parts[rng.choice([4, 5, 6])]
    text = " ".join(parts)
    return (text[0].upper() + text[1:] + ".",), label


def sentiment(rng: random.Random, labels: int) -> Pair:
    """A review whose last clause decides (1 positive); words before `but` and behind `not` mislead."""
    label = rng.randrange(2)

    def clause(positive: int) -> str:
        negated = rng.random() < 0.3
        word = rng.choice(GOOD if positive != negated else BAD)
        return f"the {rng.choice(PARTS)} is {'not ' * negated}{word}"

    start = f"{clause(1 - label)} but " if rng.random() < 0.5 else f"{clause(label)} and "
    return (start + clause(label),), label


def paraphrase(rng: random.Random, labels: int) -> Pair:
    """Two sentences: the same event in other words (1), or with a role, a thing or a place changed (0)."""
    (a, b, c), label = rng.sample(PEOPLE, 3), rng.randrange(2)
    (thing, other), (city, town), verb = rng.sample(THINGS, 2), rng.sample(CITIES, 2), rng.choice(list(VERBS))
    first = f"{a} {verb} the {thing} of {b} in {city}."
    if not label:
        a, b, thing, city = rng.choice(
            [(b, a, thing, city), (c, b, thing, city), (a, b, other, city), (a, b, thing, town)]
        )
    return (first, f"In {city}, the {thing} of {b} was {VERBS[verb]} by {a}."), label


def similarity(rng: random.Random, labels: int) -> Pair:
    """Two sentences and 5 x the share of their four parts that agree, with a little noise (0 to 5)."""
    pools = [PEOPLE, list(VERBS), THINGS, CITIES]
    first = [rng.choice(pool) for pool in pools]
    kept = [rng.random() < p for p in [rng.random()] * 4]
    second = [
        w if k else rng.choice([o for o in pool if o != w]) for w, k, pool in zip(first, kept, pools, strict=True)
    ]
    second[1] = VERBS[second[1]] if rng.random() < 0.5 else second[1]
    value = min(5.0, max(0.0, 1.25 * sum(kept) + rng.uniform(-0.3, 0.3)))
    texts = tuple("{} {} a {} in {}.".format(*words) for words in (first, second))
    return texts, round(value, 2)


def word_sense(rng: random.Random, labels: int) -> Pair:
    """A word and two sentences with it: in the same sense (1) or in another (0), as in WiC."""
    word, senses = rng.choice(list(SENSES.items()))
    label = rng.randrange(2)
    first = rng.randrange(2)
    second = first if label else 1 - first
    a, b = rng.sample(PEOPLE, 2)
    one, two = rng.sample(senses[first], 2) if label else (rng.choice(senses[first]), rng.choice(senses[second]))
    return (word, f"{a} {one}.", f"{b} {two}."), label
