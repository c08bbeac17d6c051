"""Make the small corpus of real images and text: python tools/make_corpus.py OUT"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_bluelm.data.corpus import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
