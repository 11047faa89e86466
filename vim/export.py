"""Write a model for programs without this repository: `python export.py --checkpoint CKPT OUT.onnx` (or OUT.pt2).

Exports run the reference of the scan, a parallel prefix in plain operations, so that what reads them needs no
kernel of ours. Every export is read back and compared before the program says done. Exit codes: 0 done, 2 wrong
flag, 4 something that cannot be exported.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from arguments import OneLineParser, positive_int
from errors import ConfigError, import_optional
from failures import run_cli
from inference import add_model_flags, load_classifier

ONNX_PACKAGES = "onnx onnxscript onnxruntime"
LARGEST_BATCH = 1024
TOLERANCE = 1e-4


def plain_operations(model: nn.Module) -> nn.Module:
    """`model` without registered operations, where it has any; other models as they are."""
    if hasattr(model, "set_fast_path"):
        model.set_fast_path(False)
    return model.eval()


def export_program(model: nn.Module, images: Tensor, dynamic_batch: bool = True) -> ExportedProgram:
    """torch.export of `model` for images (B, C, H, W), for any number of them with `dynamic_batch`."""
    batch = {0: Dim("batch", min=1, max=LARGEST_BATCH)} if dynamic_batch else None
    if dynamic_batch and len(images) == 1:
        images = images.repeat(2, 1, 1, 1)  # torch takes sizes of 1 for constants
    with torch.no_grad():
        return torch.export.export(plain_operations(model), (images,), dynamic_shapes=(batch,))


def export_onnx(program: ExportedProgram, path: Path) -> None:
    """Write an ONNX file. Raises ConfigError where its packages are missing."""
    import_optional("onnxscript", "ONNX", ONNX_PACKAGES)
    import onnx_ir.passes.common as passes

    # The exporter's own optimiser takes minutes for thousands of slices, and runtimes repeat its work.
    found = torch.onnx.export(
        program, dynamo=True, verbose=False, optimize=False, input_names=["images"], output_names=["logits"]
    )
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=1)(found.model)
    passes.DeduplicateInitializersPass()(found.model)
    passes.ClearMetadataAndDocStringPass()(found.model)  # half of the file: where in whose sources each node is from
    found.save(path)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write torch.export's own format. torch's writer says why not in a RuntimeError of many lines."""
    with open(path, "wb") as file:
        torch.export.save(program, file)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """What onnxruntime computes on the CPU for images (B, C, H, W): logits (B, classes)."""
    onnxruntime = import_optional("onnxruntime", "ONNX", ONNX_PACKAGES)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; NaN where either holds one."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="export.py", description="torch.export and ONNX files of a trained model.")
    parser.add_argument("out", metavar="OUT", help="OUT.onnx, or OUT.pt2 for torch.export")
    add_model_flags(parser)
    parser.set_defaults(device="cpu")  # where the model is traced, and its file compared with it
    add = parser.add_argument_group("export").add_argument
    add("--batch-size", default=None, type=positive_int, metavar="N", help="always N images; default: any number")
    return parser


def command(args: argparse.Namespace) -> None:
    path = Path(args.out)
    if path.suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"{path}: the ending chooses the format; use .onnx or .pt2")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.absolute().parent} does not exist")
    classifier = load_classifier(args)
    model = classifier.model
    size = model.pretrained_cfg["input_size"][1:]
    images = torch.randn(args.batch_size or 2, getattr(model, "in_chans", 3), *size)
    with torch.no_grad():
        expected = model(images)
    program = export_program(model, images, dynamic_batch=args.batch_size is None)
    if path.suffix == ".onnx":
        export_onnx(program, path)
        found = run_onnx(path, images)
    else:
        save_program(program, path)
        found = torch.export.load(path).module()(images).detach()
    error = relative_error(found, expected)
    if not error <= TOLERANCE:  # NaN too
        raise ConfigError(f"{path} computes other logits (relative error {error:.1e}); do not use it")
    shape = f"({args.batch_size or 'any'}, {images.shape[1]}, {size[0]}, {size[1]})"
    print(f"{path}: {classifier.description}; images {shape}; relative error {error:.1e} against torch")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_cli(command, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
