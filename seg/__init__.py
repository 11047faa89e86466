"""Semantic segmentation: UPerNet on a Vim, or on any other backbone of timm. `python seg/train.py --help`."""
