"""Parameter counts of a model, read from modules that are built without memory."""

from unittest import mock

from nemo_bluelm.config.schema import ModelConfig, ParallelConfig, Part


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

    # The layers name the current CUDA device where there is one, which would override the default device.
    nowhere = mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta"))
    with single_process_world(), torch.device("meta"), nowhere:
        config = language_transformer_config(model.language, ParallelConfig(), torch.bfloat16)
        built = BlueLMModel(config, model, image_token_id=0, max_sequence_length=1)
    counts = {part.value: sum(p.numel() for p in getattr(built, part.value).parameters()) for part in Part}
    return {**counts, "total": sum(counts.values())}
