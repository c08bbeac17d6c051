"""Scorers: what is right, what is wrong, and what no answer, however hostile, can get out of them."""

import time
from pathlib import Path

import pytest

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers import make_scorers
from nemo_bluelm.evaluate.scorers.base import last_boxed
from nemo_bluelm.evaluate.scorers.choice import stated_letter, stated_word

OPTIONS = ["red", "dark red", "blue", "A cat"]
MEGABYTE, QUARTER = 1 << 20, 1 << 18
HOSTILE = [
    "",
    "\0",
    "nan",
    "\ud800",
    "(" * QUARTER,
    "\\boxed{" * (QUARTER // 7),
    "\\frac{1}{" * (QUARTER // 9),
    "answer" + " " * QUARTER,
    "answer is " * (QUARTER // 10),
    "A " * (QUARTER // 2),
    "A\n" * (QUARTER // 2),
    "not 7777 " * (QUARTER // 9),
    "[1, 2, " * (QUARTER // 7),
    "1" * QUARTER,
    "yes " * (QUARTER // 4),
    "<think>" * 1000 + "</think>" * 1000,
]


def scorer(name, **options):
    (made,) = make_scorers({name: options}, "test")
    return made


def value(name, answer, fields, **options):
    return scorer(name, **options).score(answer, fields).value


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B. dark red", "B"),
        ("**B**", "B"),
        ("Answer: B", "B"),
        ("**Answer:** **C**", "C"),
        ("The answer is (C).", "C"),
        ("The correct option is C, not A.", "C"),
        ("Option B is correct; option A is wrong", "B"),
        ("答案是B", "B"),
        ("选C", "C"),
        (r"so \boxed{B}", "B"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{A}, no: \boxed{B}", "B"),
        (r"\boxed{dark red}", "B"),
        ("A? No, B.", "B"),
        ("A. Wait, actually (B)", "B"),
        ("Yes, but no: B", "B"),
        ("Answer: A. Wait, no. Answer: B", "B"),
        ("The answer is not A but B", "B"),
        ("B. The (A) option is wrong", "B"),
        ("I think it is B because A is red", "B"),
        ("A: no\nB: yes\n\nB", "B"),
        ("A cat sits there", "D"),
        ("It is red.", "A"),
        ("dark red", "B"),
        ("Answer: E", None),  # there are four
        ("I don't know", None),
        ("", None),
        ("not A", None),
        ("It can't be A", None),
        ("It can not be (A).", None),
        ("I don't think it is A", None),
        ("A is wrong", None),
        ("A不对", None),
        ("(A) (B) (C) (D)", None),
        ("(A), (B), (C) or (D)", None),
        ("A, B", None),
        ("A/B/C/D", None),
        ("A\nB\nC\nD", None),
        ("A.\nB.\nC.\nD.", None),
        ("A. red\nB. dark red\nC. blue\nD. A cat", None),
        ("(A) red (B) dark red", None),
        ("Answer: A or B", None),
        ("The answer is A, B and C", None),
        ("A. Or maybe B", None),
        ("A or B is right", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{not A}", None),
        ("red, blue", None),
        ("not red", None),
        ("It isn't dark red", None),
        ("red or blue", None),
        ("It may be (A) or (B). The answer is B", "B"),
        ("(A) red\n(B) dark red\n(C) blue\nThe answer is (C).", "C"),
        ("A is out, C too\nB", "B"),
        (r"Not A. Not B. \boxed{C}", "C"),
        ("Of B and A the first fits.\n\nB", "B"),
        ("It can't be A. It is (B)", "B"),
        ("A and C are wrong, so B.", "B"),
        ("A is red and B is dark red, so B", "B"),
        ("答案是B，不是A", "B"),
        ("B. Not A.", "B"),
        ("B, because A is red", "B"),
        ("**B**. It is dark red; option A (red) is not dark enough.", "B"),
        ("Among the options A, B, C, and D: B", "B"),
        ("Neither A nor C; B", "B"),
        ("Not A or B", None),
        ("A, A, B", None),
        ("Answer: A; also B", None),
        ("Anything but A", None),
        ("Answer: B. A and C are wrong", "B"),
        ("(B) dark red is correct. (A) red is too light.", "B"),
        ("B. dark red, as A is too bright", "B"),
        ("Both red and blue are there. The answer is blue.", "C"),
        ("not red but blue", "C"),
    ],
)
def test_the_choice_that_is_stated(answer, letter):
    assert stated_letter(answer, OPTIONS) == letter


def test_letters_in_the_texts_of_options_are_no_choices():
    vitamins = ["Vitamin C", "Hepatitis B", "C", "B"]
    for answer, letter in {"A. Vitamin C": "A", "(B) Hepatitis B": "B", "Answer: C. C": "C", "D. B": "D"}.items():
        assert stated_letter(answer, vitamins) == letter, answer
    assert stated_letter("I. It is the last") == "I" and stated_letter("I think so") is None


@pytest.mark.parametrize(
    "answer, word",
    [
        ("No", "no"),
        ("**Yes**", "yes"),
        ("Yes, but no.", "no"),
        ("Yes, but actually no", "no"),
        ("Yes. There is no doubt.", "yes"),
        ("yes, as I note", "yes"),
        ("No dog is visible", "no"),
        ("Is there a dog? No.", "no"),
        ("yesterday", None),
        ("not yes", None),
        ("It is not yes.", None),
        ("no, yes", None),
        ("No yes", None),
        ("yes or no", None),
        ("Yes/No", None),
        ("Yes. No. Yes.", None),
        (r"\boxed{yes, no}", None),
        ("Is it yes or no? Yes.", "yes"),
        ("No... the answer is yes.", "yes"),
        ("Yes, or rather no.", "no"),
        (r"no, \boxed{yes}", "yes"),
        ("", None),
    ],
)
def test_the_word_that_is_settled_on(answer, word):
    assert stated_word(answer, ["yes", "no"]) == word


@pytest.mark.parametrize("reference", ["B", "(B)", 1, "dark red", "Dark red."])
def test_a_reference_is_letter_number_or_text(reference):
    fields = {"options": OPTIONS, "answer": reference}
    assert value("mcq", "B", fields) == 1 and value("mcq", "C", fields) == 0


@pytest.mark.parametrize("reference", ["E", 4, -1, "green", None, True])
def test_a_reference_that_is_no_option_leaves_the_answer_unscored(reference):
    score = scorer("mcq").score("B", {"options": OPTIONS, "answer": reference})
    assert score.value is None and "one of its options" in score.reason


@pytest.mark.parametrize(
    "reference, right, wrong",
    [
        (r"\frac{1}{2}", ["0.5", r"\boxed{\frac12}", "So $x = 1/2$.", r"\frac{1}{2}"], ["0.49", "2", "", r"\boxed{}"]),
        ("18", ["The answer is 18.", "18 apples", r"\boxed{17} or rather \boxed{18}"], ["17", r"18, so \boxed{19}"]),
        ("reasons\n#### 1,250", ["1250", "$1250$"], ["250", "125"]),
        (
            "7",
            [
                "7",
                "It is not 8 but 7",
                "There are 7, not 8",
                "No. 7",
                "not sure, 7",
                r"not 7: \boxed{7}",
                "x = 7 is odd",
            ],
            [
                "It is not 7",
                "yes, but no 7?",
                "It isn't $7$",
                "It can't be x = 7.",
                r"$x \neq 7$",
                "7 is wrong",
                "不是7",
            ],
        ),
        (r"(1, 2)", ["$(1,2)$", "(1, 2)"], ["(2, 1)"]),
        ("x^2+1", ["$1+x^2$"], ["$1-x^2$"]),
    ],
)
def test_mathematics(mathematics, reference, right, wrong):
    fields = {"answer": reference}
    assert [mathematics.score(answer, fields).value for answer in right] == [1] * len(right)
    assert [mathematics.score(answer, fields).value for answer in wrong] == [0] * len(wrong)


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify")
    made = scorer("math")
    yield made
    made.close()


def test_mathematics_without_a_reference(mathematics):
    assert mathematics.score("1", {"answer": ""}).value is None


def test_an_error_of_the_comparison_is_no_verdict(mathematics, monkeypatch):
    monkeypatch.setattr(mathematics, "_ask", lambda _: {"failed": "TypeError: what"})
    score = mathematics.score("1", {"answer": "1"})
    assert score.value is None and "TypeError: what" in score.reason


def test_a_process_that_nobody_ends_ends_itself(mathematics):
    """By CPU time: whoever started it may have been killed."""
    made = scorer("math", time_limit=1.0)
    made.score("2", {"answer": "2"})
    limit = Path(f"/proc/{made._worker._process.pid}/limits").read_text()
    assert 5 < int(limit.partition("Max cpu time")[2].split()[0]) < 60
    made.close()


def test_a_formula_that_takes_too_long_is_ended_and_the_next_is_scored(mathematics):
    made = scorer("math", time_limit=1.0)
    started = time.monotonic()
    endless = made.score("$9^{9^{9^{9}}}-9^{9^{9^{9}}}$", {"answer": "9^{9^{9^{8}}}"})
    assert endless.value == 0 and endless.timed_out
    assert time.monotonic() - started < 15  # a worker begins, then works for a second
    assert made.score("2", {"answer": "2"}).value == 1
    made.close()


def test_texts():
    assert value("exact", " Paris. ", {"answer": "paris"}) == 1
    assert value("exact", "paris", {"answer": "Paris"}, case=True) == 0
    assert value("exact", "It says Paris", {"answer": ["London", "Paris"]}, match="contains") == 1
    assert value("exact", "It says Paris", {"answer": ["London", "Paris"]}) == 0
    assert value("exact", "51", {"answer": "50"}, tolerance=0.05) == 1
    assert value("exact", "$1,050", {"answer": 1000}, tolerance=0.05) == 1
    assert value("exact", "53", {"answer": "50"}, tolerance=0.05) == 0
    assert value("exact", "nan", {"answer": "50"}, tolerance=0.05) == 0
    votes = {"answer": ["a", "a", "b", "c"]}
    assert [value("exact", text, votes, votes=3) for text in "abd"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert value("exact", "", {"answer": ""}) is None


@pytest.mark.parametrize("answer, similarity", [("hello", 1), ("HELLO ", 1), ("hallo", 0.8), ("help", 0.6), ("xyz", 0)])
def test_anls(answer, similarity):
    """By hand, arXiv 1907.00490: 1 - distance / longer length, 0 from a distance of one half on."""
    pytest.importorskip("rapidfuzz")
    assert value("anls", answer, {"answer": ["zzzzzzzzz", "hello"]}) == pytest.approx(similarity)
    assert value("anls", "ab", {"answer": "ax"}) == 0  # exactly one half
    assert value("anls", "HELLO", {"answer": "hello"}, case=True) == 0
    assert value("anls", "hELLO", {"answer": "hello"}, case=True, threshold=1.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "answer, overlap",
    [
        ("[0, 0, 10, 10]", 1),
        ("The box is [0,0,10,5].", 0.5),
        ("(5, 5), (15, 15)", 25 / 175),
        ("<box>[[0.0 0.0 10.0 10.0]]</box>", 1),
        ("[20, 20, 30, 30]", 0),
        ("[10, 10, 0, 0]", 0),  # inverted
        ("[0, 0, 0, 10]", 0),
        ("[nan, 0, 10, 10]", 0),
        ("[0, 0, inf, inf]", 0),
        ("[0, 0, 1e308, 1e308]", 0),
        ("[-1000, -1000, 1000, 1000]", 0),
        ("[0, 0, 10, 10] or [0, 0, 9, 9]", 0),  # two guesses
        ("[0, 0, 10]", 0),
        ("", 0),
    ],
)
def test_overlap(answer, overlap):
    assert value("iou", answer, {"box": [0, 0, 10, 10]}) == pytest.approx(overlap)


@pytest.mark.parametrize("box", [[10, 10, 0, 0], [0, 0, float("nan"), 1], "text", [1, 2], None, [0, 0, 2000, 1]])
def test_a_reference_that_is_no_box_leaves_the_answer_unscored(box):
    assert value("iou", "[0, 0, 1, 1]", {"box": box}, scale=1000) is None


def test_overlap_against_a_threshold_and_points():
    fields = {"box": "[0, 0, 10, 10]"}
    assert value("iou", "[0, 0, 10, 6]", fields, threshold=0.5) == 1
    assert value("iou", "[0, 0, 10, 4]", fields, threshold=0.5) == 0
    assert value("point", "click (5, 5)", fields) == 1
    assert value("point", "[11, 5]", fields) == 0
    assert value("point", "[4, 4, 8, 8]", fields) == 1  # its middle
    assert value("point", "[nan, 5]", fields) == 0


@pytest.mark.parametrize("name", ["mcq", "word", "exact", "anls", "iou", "point", "math"])
def test_hostile_answers_get_nothing_and_take_no_time(name):
    """Long ones are scored in seconds, LaTeX of a megabyte too, and nothing but a right answer is right."""
    made = scorer(name, **({"time_limit": 1.0} if name == "math" else {}))
    fields = {"answer": {"word": "no", "mcq": "B"}.get(name, "7777"), "options": OPTIONS}
    fields["box"] = [3, 4, 5, 6]
    latex = ["\\frac{1}{" * (MEGABYTE // 9), "(" * MEGABYTE, "", "\ud800"]
    for answer in latex if name == "math" else HOSTILE:
        started = time.monotonic()
        score = made.score(answer, fields)
        assert score.value == 0, (answer[:20], score)
        assert time.monotonic() - started < (20 if name == "math" else 5), answer[:20]
    made.close()


def test_boxes_are_balanced():
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None and last_boxed("{}") is None


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"mqc": {}}, "unknown key mqc; did you mean mcq"),
        ({"iou": {"treshold": 1}}, "scorer iou: unknown key treshold; did you mean threshold"),
        ({"iou": {"threshold": 7}}, "scorer iou: threshold is 7"),
        ({"exact": {"tolerance": "much"}}, "scorer exact: .*much"),
        ({"exact": {"match": "near"}}, "match is 'near'; it must be one of whole, contains"),
        ({"word": {"words": ["yes"]}}, "words is .*two words"),
        ({"judge": {}}, "scorer judge: base_url is None"),
        ({"judge": {"base_url": "http://x/v1"}}, "scorer judge: model is None"),
        ({"judge": {"base_url": "http://x", "model": "m", "prompt": "{{ a"}}, "scorer judge: prompt: line 1"),
    ],
)
def test_a_mistake_in_the_options(entries, message):
    with pytest.raises(UserError, match=message):
        make_scorers(entries, "file")


@pytest.mark.parametrize("name, module", [("math", "math_verify"), ("anls", "rapidfuzz")])
def test_a_missing_package_is_told_in_one_line(monkeypatch, name, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"the scorer {name} needs {module} .*nemo-bluelm\[eval\]"):
        scorer(name)
