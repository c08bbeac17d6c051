"""What a server serves, to whom, and how much it takes on."""

from dataclasses import dataclass

from nemo_bluelm.config.schema import ControlToken, Recipe
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.geometry import Geometry


@dataclass(frozen=True)
class Settings:
    """The limits of a server; its memory for requests is at most ``max_requests`` x ``max_body`` bytes.

    Attributes:
        api_key: what clients must send as ``Authorization: Bearer KEY``; None asks for none.
        model_name: what clients call the model; None takes the recipe's name.
        max_requests: at once, those that wait, run and are being sent.
        max_batch: replies that are written together.
        max_batch_tokens: of them, prompts and new tokens; the size of the cache of keys and values.
        max_body: bytes of a request.
        max_images: of a request.
        max_image_bytes, max_image_pixels: of an image.
        max_tokens: new tokens of a reply whose request doesn't say.
        request_seconds: from a request's arrival to the end of its reply.
        stall_seconds: after which a client that neither sends nor reads is cut off.
        grace_seconds: for what was accepted to end in after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_name: str | None = None
    max_requests: int = 256
    max_batch: int = 32
    max_batch_tokens: int = 131_072
    max_body: int = 20 << 20
    max_images: int = 16
    max_image_bytes: int = 10 << 20
    max_image_pixels: int = 16_000_000
    max_tokens: int = 1024
    request_seconds: float = 600
    stall_seconds: float = 30
    grace_seconds: float = 30


@dataclass(frozen=True)
class Served:
    """What a request is checked against: the model's name, its inputs, and the positions that it was trained for."""

    name: str
    context: int
    tokenizer: Tokenizer
    geometry: Geometry
    control_token: ControlToken


def context_of(recipe: Recipe) -> int:
    """Tokens that a prompt and its reply may have together."""
    yarn = recipe.model.language.yarn
    reach = int(yarn.original_max_position_embeddings * yarn.factor) if yarn.factor > 1 else 0
    return max(recipe.data.sequence_length, reach)
