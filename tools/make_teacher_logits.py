"""Store a teacher's likeliest tokens of a recipe's documents: python tools/make_teacher_logits.py TEACHER RECIPE OUT"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_bluelm.train.teacher_logits import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
