"""The vision tower and the projector as one ONNX graph: tiles in, their tokens out."""

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from nemo_bluelm.atomic import cleared_on_sigterm
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Part, geometry_of
from nemo_bluelm.convert.exporting import Exported, export_state
from nemo_bluelm.convert.hf_files import export_config
from nemo_bluelm.convert.table import EXPORT
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, parts_in

OPSET = 18
INPUT, OUTPUT = "tiles", "tokens"
INLINE_BYTES = 2**30  # more weights lie in a file beside the graph: protobuf ends at 2 GiB
_PARTS = (Part.vision, Part.projector)


class _Tiles(nn.Module):
    """[tiles, 3, side, side] uint8 -> [tiles, tokens per tile, hidden]. Pixels are brought to [-1, 1] inside."""

    def __init__(self, vision_tower: nn.Module, multi_modal_projector: nn.Module):
        super().__init__()
        self.vision_tower, self.multi_modal_projector = vision_tower, multi_modal_projector

    def forward(self, tiles: Tensor) -> Tensor:
        dtype = self.multi_modal_projector.linear_1.weight.dtype
        pixels = (tiles.float() / 127.5 - 1.0).to(dtype)
        return self.multi_modal_projector(self.vision_tower(pixels).last_hidden_state)


def export_onnx(checkpoint: Path, out: Path, dtype: Optional[torch.dtype] = None) -> Exported:
    """Write the graph of the exported modelling code; it is there whole or not at all. Any number of tiles goes in.

    Weights above ``INLINE_BYTES`` are in ``out`` with ``.data`` behind its name, which belongs beside it.

    Args:
        dtype: of weights and output; None takes FP32. ONNX Runtime has no BF16 of what a ViT needs on CPUs.

    Raises:
        UserError: the extra ``export`` isn't installed; the checkpoint lacks one of the two parts or can't be read;
            BF16; ``out`` or its data exists or can't be written.
    """
    dtype = dtype or torch.float32
    if dtype is torch.bfloat16:
        raise UserError("ONNX Runtime can't run a vision tower in bfloat16; take --dtype float32")
    data = out.with_name(f"{out.name}.data")
    for path in (out, data):
        if path.exists():
            raise UserError(f"{path} exists; remove it or choose another")
    for part in _PARTS:
        if part not in parts_in(checkpoint):
            raise UserError(f"{checkpoint} lacks the {part.value} part; export a checkpoint that has it")
    try:
        import onnxscript  # noqa: F401  PyTorch's exporter is written in it
    except ImportError as error:
        raise UserError("ONNX needs onnx and onnxscript; pip install 'nemo-bluelm[export]'") from error
    graph, counts = _graph(checkpoint, dtype)
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    side = graph.vision_tower.config.image_size
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
        with cleared_on_sigterm(), hidden as folder, _quiet():
            torch.onnx.export(
                graph,
                (example,),
                Path(folder) / out.name,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={"tiles": {0: torch.export.Dim("count", min=1)}},
                external_data=size > INLINE_BYTES,
                verbose=False,
            )
            for path in (data, out):  # the graph last: where it is, all is
                if (Path(folder) / path.name).exists():
                    os.replace(Path(folder) / path.name, path)
    except OSError as error:
        data.unlink(missing_ok=True)  # it was not there before
        raise UserError(f"{out} can't be written: {error.strerror or error}; choose another place") from error
    return Exported(counts, size, (0, 0))


def _graph(checkpoint: Path, dtype: torch.dtype) -> tuple[_Tiles, dict[Part, int]]:
    from transformers import AutoModel

    from nemo_bluelm.convert.hf.configuration_bluelm_vl import BlueLMVLConfig
    from nemo_bluelm.convert.hf.modeling_bluelm_vl import BlueLMVLProjector

    recipe, tokenizer = load_recipe(str(checkpoint / RECIPE_FILE), []), Tokenizer.load(checkpoint / TOKENIZER_FILE)
    config = BlueLMVLConfig(**export_config(recipe, set(Part), tokenizer))
    state = dict(export_state(checkpoint, {part: EXPORT[part] for part in _PARTS}))
    assert config.vision_config.image_size == geometry_of(recipe.model).tile
    config.vision_config._attn_implementation = "sdpa"
    graph = _Tiles(AutoModel.from_config(config.vision_config), BlueLMVLProjector(config))
    graph.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    counts = {part: sum(name.startswith(EXPORT[part]) for name in state) for part in _PARTS}
    return graph.to(dtype).eval(), counts


class _quiet(warnings.catch_warnings):
    """The exporter tells of its passes and of operators that torchvision would bring."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *error):
        logging.disable(self._before)
        super().__exit__(*error)
