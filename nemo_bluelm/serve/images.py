"""Images of a request: bytes out of ``data:`` URLs, within limits. Nothing is fetched from anywhere."""

import base64
import binascii
import re
from typing import Any

from nemo_bluelm.data.headers import BadImage, read_header
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.serve.errors import bad_request
from nemo_bluelm.serve.settings import Settings

_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")


def read_image(value: Any, where: str, settings: Settings) -> bytes:
    """The file of an ``image_url`` part's value.

    Raises:
        ApiError: not a ``data:`` URL, or a file over the limits.
    """
    if not isinstance(value, dict) or not isinstance(value.get("url"), str) or set(value) - {"url", "detail"}:
        raise bad_request(f'{where}.image_url must be {{"url": "data:image/...;base64,..."}}')
    if value.get("detail") not in (None, "auto", "high"):
        raise bad_request(f"{where}.image_url.detail is {value['detail']!r:.40}; images are always read in high detail")
    url = value["url"]
    start = _DATA.match(url)
    if start is None:
        raise bad_request(
            f"{where}.image_url.url begins with {url[:20]!r}; it must be a data: URL in base64, nothing is fetched",
            "invalid_image_url",
        )
    if (len(url) - start.end()) * 3 // 4 > settings.max_image_bytes + 2:  # two bytes of padding
        raise bad_request(
            f"{where} is an image of more than {settings.max_image_bytes:,} bytes; scale it down", "image_too_large"
        )
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise bad_request(f"{where} is not valid base64: {error}", "invalid_image") from None


def image_tokens(data: bytes, where: str, geometry: Geometry, settings: Settings) -> int:
    """Visual tokens of an image, by its header.

    Raises:
        ApiError: not an image, or one over the limits.
    """
    try:
        header = read_header(data)
    except BadImage as error:
        raise bad_request(f"{where}: {error}", "invalid_image") from None
    if header.width * header.height > settings.max_image_pixels:
        raise bad_request(
            f"{where}: {header.width} x {header.height} pixels, more than {settings.max_image_pixels:,}; scale it down",
            "image_too_large",
        )
    return geometry.image_tokens(header.width, header.height)
