"""Configuration of a BlueLM-2.5 vision-language model: SigLIP2, a 2x2 fold with an MLP, a Llama or Qwen3."""

from transformers.models.cohere2_vision.configuration_cohere2_vision import Cohere2VisionConfig


class BlueLMVLConfig(Cohere2VisionConfig):
    """Cohere2Vision's, and beside it ``geometry``: how images are cut into tiles."""

    model_type = "bluelm_vl"
