"""Object detection and instance segmentation on a Vim: `python det/train.py --help`."""
