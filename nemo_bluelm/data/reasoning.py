"""Synthetic reasoning problems in text: question, thought and answer are computed, so all three are true.

Everything is a function of the random generator that is passed in; there is no end to the problems.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from nemo_bluelm.data.writer import RawSample, question_record

MODES = ("direct", "think", "short")  # no thought, the whole thought, a thought cut short
_PEOPLE = ("Anna", "Ben", "Chen", "Dana", "Eli", "Fang", "Gita", "Hugo")
_THINGS = ("apples", "books", "cards", "coins", "cups", "pens", "stones", "tickets")
_WORDS = ("banana", "letter", "pepper", "window", "summer", "cheese", "little", "rabbit", "bottle", "kitten")


class Problem(NamedTuple):
    """A question with the steps that lead to its answer; ``image`` is a PNG, if the question is about one."""

    kind: str
    question: str
    thought: str
    answer: str
    image: bytes | None = None


def text_problem(rng: Random, largest: int = 99) -> Problem:
    """A problem of one of the kinds, each as likely as the others.

    Args:
        largest: number in a calculation or to be sorted, 9 or more; those to be compared have one digit more at most.
    """
    return rng.choice(_KINDS)(rng, largest)


def shortened(thought: str, rng: Random) -> str:
    """The thought up to a word of it, as a thinking budget leaves it; one word goes at least, but an only one stays."""
    words = thought.split()
    return " ".join(words[: rng.randint(1, max(1, len(words) - 1))])


def reasoning_samples(
    make: Callable[[Random], Problem], count: int, modes: Sequence[str], seed: str, tags: Sequence[str]
) -> Iterator[RawSample]:
    """``count`` problems, no two with the same question and image, each once in every mode.

    Args:
        make: makes a problem, for example :func:`text_problem`.
        modes: of :data:`MODES`.
        seed: of the problems; also the start of their keys, which must not hold a dot.
        tags: of every record, beside the problem's kind and the mode.
    """
    rng = Random(seed)
    for number, problem in enumerate(_distinct(make, count, rng)):
        for mode in modes:
            thought = None if mode == "direct" else problem.thought
            if mode == "short":
                thought = shortened(problem.thought, rng)
            image = None if problem.image is None else "0.png"
            record = question_record(problem.question, problem.answer, thought, image, [*tags, problem.kind, mode])
            files = {} if problem.image is None else {"0.png": problem.image}
            yield RawSample(f"{seed}-{number:06d}-{mode}", record, files)


def prompt_samples(make: Callable[[Random], Problem], count: int, seed: str) -> Iterator[RawSample]:
    """``count`` problems in text to reply to, no two alike, for reinforcement learning.

    Their records have the question, its ``answer`` and ``difficulty``, the number of words in the thought.
    """
    for number, problem in enumerate(_distinct(make, count, Random(seed))):
        record = {"messages": [{"role": "user", "content": problem.question}], "answer": problem.answer}
        yield RawSample(f"{seed}-{number:06d}", {**record, "difficulty": len(problem.thought.split())})


def _distinct(make: Callable[[Random], Problem], count: int, rng: Random) -> Iterator[Problem]:
    seen = set()
    while len(seen) < count:
        problem = make(rng)
        if (problem.question, problem.image) not in seen:
            seen.add((problem.question, problem.image))
            yield problem


def _arithmetic(rng: Random, largest: int) -> Problem:
    total, steps = rng.randint(1, largest), []
    question = str(total)
    for _ in range(rng.randint(1, 3)):
        sign = "-" if total == largest or (total > 0 and rng.random() < 0.5) else "+"
        term = rng.randint(1, largest - total if sign == "+" else total)
        after = total + term if sign == "+" else total - term
        steps.append(f"{total} {sign} {term} = {after}.")
        question, total = f"{question} {sign} {term}", after
    return Problem("arithmetic", f"What is {question}?", " ".join(steps), str(total))


def _comparison(rng: Random, largest: int) -> Problem:
    first, second = rng.sample(range(10, 10 * (largest + 1)), 2)
    larger = max(first, second)
    a, b = str(first), str(second)
    if len(a) != len(b):
        why = f"{a} has {len(a)} digits and {b} has {len(b)}."
    else:
        place = next(i for i in range(len(a)) if a[i] != b[i])
        why = f"Digit {place + 1} is {a[place]} and {b[place]}."
    return Problem("comparison", f"Which is larger, {a} or {b}?", f"{why} So {larger} is larger.", str(larger))


def _sorting(rng: Random, largest: int) -> Problem:
    numbers = rng.sample(range(1, largest + 1), rng.randint(3, 4))
    left, steps = list(numbers), []
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        steps.append(f"{least} is the smallest, {_list(left)} left.")
    answer = " ".join(map(str, sorted(numbers)))
    return Problem("sorting", f"Sort from small to large: {_list(numbers)}.", " ".join(steps), answer)


def _counting(rng: Random, largest: int) -> Problem:
    word = rng.choice(_WORDS)
    letter = rng.choice(sorted(set(word)))
    marks = [f"{c}{' yes' if c == letter else ''}" for c in word]
    count = word.count(letter)
    return Problem(
        "counting", f"How many times is {letter} in {word}?", f"{', '.join(marks)}. That is {count}.", str(count)
    )


def _word_problem(rng: Random, largest: int) -> Problem:
    who, other = rng.sample(_PEOPLE, 2)
    what = rng.choice(_THINGS)
    if rng.random() < 0.5:
        have = rng.randint(1, (largest - 1) // 2)
        more = rng.randint(1, largest - 2 * have)
        his, total = have + more, have + have + more
        question = f"{who} has {have} {what} and {other} has {more} more than {who}. How many have they together?"
        thought = f"{have} + {more} = {his}. {have} + {his} = {total}."
        return Problem("word_problem", question, thought, str(total))
    have = rng.randint(1, largest)
    gone = rng.randint(1, have)
    rest = have - gone
    more = rng.randint(1, largest - rest)
    question = f"{who} has {have} {what}, gives {gone} to {other} and buys {more}. How many has {who} now?"
    thought = f"{have} - {gone} = {rest}. {rest} + {more} = {rest + more}."
    return Problem("word_problem", question, thought, str(rest + more))


_KINDS = (_arithmetic, _comparison, _sorting, _counting, _word_problem)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
