"""Parameter counts of a model, read from modules that are built without memory."""

from dataclasses import replace

from nemo_bluelm.config.schema import ModelConfig, ParallelConfig, Part, PrecisionConfig


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part and in total, of the whole model (all ranks); tied embeddings count once.

    Builds the real modules on the meta device, so it costs no memory. Not for a process that is part of a
    distributed job: it sets up a world of its own for the time of the call.
    """
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    import torch

    from nemo_bluelm.model.bluelm import BlueLMModel
    from nemo_bluelm.model.config import language_transformer_config
    from nemo_bluelm.runtime.single import single_process_world

    config = language_transformer_config(model.language, ParallelConfig(), PrecisionConfig())
    # Local layers obey the default device and want apex for fused gradients; both kinds have the same parameters.
    config = replace(config, transformer_impl="local", use_cpu_initialization=True, gradient_accumulation_fusion=False)
    with single_process_world(), torch.device("meta"):
        built = BlueLMModel(config, model, image_token_id=0, max_sequence_length=1)
    counts = {part.value: sum(p.numel() for p in getattr(built, part.value).parameters()) for part in Part}
    return {**counts, "total": sum(counts.values())}
