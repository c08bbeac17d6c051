"""Corpus part: views of the photos that scikit-learn and scikit-image ship, with the question what they show."""

import io
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image

from nemo_bluelm.data.writer import RawSample, question_record
from nemo_bluelm.errors import UserError

QUESTIONS = ("What is in the picture?", "What does the photo show?", "Describe the picture.", "What do you see?")
VIEWS = 10  # of each photo

# File (only those inside the wheels, not those fetched on demand) and what it shows, after its name.
_SKIMAGE = {
    "astronaut.png": "an astronaut",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera",
    "cell.png": "a cell",
    "chelsea.png": "a cat",
    "chessboard_GRAY.png": "a chessboard",
    "clock_motion.png": "a clock",
    "coffee.png": "a cup of coffee",
    "coins.png": "coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "horse.png": "a horse",
    "hubble_deep_field.jpg": "galaxies",
    "ihc.png": "stained tissue",
    "logo.png": "a logo",
    "microaneurysms.png": "small blood vessels",
    "moon.png": "the moon",
    "motorcycle_left.png": "a motorcycle",
    "motorcycle_right.png": "a motorcycle",
    "page.png": "a page of a book",
    "phantom.png": "a phantom of a head",
    "retina.jpg": "a retina",
    "rocket.jpg": "a rocket",
    "text.png": "text",
}
_SKLEARN = {"china.jpg": "a palace in China", "flower.jpg": "a flower"}


def samples(seed: int) -> list[RawSample]:
    """``VIEWS`` of each photo: the whole of it, then crops of 70 % or more of each side, so that the answer stays true.

    The long side is 40 to 240 pixels: one to 17 tiles of 56 pixels.

    Raises:
        UserError: the installed package doesn't ship a photo.
    """
    rng = np.random.default_rng([seed, 2])
    made = []
    for folder, answers in (
        (Path(skimage.__file__).parent / "data", _SKIMAGE),
        (Path(sklearn.__file__).parent / "datasets" / "images", _SKLEARN),
    ):
        for file, answer in answers.items():
            if not (folder / file).is_file():
                raise UserError(f"{file} is not in {folder}; install scikit-image 0.26 and scikit-learn 1.9")
            with Image.open(folder / file) as image:
                # On white, as a viewer shows it: the drawing is in the alpha channel.
                photo = _on_white(image)
            for view in range(VIEWS):
                crop = photo if view == 0 else _crop(photo, rng)
                crop.thumbnail((int(rng.integers(40, 241)),) * 2, Image.Resampling.LANCZOS)
                question = QUESTIONS[rng.integers(len(QUESTIONS))]
                extension, data = _encode(crop)
                record = question_record(
                    question, answer, _thought(crop, answer, view), f"0.{extension}", ["photos", "train"]
                )
                made.append(RawSample(f"photo-{Path(file).stem}-{view}", record, {f"0.{extension}": data}))
    return made


def _thought(photo: Image.Image, answer: str, view: int) -> str | None:
    """What can be measured, for every other view: each photo is there with and without a thought."""
    if view % 2 == 0:
        return None
    shape = "wide" if photo.width > photo.height else "tall" if photo.width < photo.height else "square"
    colour = "in colour" if photo.mode == "RGB" else "gray"
    return f"The picture is {shape} and {colour}. I see {answer}."


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.copy()
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = (max(1, int(side * rng.uniform(0.7, 1))) for side in photo.size)
    left, top = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
    return photo.crop((left, top, left + width, top + height))


def _encode(photo: Image.Image) -> tuple[str, bytes]:
    """JPEG for colour, PNG for gray."""
    file = io.BytesIO()
    if photo.mode == "RGB":
        photo.save(file, "JPEG", quality=90)
        return "jpg", file.getvalue()
    photo.save(file, "PNG")
    return "png", file.getvalue()
