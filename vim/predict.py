"""Name what is on images: `python predict.py --checkpoint CKPT IMAGE_OR_FOLDER ...`.

Prints the most probable classes of each image: a table, or JSON or CSV with --format. Exit codes: 0 done,
2 wrong flag, 4 an image or a checkpoint that cannot be used.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import OneLineParser, positive_int
from errors import DataError
from failures import run_cli
from inference import Classifier, add_device_flag, add_model_flags, batches, find_images, load_classifier

FORMATS = ("table", "json", "csv")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="predict.py", description="The most probable classes of images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, or folders of images")
    add_model_flags(parser)
    add_device_flag(parser)
    add = parser.add_argument_group("output").add_argument
    add("--topk", default=5, type=positive_int, metavar="K", help="classes an image")
    add("--format", default="table", choices=FORMATS, help="what is printed")
    add("--output", metavar="FILE", help="write there instead of printing")
    add("--batch-size", default=32, type=positive_int, help="images at once")
    return parser


@torch.inference_mode()
def predict(classifier: Classifier, files: list[Path], topk: int, batch_size: int) -> Iterator[dict]:
    """For each file {"file", "predictions": [{"class", "name", "probability"}, ...]}, the first the surest."""
    topk = min(topk, len(classifier.class_names))
    with tqdm(total=len(files), unit="image", disable=not sys.stderr.isatty()) as progress:
        for part in batches(files, batch_size):
            images = torch.stack([classifier.load_image(file) for file in part])  # (B, C, H, W)
            logits = classifier.model(images.to(classifier.device)).float()
            shares, classes = (t.tolist() for t in logits.softmax(dim=1).topk(topk))
            for file, row, probabilities in zip(part, classes, shares):
                guesses = [
                    {"class": number, "name": classifier.class_names[number], "probability": probability}
                    for number, probability in zip(row, probabilities)
                ]
                yield {"file": str(file), "predictions": guesses}
            progress.update(len(part))


def as_table(results: list[dict]) -> str:
    """A line a guess, the file's name before its first one."""
    width = max(len(result["file"]) for result in results)
    lines = []
    for result in results:
        for i, guess in enumerate(result["predictions"]):
            name = result["file"] if i == 0 else ""
            lines.append(f"{name:<{width}}  {100 * guess['probability']:6.2f} %  {guess['name']}")
    return "\n".join(lines) + "\n"


def as_csv(results: list[dict]) -> str:
    """A row a guess: file, rank from 1, class number, name, probability."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "rank", "class", "name", "probability"])
    for result in results:
        for rank, guess in enumerate(result["predictions"], start=1):
            rows.writerow([result["file"], rank, guess["class"], guess["name"], f"{guess['probability']:.6f}"])
    return text.getvalue()


def as_json(results: list[dict]) -> str:
    return json.dumps(results, indent=2) + "\n"


def command(args: argparse.Namespace) -> None:
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise DataError(f"--output {args.output}: its folder does not exist; make it first")
    files = find_images(args.images)
    classifier = load_classifier(args)
    print(f"{classifier.description}; {len(files)} images on {classifier.device}", file=sys.stderr)
    results = list(predict(classifier, files, args.topk, args.batch_size))
    text = {"table": as_table, "json": as_json, "csv": as_csv}[args.format](results)
    if not args.output:
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
        sys.stdout.write(text)
        return
    try:
        Path(args.output).write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"--output {args.output}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_cli(command, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
