"""The whole model of transformers' parts, joined by hand."""

import torch
import torch.nn.functional as F
from hf_weights import hf_language, hf_vision, language_tensors, normalized, randomize, vision_tensors
from megatron_world import IMAGE


class Joined(torch.nn.Module):
    """Transformers' SigLIP, an unfold-based projector and transformers' Llama on one document."""

    def __init__(self, config, seed: int):
        super().__init__()
        vision, language = config.vision.hidden_size, config.language.hidden_size
        self.side = config.geometry.tile // config.geometry.patch
        self.vision, self.language = hf_vision(config, seed), hf_language(config, seed + 1)
        layers = torch.nn.LayerNorm(4 * vision), torch.nn.Linear(4 * vision, language)
        self.projector = torch.nn.Sequential(*layers, torch.nn.GELU(), torch.nn.Linear(language, language))
        randomize(self.projector, seed + 2)

    def visual(self, tiles):
        features = self.vision(normalized(tiles)).last_hidden_state
        image = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        image = F.pad(image, (0, self.side % 2, 0, self.side % 2))
        # unfold orders channels (channel, row, column); ours are (row, column, channel).
        blocks = F.unfold(image, 2, stride=2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
        return self.projector(blocks.transpose(1, 2))

    def embed(self, tokens, tiles):
        embeds = self.language.get_input_embeddings()(tokens)
        return embeds.masked_scatter((tokens == IMAGE)[..., None], self.visual(tiles)) if len(tiles) else embeds

    def forward(self, tokens, tiles):
        return self.language(inputs_embeds=self.embed(tokens, tiles)).logits[0]


def joined_tensors(named, config):
    """Tensors of a Joined under the names of our model."""
    parts = {part: {} for part in ("vision", "projector", "language")}
    for name, tensor in named.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    places = {"0": "norm", "1": "linear_fc1", "3": "linear_fc2"}
    ours = {
        "vision": vision_tensors(parts["vision"], config.vision.num_attention_heads),
        "projector": {f"{places[n[0]]}{n[1:]}": t for n, t in parts["projector"].items()},
        "language": language_tensors(parts["language"], config.language.num_query_groups),
    }
    return {f"{part}.{name}": tensor for part, tensors in ours.items() for name, tensor in tensors.items()}
