"""`python -m causal_conv1d`: which backends can run here, and why the others cannot."""

import sys

from causal_conv1d import __version__, backend

if __name__ == "__main__":
    print(f"causal_conv1d {__version__}")
    try:
        print(backend.report())
    except ValueError as error:  # a variable of the environment names something unknown
        sys.exit(str(error))
