"""Programs that are right, programs that aren't, and tests that make no sense; the hostile ones have their own file."""

import json

import pytest

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers import make_scorer
from nemo_bluelm.rl.environments import Episode, Said, code
from nemo_bluelm.rl.environments.code import Code, program_of
from nemo_bluelm.rl.environments.sandbox import SandboxError

SQUARES = "import sys\nfor line in sys.stdin:\n    print(int(line) ** 2)"
TOOLS = """
import math
from collections import Counter
from typing import List
LIMIT = 7
def add(a, b=0): return a + b
def pair(x): return (x, [1.5, None], {x: {b'y'}, 'inf': float('inf')}, 1j)
def count(text): return Counter(text)
def root(x: List[int]):
    if x[0] < 0: raise ValueError('negative')
    return math.sqrt(x[0])
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()
def peek(stack): return stack.items[-1]
print('loud', add(1, 2))
"""


def score(program, tests, **options):
    made = make_scorer(Code, {"time_limit": 10, "total_limit": 20, **options}, "test")
    return made.score(Episode("code", {"tests": tests}, Said(None, program)))


@pytest.mark.parametrize(
    "test",
    [
        "assert add(1, 2) == 3",
        "assert add('a', b='b') == 'ab'\nassert add([1], [2]) == [1, 2]",
        "def check(candidate):\n    for i in range(3):\n        assert candidate(i, i) == 2 * i\ncheck(add)",
        "assert pair(3) == (3, [1.5, None], {3: {b'y'}, 'inf': math.inf}, 1j)",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert math.isclose(root([2]), 1.41421, rel_tol=1e-4)",
        "try:\n    root([-1])\nexcept ValueError as e:\n    assert 'negative' in str(e)\nelse:\n    assert False",
        "s = Stack()\ns.push(4)\ns.push(5)\nassert peek(s) == 5 and s.pop() == 5",
        "assert LIMIT == 7",
        "import statistics\nassert statistics.mean([add(1), add(3)]) == 2",
    ],
)
def test_assertions_that_hold(test):
    assert score(TOOLS, [test]).value == 1


@pytest.mark.parametrize(
    "test", ["assert add(1, 2) == 4", "assert missing(1) == 1", "assert Stack()", "assert Stack() == Stack()", "1 / 0"]
)
def test_assertions_that_do_not(test):
    assert score(TOOLS, [test]).value == 0


def test_what_is_read_and_printed():
    tests = [{"input": "2\n3\n", "output": "4\n9"}, {"input": "5", "output": "25  \n\n"}]
    assert score(SQUARES, tests).value == 1
    assert score(SQUARES, {"inputs": ["2"], "outputs": ["4"]}).value == 1
    assert score(SQUARES, json.dumps(tests)).value == 1
    wrong = [*tests, {"input": "2", "output": "5"}, "assert 1 == 1"]
    assert score(SQUARES, wrong).value == 0
    assert score(SQUARES, wrong, count="share").value == 0.75
    failed = score("print(4); raise SystemExit(3)", [{"input": "", "output": "4"}])
    assert failed.value == 0 and "exit 3" in failed.reason


def test_much_to_read_and_to_print():
    text = "x" * (3 << 20)
    tests = [{"input": text, "output": str(len(text))}]
    assert score("print(len(input()))", tests).value == 1
    assert score("print('y' * 900_000)", [{"input": text, "output": "y" * 900_000}]).value == 1  # it reads nothing


def test_time_is_told_and_limited_for_all_tests_together():
    slow = score("import time; time.sleep(99)", [{"input": "", "output": ""}], time_limit=0.5)
    assert slow.value == 0 and slow.timed_out
    many = [{"input": "", "output": ""}] * 50
    slow = score("import time; time.sleep(0.6)", many, time_limit=2, total_limit=2, count="share")
    assert slow.value < 0.2 and slow.timed_out
    assert score("def f(): \n while 1: pass", ["assert f()"], time_limit=0.5).timed_out


def test_the_program_of_an_answer():
    assert program_of("a\n```python\nx\n```\nor\n```py\ny = 1\n```\nend") == "y = 1\n"
    assert program_of("```\nx\n```") == "x\n"
    assert program_of("```bash\nls\n```") == "```bash\nls\n```"
    assert program_of("print(1)") == "print(1)"
    assert score("", ["assert True"]).value == score("x" * (1 << 21), ["assert True"]).value == 0
    assert score("# \ud800", ["assert True"]).value == 1


@pytest.mark.parametrize(
    "tests, reason",
    [
        (None, "no list of tests"),
        ([], "no list of tests"),
        (["assert ("], "is no test"),
        ([{"input": 1, "output": "1"}], "is no test"),
        ({"inputs": ["1"], "outputs": []}, "not as many outputs"),
        ([7], "is no test"),
    ],
)
def test_tests_that_make_no_sense_leave_the_answer_unscored(tests, reason):
    found = score("print(1)", tests)
    assert found.value is None and reason in found.reason


def test_a_jail_that_breaks_leaves_the_answer_unscored(monkeypatch):
    def broken(*_):
        raise SandboxError("no memory for it")

    monkeypatch.setattr(code, "run", broken)
    assert score("print(1)", [{"input": "", "output": "1"}]).value is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": "some"}, "count is 'some'; it must be one of all, share"),
        ({"isolation": "none"}, "isolation is 'none'; it must be one of strong, weak"),
        ({"memory": 1}, "memory is 1; it must be 64 or more"),
        ({"time_limit": 9, "total_limit": 3}, "time_limit is 9.0 and total_limit 3.0"),
    ],
)
def test_a_mistake_in_the_options(options, message):
    with pytest.raises(UserError, match=message):
        make_scorer(Code, options, "test")
