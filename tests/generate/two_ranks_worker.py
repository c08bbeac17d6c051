"""Replies of a model split over two processes: torchrun --nproc-per-node=2 two_ranks_worker.py CHECKPOINT SAMPLING"""

import json
import os
import sys
from pathlib import Path

from prompts import PROMPTS

from nemo_bluelm.generate.generator import open_generator
from nemo_bluelm.generate.request import Sampling

checkpoint, sampling = Path(sys.argv[1]), json.loads(sys.argv[2])
sampling["stop"] = tuple(sampling["stop"])
with open_generator(checkpoint, tensor=2) as generator:
    replies = generator.generate(PROMPTS, Sampling(**sampling))
(checkpoint / f"replies{os.environ['RANK']}.json").write_text(json.dumps([vars(reply) for reply in replies]))
