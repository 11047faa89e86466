"""`python -m mamba_ssm`: which backends can run here, and why the others cannot."""

import sys

from mamba_ssm import __version__
from mamba_ssm.ops import backend

if __name__ == "__main__":
    print(f"mamba_ssm {__version__}")
    try:
        print(backend.report())
    except ValueError as error:  # a variable of the environment names something unknown
        sys.exit(str(error))
