"""compare.py RUN RUN: exit code 0 if two runs are the same bit for bit, and their digests."""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "vim"), str(ROOT / "tests")]

from processes import pieces  # noqa: E402  (found by the line above)

first, second = (pieces(Path(folder)) for folder in sys.argv[1:])
for found in (first, second):
    print(f"test-slurm: final digest {hashlib.sha256(json.dumps(found).encode()).hexdigest()}")
differing = [piece for piece in first if first[piece] != second[piece]]
print(f"test-slurm: different: {', '.join(differing)}" if differing else "test-slurm: the runs are the same")
sys.exit(bool(differing))
