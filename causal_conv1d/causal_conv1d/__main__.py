"""`python -m causal_conv1d`: which backends can run here, and why the others cannot."""

from causal_conv1d import __version__, backend

if __name__ == "__main__":
    print(f"causal_conv1d {__version__}")
    print(backend.report())
