"""The checkpoint by Megatron and the exported folder by transformers, in one process, stage by stage."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemo_bluelm.config.schema import Dtype, PrecisionConfig, Recipe, geometry_of
from nemo_bluelm.convert.hf_config import Flavour
from nemo_bluelm.convert.verify import LIMIT, Check, difference, first_difference
from nemo_bluelm.data.chat import encode_prompt
from nemo_bluelm.data.decode import get_backend
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.decoder import Decoder
from nemo_bluelm.runtime.run_dir import WEIGHTS_DIR

NEW_TOKENS = 16
_LONG = 64  # tokens that are spread over the whole context


class Case(NamedTuple):
    """A prompt as ours, and what the folder's processor makes of it."""

    name: str
    tokens: list[int]
    tiles: Tensor
    theirs: dict[str, Any]


def compare_models(
    folder: Path,
    checkpoint: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    flavour: Flavour,
    rounding: Optional[torch.dtype],
) -> Iterator[Check]:
    """
    Args:
        rounding: dtype that the export's weights have; ours are rounded to it.

    Raises:
        UserError: transformers can't load the folder, or its processor fails.
    """
    from nemo_bluelm.runtime.single import single_process_world

    hf, processor, info = _theirs(folder, flavour)
    lost = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    yield Check("load", "keys", len(lost), detail=", ".join(map(str, lost[:4])))
    with single_process_world(), torch.inference_mode():
        ours = _ours(checkpoint, recipe, tokenizer, rounding)
        device = next(ours.parameters()).device
        hf = hf.to(device).eval()
        for case in _cases(folder, recipe, tokenizer, processor):
            yield from _compare(ours, hf, case, tokenizer, device)
        yarn = recipe.model.language.yarn
        longest = round(yarn.original_max_position_embeddings * max(yarn.factor, 1.0))
        yield _long(ours, hf, tokenizer, longest, device)


def _theirs(folder: Path, flavour: Flavour):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with _their_code(f"transformers can't load {folder}"):
        hf, info = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=flavour is Flavour.exact, dtype=torch.float32, output_loading_info=True
        )
        return hf, AutoProcessor.from_pretrained(folder, trust_remote_code=True), info


@contextmanager
def _their_code(what: str) -> Iterator[None]:
    """Around what runs code or templates of the folder."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {error!r:.300}; export the model again") from error


def _ours(checkpoint: Path, recipe: Recipe, tokenizer: Tokenizer, rounding: Optional[torch.dtype]) -> torch.nn.Module:
    """As ``load_model``, in fp32."""
    from megatron.core import dist_checkpointing

    from nemo_bluelm.runtime.single import STATE_PREFIX, build_model
    from nemo_bluelm.runtime.storage import reading

    model = build_model(replace(recipe, precision=PrecisionConfig(Dtype.fp32)), tokenizer.image)
    wanted = model.sharded_state_dict(prefix=STATE_PREFIX)
    with reading(checkpoint):
        state = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS_DIR))
    model.load_state_dict({name.removeprefix(STATE_PREFIX): state[name] for name in wanted})
    if rounding is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(rounding))
    return model.eval()


def _cases(folder: Path, recipe: Recipe, tokenizer: Tokenizer, processor) -> Iterator[Case]:
    geometry = geometry_of(recipe.model)
    side = geometry.tile
    many = (min(3, geometry.max_cols) * side - 9, min(2, geometry.max_rows) * side - 5)
    for name, size, think in (("text", None, True), ("one image", (side - 3, side - 9), False), ("tiles", many, True)):
        images = [] if size is None else [_image(*size)]
        (tiles,) = get_backend("pil").tiles([_png(image) for image in images], geometry) or [
            torch.empty(0, 3, side, side, dtype=torch.uint8)
        ]
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is 12 of this, in a word? "}]
        messages = [{"role": "user", "content": parts}]
        counts = [len(tiles) * geometry.tokens_per_tile] * len(images)
        tokens = encode_prompt(messages, tokenizer, counts, think, recipe.data.chat.control_token)
        with _their_code(f"the processor of {folder} fails"):
            text = processor.apply_chat_template(messages, enable_thinking=think, tokenize=False)
            theirs = processor(images=images or None, text=text, return_tensors="pt")
        yield Case(name, tokens, tiles, dict(theirs))


def _compare(ours, hf, case: Case, tokenizer: Tokenizer, device) -> Iterator[Check]:
    ids = case.theirs["input_ids"][0].tolist()
    at = first_difference(case.tokens, ids)
    yield Check("prompt", case.name, 0 if at is None else 1, detail="" if at is None else f"differs at token {at}")
    if at is not None:
        return
    tiles, pixels = case.tiles.to(device), None
    if len(tiles):
        pixels = case.theirs["pixel_values"].to(device)
        yield Check("pixels", case.name, difference(tiles.float() / 127.5 - 1.0, pixels), 0.0)
        features = ours.vision(tiles)
        yield Check("ViT", case.name, difference(features, hf.model.vision_tower(pixels).last_hidden_state), LIMIT)
        folded = hf.model.multi_modal_projector(features).flatten(1, -2)  # Cohere2Vision keeps rows apart
        yield Check("projector", case.name, difference(ours.projector(features), folded), LIMIT)
    tokens = torch.tensor([case.tokens], device=device)
    positions = torch.arange(len(case.tokens), device=device)[None]
    inputs = {"pixel_values": pixels} if pixels is not None else {}
    theirs = hf(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs).logits[0]
    found = _logits(ours, tokens, positions, tiles)[:, : theirs.size(1)]
    yield Check("logits", case.name, difference(found, theirs), LIMIT)
    written = hf.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, **inputs
    )[0, len(case.tokens) :].tolist()
    at = first_difference(_greedy(ours, case, tokenizer, theirs.size(1)), written)
    name = f"{case.name}, {len(written)} new"
    yield Check("greedy", name, 0 if at is None else 1, detail="" if at is None else f"differs at token {at}")


def _long(ours, hf, tokenizer: Tokenizer, longest: int, device) -> Check:
    """Few tokens that lie far apart: positions are what RoPE sees."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(tokenizer.vocab_size, (1, _LONG), generator=generator).to(device)
    tokens[tokens == tokenizer.image] = tokenizer.bos
    positions = torch.linspace(0, longest - 1, _LONG).long().to(device)[None]
    # Without a mask transformers would take each jump for a document's begin.
    theirs = hf(input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits[0]
    found = _logits(ours, tokens, positions, tokens.new_empty(0, 3, 1, 1))[:, : theirs.size(1)]
    return Check("logits", f"positions to {longest}", difference(found, theirs), LIMIT)


def _logits(ours, tokens: Tensor, positions: Tensor, tiles: Tensor) -> Tensor:
    """[S, vocabulary] of one document."""
    from nemo_bluelm.layers.attention import PackParams

    count = tokens.size(1)
    bounds = torch.tensor([0, count], dtype=torch.int32, device=tokens.device)
    pack = PackParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=count,
        max_seqlen_kv=count,
        bounds=(0, count),
    )
    embedded, language = ours.embed(tokens, positions, tiles), ours.language
    # A document's rows are at 0, 1, 2, ... for `hidden_states`; here they may be anywhere.
    angles = language._angles(positions.max().item() + 1, positions, of_rows=True)
    hidden = language.decoder(embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=pack)
    return language.logits(hidden)


def _greedy(ours, case: Case, tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    decoder, written = Decoder(ours, tokenizer.pad), []
    try:
        logits = decoder.prefill([case.tokens], [case.tiles], 1, NEW_TOKENS)
        while True:
            written.append(logits[0, :vocabulary].argmax().item())
            if written[-1] == tokenizer.eos or len(written) == NEW_TOKENS:
                return written
            logits = decoder.step(torch.tensor(written[-1:], device=logits.device))
    finally:
        decoder.close()


def _image(width: int, height: int) -> Image.Image:
    """Coarse noise, enlarged: edges for every resize."""
    noise = np.random.default_rng(width).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def _png(image: Image.Image) -> bytes:
    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()
