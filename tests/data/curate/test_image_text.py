"""Curation of image-text records: sizes, clicks, answers, copies of images and pairs."""

import json

import pytest
from curation_pieces import Curation, asked, encoded, picture

from nemo_bluelm.data.records import read_records


def test_each_fault_goes_for_its_own_reason(tmp_path):
    steps = {
        "answer": {"min_words": 1},
        "repetition": {},
        "image_size": {"min_side": 28, "max_aspect": 5, "max_side": 2000},
        "click_inside": {},
        "pair_dedup": {},
    }
    png = encoded(picture(1))
    damaged = b"\x89PNG" + bytes(40)
    Curation(tmp_path, steps).add(
        asked("good", png, "A quiet river."),
        asked("other-question", png, "Seven.", "How many?"),
        asked("copy", png, "A quiet river."),
        asked("empty", png, "  "),
        asked("none", png, "N/A"),
        asked("dots", png, "..."),
        asked("parrot", png, "a red bird sings " * 30),
        asked("scream", png, "A" * 200),
        asked("small", encoded(picture(2, 20, 60)), "A stone."),
        asked("thin", encoded(picture(3, 400, 30)), "A line."),
        asked("large", encoded(picture(4, 2100, 900)), "A wall."),
        asked("damaged", damaged, "A wreck."),
        asked("click", png, "click(500, 999)", "Tap OK.", ["gui"]),
        asked("box", png, "The button is [10, 20, 400, 90].", "Where?", ["gui"]),
        asked("outside", png, "click(500, 1200)", "Tap Cancel.", ["gui"]),
        asked("inverted", png, "[400, 20, 10, 90]", "Box?", ["gui"]),
        asked("wordless", png, "There.", "Tap it.", ["gui"]),
        asked("coordinates", png, "Paris lies at (2000, 3000).", "Where is Paris?"),
    )
    curation = Curation(tmp_path, steps)
    curation.run()
    assert curation.dropped() == {
        "empty": ("answer", "empty_answer"),
        "none": ("answer", "refused_answer"),
        "dots": ("answer", "short_answer"),
        "parrot": ("repetition", "repeated_words"),
        "scream": ("repetition", "character_run"),
        "damaged": ("look_at_images", "bad_image"),
        "small": ("image_size", "image_too_small"),
        "thin": ("image_size", "image_too_thin"),
        "large": ("image_size", "image_too_large"),
        "outside": ("click_inside", "click_outside"),
        "inverted": ("click_inside", "click_outside"),
        "wordless": ("click_inside", "no_click"),
        "copy": ("pair_dedup", "duplicate"),
    }
    assert set(curation.kept()) == {"good", "other-question", "click", "box", "coordinates"}
    (shard,) = curation.out.glob("*.tar")
    assert all(images == [png] for _, _, images in read_records(shard))


def test_clicks_in_pixels_are_measured_after_exif_rotation(tmp_path):
    turned = picture(1, 96, 64)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown 64 wide and 96 high
    jpeg = encoded(turned, "JPEG", exif=exif)
    curation = Curation(tmp_path, {"click_inside": {"scale": 0}})
    curation.add(asked("in", jpeg, "(60, 90)", tags=["gui"]), asked("out", jpeg, "(90, 60)", tags=["gui"])).run()
    assert set(curation.kept()) == {"in"}


def test_image_dedup_takes_the_files_alone(tmp_path):
    same, other = encoded(picture(1)), encoded(picture(2))
    curation = Curation(tmp_path, {"image_dedup": {}}, tasks=2)
    curation.add(asked("a", same, "A cat."), asked("b", other, "A dog."))
    curation.add(asked("c", same, "A tiger."), name="b.tar").run()
    assert set(curation.kept()) == {"a", "b"}


@pytest.mark.parametrize("same_text", [False, True])
def test_near_copies_of_images(tmp_path, same_text):
    original = picture(1, 400, 300)
    curation = Curation(tmp_path, {"near_image_dedup": {"same_text": same_text}}, tasks=2)
    curation.add(
        asked("original", encoded(original), "A hill."),
        *(asked(f"other-{seed}", encoded(picture(seed, 400, 300)), "A hill.") for seed in range(2, 12)),
    )
    curation.add(
        asked("smaller", encoded(original.resize((200, 150))), "A hill."),
        asked("jpeg", encoded(original, "JPEG", quality=40), "A green hill."),
        name="b.tar",
    ).run()
    expected = {"smaller": ("near_image_dedup", "duplicate")}
    if not same_text:
        expected["jpeg"] = ("near_image_dedup", "duplicate")
    assert curation.dropped() == expected


def test_bits_within_the_distance_are_found_and_no_others():
    import numpy as np

    from nemo_bluelm.data.curate.near_images import find_near

    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (40, 32), np.uint8)
    near, far = np.unpackbits(base, axis=1), np.unpackbits(base, axis=1)
    for row in range(len(base)):
        near[row, rng.choice(256, 5, replace=False)] ^= 1
        far[row, rng.choice(256, 6, replace=False)] ^= 1
    codes = np.concatenate([base, np.packbits(near, axis=1), np.packbits(far, axis=1)])
    marks = find_near(codes, np.zeros(120, np.uint64), np.arange(120), 5)
    assert marks[:40].sum() == 0
    assert marks[40:80].all()
    # A copy six bits off may be near to the one five bits off on another side of it, but hardly any is.
    assert marks[80:].sum() < 5
    assert not find_near(codes, np.arange(120, dtype=np.uint64), np.arange(120), 5).any()


def test_loose_images_of_jsonl_become_members(tmp_path):
    folder = tmp_path / "in" / "shots"
    folder.mkdir(parents=True)
    (folder / "one.PNG").write_bytes(encoded(picture(1)))
    (folder / "two.jpg").write_bytes(encoded(picture(2), "JPEG"))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "They differ."}]
    line = {"messages": messages, "images": ["shots/one.PNG", "shots/two.jpg"], "id": 7}
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(line))
    curation = Curation(tmp_path, {"answer": None}, input={"root": str(tmp_path / "in"), "shards": ["a.jsonl"]})
    curation.run()
    (shard,) = curation.out.glob("*.tar")
    ((key, record, images),) = read_records(shard)
    assert (key, record.images) == ("7", ("0.png", "1.jpg"))
    assert images == [(folder / "one.PNG").read_bytes(), (folder / "two.jpg").read_bytes()]


def test_nothing_left_is_a_report_and_no_shard(tmp_path):
    dedups = ["text_dedup", "image_dedup", "pair_dedup", "minhash_dedup", "near_image_dedup"]
    steps = {"answer": None, **dict.fromkeys(dedups)}
    curation = Curation(tmp_path, steps, tasks=2, resample={"shares": {"gui": 0.5}})
    table = curation.add(asked("empty", encoded(picture(1)), " ")).run("steps.minhash_dedup.buckets=2")
    assert table.endswith("0 records in 0 shards\n")
    assert [step["in"] for step in curation.report()["steps"]] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert not list(curation.out.glob("*.tar"))
