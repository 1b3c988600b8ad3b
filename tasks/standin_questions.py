"""Generated questions: word problems, multiple choice, answer options about a paragraph, gaps; see `standin.py`."""

from __future__ import annotations

import random

from tasks.standin_texts import CITIES, JOBS, PEOPLE, THINGS, Pair


def answer_option(rng: random.Random, labels: int) -> Pair:
    """One option of a question about a paragraph, right (1) or wrong (0), and the indices of both, as in MultiRC.

    Eighty paragraphs with two questions each: several rows share a paragraph, and a question.
    """
    paragraph, asked = rng.randrange(80), rng.randrange(2)
    fixed = random.Random(paragraph)
    people, cities, jobs = fixed.sample(PEOPLE, 3), fixed.sample(CITIES, 3), fixed.sample(JOBS, 3)
    text = " ".join(f"{p} is a {j} and lives in {c}." for p, c, j in zip(people, cities, jobs, strict=True))
    who, label = people[paragraph % 3], rng.randrange(2)
    right, pool = ((cities[paragraph % 3], CITIES), (jobs[paragraph % 3], JOBS))[asked]
    option = right if label else rng.choice([word for word in pool if word != right])
    question = (f"Where does {who} live?", f"What is the work of {who}?")[asked]
    return (text, question, option, {"paragraph": paragraph, "question": 2 * paragraph + asked}), label


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """A word problem of one to three steps, and its solution that ends with `#### n`."""
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    total = rng.randint(2, 20)
    question, steps = [f"{person} has {total} {thing}s."], []
    for _ in range(rng.randint(1, 3)):
        n, kind = rng.randint(2, 9), rng.randrange(3)
        kind = 0 if kind == 1 and n >= total else kind
        text = (f"{person} buys {n} more.", f"{person} gives {n} away.", f"Then the number grows {n} times as large.")[
            kind
        ]
        result = (total + n, total - n, total * n)[kind]
        question.append(text)
        steps.append(f"{total} {'+-*'[kind]} {n} = {result}")
        total = result
    return " ".join([*question, f"How many {thing}s does {person} have now?"]), "\n".join([*steps, f"#### {total}"])


def sum_alone(rng: random.Random) -> tuple[str, str]:
    """`arithmetic` with the number alone for an answer."""
    question, answer = arithmetic(rng)
    return question, answer.partition("#### ")[2]


def boxed_sum(rng: random.Random) -> tuple[str, str]:
    """`arithmetic` whose solution ends with a box, as those of MATH do."""
    question, answer = arithmetic(rng)
    steps, _, total = answer.partition("\n#### ")
    return question, f"{steps}\nThe answer is $\\boxed{{{total}}}$."


def quiz(rng: random.Random, count: int) -> tuple[str, list[str], int]:
    """A fact, a question about it, `count` answers and the index of the right one; half the time the wrong ones fit too."""
    person, city, job = rng.choice(PEOPLE), rng.choice(CITIES), rng.choice(JOBS)
    asked, right, pool, other = rng.choice(
        [(f"Where does {person} live?", city, CITIES, JOBS), (f"What is the work of {person}?", job, JOBS, CITIES)]
    )
    wrong = rng.sample([word for word in (pool if rng.random() < 0.5 else other) if word != right], count - 1)
    gold = rng.randrange(count)
    return f"{person} is a {job} and lives in {city}. {asked}", [*wrong[:gold], right, *wrong[gold:]], gold


def cloze(rng: random.Random, gap: str) -> tuple[str, str, list[str], list[str]]:
    """A passage, a sentence with a gap, the names of the passage, and which of them fill the gap, as in ReCoRD."""
    people, cities = rng.sample(PEOPLE, 3), rng.sample(CITIES, 3)
    facts = [f"{p} moved to {c} last year." for p, c in zip(people, cities, strict=True)]
    entities, who = [*people, *cities], rng.randrange(3)
    rng.shuffle(entities)
    query, right = rng.choice(
        [(f"{gap} now lives in {cities[who]}.", people[who]), (f"{people[who]} now lives in {gap}.", cities[who])]
    )
    return " ".join(facts), query, entities, [right]
