"""NeMo's way to the same code: ``nemo.lightning.io.import_ckpt(model, "hf://DIR", output_path=CKPT)``.

Importing this module registers both for :class:`nemo_bluelm.runtime.plugin.BlueLM`.
"""

from pathlib import Path
from typing import Optional

from nemo.lightning import io

from nemo_bluelm.convert.exporting import export_hf
from nemo_bluelm.convert.importing import import_hf
from nemo_bluelm.runtime.plugin import BlueLM
from nemo_bluelm.runtime.run_dir import resolve_checkpoint


@io.model_importer(BlueLM, "hf")
class HFImporter(io.ModelConnector):
    """From a Hugging Face folder, this path."""

    def apply(self, output_path: Path, recipe: Optional[str] = None) -> Path:
        import_hf(Path(str(self)), output_path, recipe)
        return output_path


@io.model_exporter(BlueLM, "hf")
class HFExporter(io.ModelConnector):
    """From a run or checkpoint folder, this path: ``BlueLM.exporter("hf", CKPT)(output_path=DIR)``."""

    def apply(self, output_path: Path) -> Path:
        export_hf(resolve_checkpoint(str(self), "checkpoint"), output_path)
        return output_path
