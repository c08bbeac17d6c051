"""Make shards of synthetic reasoning problems: python tools/make_reasoning.py OUT"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_bluelm.data.make_reasoning import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
