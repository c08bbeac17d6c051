"""Score pairs by a reward model: python tools/score_pairs.py CHECKPOINT SHARD..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_bluelm.rl.score_pairs import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
