"""Train and evaluate detectors on a Vim: `python det/train.py --help`.

Exit codes are those of `vim/main.py`, whose loop, checkpoints and flags these are.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `det`
sys.path.insert(0, str(ROOT / "vim"))  # for the program whose parts are used here

from det.program import main  # noqa: E402  (found by the lines above)
from distributed import leave  # noqa: E402

if __name__ == "__main__":
    leave(main())
