"""``nemo-bluelm data curate``."""

from curation_pieces import Curation, english, text


def test_prints_the_report(tmp_path, cli):
    curation = Curation(tmp_path, {"length": {"min": 9}}).add(text("a", english(1)), text("b", "Too short."))
    code, out, err = cli("data", "curate", str(curation.recipe), "--dry-run")
    assert (code, curation.out.exists()) == (0, False)
    assert "write: 1 x read > length > write" in out
    code, out, err = cli("data", "curate", str(curation.recipe), "steps.length.min=5")
    assert code == 0, err
    assert "too_short 1" in out
    assert "1 records in 1 shards" in out


def test_a_mistake_is_one_line(tmp_path, cli):
    curation = Curation(tmp_path, {"length": {"min": 9}})
    code, out, err = cli("data", "curate", str(curation.recipe), "steps.lenght.min=5")
    assert (code, out) == (2, "")
    assert err == "nemo-bluelm: error: steps.lenght: no such step; did you mean length?\n"
