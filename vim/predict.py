"""Name what is on images: `python predict.py --checkpoint CKPT IMAGE_OR_FOLDER ...`.

Prints the most probable classes of each image as they are found: a table, or JSON or CSV with --format. Exit
codes: 0 done, 2 wrong flag, 4 a checkpoint or an image that cannot be used; --bad-image skip goes on without those.
"""

import argparse
import csv
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor
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
    add("--topk", default=5, type=positive_int, metavar="K", help="classes to name per image")
    add("--format", default="table", choices=FORMATS, help="format of the output")
    add("--output", metavar="FILE", help="file to write to instead of printing")
    add("--batch-size", default=32, type=positive_int, help="images per batch")
    add(
        "--bad-image",
        default="raise",
        choices=("raise", "skip"),
        help="what to do with an unreadable image: stop, or leave it out",
    )
    return parser


@torch.inference_mode()
def predict(
    classifier: Classifier, files: list[Path], topk: int, batch_size: int, bad_image: str = "raise"
) -> Iterator[dict]:
    """For each file {"file", "predictions": [{"class", "name", "probability"}, ...]}, the first the surest.

    An unreadable file raises DataError after the files before it, or with "skip" is named on stderr.
    """
    topk = min(topk, len(classifier.class_names))
    with tqdm(total=len(files), unit="image", disable=not sys.stderr.isatty()) as progress:
        for part in batches(files, batch_size):
            read, images, error = load_images(classifier, part, bad_image)
            if images:
                logits = classifier.model(torch.stack(images).to(classifier.device)).float()
                shares, classes = (t.tolist() for t in logits.softmax(dim=1).topk(topk))
                for file, row, probabilities in zip(read, classes, shares):
                    guesses = [
                        {"class": number, "name": classifier.class_names[number], "probability": probability}
                        for number, probability in zip(row, probabilities)
                    ]
                    yield {"file": str(file), "predictions": guesses}
            if error:
                raise error
            progress.update(len(part))


def load_images(
    classifier: Classifier, files: list[Path], bad_image: str
) -> tuple[list[Path], list[Tensor], DataError | None]:
    """The readable files, their images (C, H, W), and what is wrong with the file before which it stopped, if any."""
    read, images = [], []
    for file in files:
        try:
            images.append(classifier.load_image(file))
        except DataError as error:
            if bad_image == "raise":
                return read, images, DataError(f"{error}, or use --bad-image skip")
            tqdm.write(f"unreadable image skipped: {error}", file=sys.stderr)
        else:
            read.append(file)
    return read, images, None


class Form(NamedTuple):
    """How results are written: what stands before the first, each, between two, and after the last."""

    head: str
    each: Callable[[dict], str]
    between: str = ""
    tail: str = ""


def form(name: str, files: list[Path]) -> Form:
    """One of FORMATS, for results of `files`."""
    if name == "json":
        return Form("[\n", as_json, ",\n", "\n]\n")
    if name == "csv":
        return Form("file,rank,class,name,probability\n", as_csv)
    width = max(len(str(file)) for file in files)
    return Form("", lambda result: as_table(result, width))


def as_table(result: dict, width: int) -> str:
    """A line a guess, the file's name before the first one."""
    lines = []
    for i, guess in enumerate(result["predictions"]):
        name = result["file"] if i == 0 else ""
        lines.append(f"{name:<{width}}  {100 * guess['probability']:6.2f} %  {guess['name']}\n")
    return "".join(lines)


def as_csv(result: dict) -> str:
    """A row a guess: file, rank from 1, class number, name, probability."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for rank, guess in enumerate(result["predictions"], start=1):
        rows.writerow([result["file"], rank, guess["class"], guess["name"], f"{guess['probability']:.6f}"])
    return text.getvalue()


def as_json(result: dict) -> str:
    """An item of a list."""
    return textwrap.indent(json.dumps(result, indent=2), "  ")


def write(results: Iterator[dict], form: Form, file: TextIO) -> int:
    """Write each result as it comes, so that an error loses none before it; returns their number."""
    count = 0
    file.write(form.head)
    try:
        for result in results:
            # tqdm's, which keeps clear of the progress bar where both are on one terminal
            tqdm.write((form.between if count else "") + form.each(result), file=file, end="")
            file.flush()
            count += 1
    finally:
        file.write(form.tail)
    return count


def command(args: argparse.Namespace) -> None:
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise DataError(f"--output {args.output}: its folder does not exist; make it first")
    files = find_images(args.images)
    classifier = load_classifier(args)
    print(f"{classifier.description}; {len(files)} images on {classifier.device}", file=sys.stderr)
    results = predict(classifier, files, args.topk, args.batch_size, args.bad_image)
    if args.output:
        try:
            with open(args.output, "w", encoding="utf-8", errors="surrogateescape") as file:
                count = write(results, form(args.format, files), file)
        except OSError as error:
            raise DataError(f"--output {args.output}: {error.strerror}") from error
    else:
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
        count = write(results, form(args.format, files), sys.stdout)
    if not count:
        raise DataError(f"none of {len(files)} images can be read, the first is {files[0]}")
    if count < len(files):
        print(f"{len(files) - count} of {len(files)} images skipped: they cannot be read", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_cli(command, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
