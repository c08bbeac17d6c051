"""Tags by rules and the factors that give key data its share."""

import pytest
import yaml
from curation_pieces import Curation, text

from nemo_bluelm.data.curate.resample import factors, shares


def test_tags_and_the_snippet_are_exact(tmp_path):
    rules = {"math": [r"\btheorem\b", "定理"], "code": [r"\bdef \w+\("]}
    resample = {"shares": {"math": 0.5, "law": 0.1}, "source": "web"}
    curation = Curation(tmp_path, {"tags": {"rules": rules}}, resample=resample)
    curation.add(
        text("a", "A Theorem of five words", "web"),  # 5 words
        text("b", "勾股定理", "web"),  # 4 words
        text("c", "def solve(x): return x", "web"),  # def solve x return x: 5 words
        text("d", "one two three four five six", "web"),
        text("e", "seven eight nine ten eleven twelve thirteen"),
    )
    curation.run()
    tags = {key: record.tags for key, record in curation.kept().items()}
    assert tags == {"a": ("web", "math"), "b": ("web", "math"), "c": ("web", "code"), "d": ("web",), "e": ()}
    assert curation.report()["tags"] == {
        "code": {"records": 1, "words": 5},
        "math": {"records": 2, "words": 9},
        "web": {"records": 4, "words": 20},
    }
    # 18 words have no math: for half of all words the 9 of math must count twice.
    snippet = (curation.out / "resample.yaml").read_text()
    assert snippet.splitlines()[0] == "# Share of words: math 0.5000"
    source = {"shards": [str(curation.out / "clean-*.tar")], "resample": {"math": 2.0}}
    assert yaml.safe_load(snippet) == {"data": {"sources": {"web": source}}}
    assert curation.report()["resample"]["no_records"] == ["law"]


def test_shares_of_records(tmp_path):
    curation = Curation(tmp_path, {"length": {"min": 1}}, resample={"unit": "records", "shares": {"key": 0.25}})
    curation.add(text("a", "long " * 90, "key"), *(text(f"t{n}", "short") for n in range(9))).run()
    assert curation.report()["resample"]["factors"] == {"key": 3.0}


def test_min_matches_counts_all_rules_of_a_tag(tmp_path):
    curation = Curation(tmp_path, {"tags": {"rules": {"x": ["red", "blue"]}, "min_matches": 3}})
    curation.add(text("yes", "red blue RED"), text("no", "red and blue")).run()
    assert {key: record.tags for key, record in curation.kept().items()} == {"yes": ("x",), "no": ()}


@pytest.mark.parametrize(
    "lengths",
    [
        {("a",): 10, ("b",): 30, (): 60},
        {("a",): 10, ("b",): 30, ("a", "b"): 5, (): 60, ("c",): 7},
    ],
)
def test_factors_reach_the_wanted_shares(lengths):
    wanted = {"a": 0.3, "b": 0.4}
    found = factors(lengths, wanted)
    assert shares(lengths, found) == pytest.approx(wanted, abs=1e-6)


def test_nothing_to_share_out():
    assert factors({("a",): 10, ("a", "b"): 5}, {"a": 0.3}) == {"a": 1.0}
    assert factors({}, {}) == {}
