"""Weight files as other tools take them: what is in a file, and folders for timm and the Hugging Face Hub.

python checkpoint.py inspect FILE
python checkpoint.py export FILE --ema OUT [--push OWNER/REPO]
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from timm.models import is_model_in_modules, push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme
from torch import nn

from arguments import OneLineParser
from checkpoint import DESCRIPTION, ENTRIES, EXPORTED_WEIGHTS, Checkpoint, describes_model, read_checkpoint
from errors import CheckpointError, one_line, some_of
from failures import run_cli
from identity import Identity, dense_program, describes, identify, open_model

EXPORTED = (EXPORTED_WEIGHTS, DESCRIPTION, "README.md")
# Modules that register names with timm, which has none of them.
OWN_MODELS = ("models_mamba", "models_baseline")

INSTALL = """Run this in a clone of the project's repository, which has the code of this model:

```bash
pip install -e causal_conv1d -e mamba-1p1p1 -r vim/vim_requirements.txt
python vim/predict.py --checkpoint FOLDER photo.jpg
```

The same in Python, started in that clone:

"""
CITATION = (
    "@article{zhu2024vision,\n  title={Vision Mamba: Efficient Visual Representation Learning "
    "with Bidirectional State Space Model},\n  author={Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and "
    "Wang, Xinlong and Liu, Wenyu and Wang, Xinggang},\n  journal={arXiv preprint arXiv:2401.09417},\n"
    "  year={2024}\n}"
)


def inspect(checkpoint: Checkpoint, name: str | None = None) -> str:
    """What a file holds and which model it fits, for people; `name` is the model where the file does not tell."""
    lines = [f"file       {checkpoint.path}", f"sha256     {checkpoint.sha256}"]
    lines.append(f"holds      {', '.join(checkpoint.keys) or 'a state dict alone'}")
    for entry in ENTRIES.values():
        state_dict = getattr(checkpoint, entry)
        if state_dict is not None:
            dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values())
            count = sum(tensor.numel() for tensor in state_dict.values())
            lines.append(f"{entry:<10} {len(state_dict)} tensors, {count / 1e6:.2f} M numbers, {', '.join(dtypes)}")
    if checkpoint.epoch is not None:
        lines.append(f"epoch      {checkpoint.epoch}")
    dense = dense_program(checkpoint.preferred_weights)
    if checkpoint.best_metric is not None:
        score = f"best {dense[1] if dense else 'top-1'}"
        lines.append(f"{score:<10} {best_in_words(checkpoint)}")
    if dense:
        backbone = getattr(checkpoint.args, "model", None)
        return "\n".join([*lines, f"of         {dense[0]}{f' --model {backbone}' if backbone else ''}"])
    identity = identify(checkpoint, name)
    lines.append(f"fits       {identity.name}")
    options = "".join(f", {name}={value!r}" for name, value in identity.arguments.items())
    lines.append(f'model      timm.create_model("{identity.name}"{options})')
    return "\n".join(lines)


def best_in_words(checkpoint: Checkpoint) -> str:
    """The best accuracy of a file's run, which need be neither of this file's epoch nor of both its weights."""
    kind = "averaged" if getattr(checkpoint.args, "eval_weights", None) == "ema" else "raw"
    return f"{checkpoint.best_metric:.2f} % of the run's epochs, {kind} weights, held-out images"


def export_folder(
    model: nn.Module, folder: Path, identity: Identity, source: Checkpoint, names: list[str], card: dict
) -> None:
    """Write `folder` as `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub take it.

    model.safetensors, config.json (name, arguments, preprocessing, class names) and README.md, `model_card`'s. Raises
    CheckpointError where one of them would take the place of a file that is not of an export.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be created: {error.strerror}") from error
    there = [name for name in EXPORTED if (folder / name).exists()]
    if there and not _is_export(folder):
        raise CheckpointError(
            f"{folder} has {some_of(there)} that no export wrote; give another folder, or remove that"
        )
    config = {"label_names": names} if names else {}
    arguments = _json_arguments(identity, source)
    save_for_hf(model, str(folder), model_config=config, model_args=arguments, safe_serialization=True)
    (folder / "README.md").write_text(generate_readme(card, identity.name), encoding="utf-8")


def _is_export(folder: Path) -> bool:
    """Whether an export of this program, or of timm, wrote the folder."""
    try:
        return describes_model(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8-sig")))
    except (OSError, ValueError):
        return False


def _json_arguments(identity: Identity, source: Checkpoint) -> dict:
    """Arguments with which timm makes the model; an exported folder's own, since shapes do not tell all."""
    if describes(source, identity):
        return source.args.model_args
    return {name: value for name, value in identity.arguments.items() if value is not None}


def model_card(model: nn.Module, identity: Identity, source: Checkpoint, licence: str) -> dict:
    """What the model card says, in timm's form; `licence` is the weights', as the Hub calls it."""
    top1 = {} if source.best_metric is None else {"Best top-1": best_in_words(source)}
    module = next((name for name in OWN_MODELS if is_model_in_modules(identity.name, [name])), None)
    vim = module == "models_mamba"
    config = model.pretrained_cfg
    kept = f"bicubic resize, central {100 * config['crop_pct']:g} % of each side"
    scaled = f"mean {tuple(config['mean'])} and standard deviation {tuple(config['std'])} of values from 0 to 1"
    return {
        "tags": ["image-classification", "timm", *(["vision-mamba"] if vim else [])],
        "license": licence,
        "description": f"A{' Vision Mamba (Vim)' if vim else 'n'} image model.",
        "details": {
            "Model": identity.name,
            "Arguments": identity.arguments or "the name's own",
            "Classes": model.num_classes,
            "Input": "{} channels, {} x {} pixels (height x width)".format(*config["input_size"]),
            "Preprocessing": f"{kept}; {scaled}",
            "Made from": f"{source.path.name}, SHA-256 {source.sha256}",
            **top1,
            **({"Paper": "https://arxiv.org/abs/2401.09417"} if vim else {}),
        },
        "usage": (INSTALL if module else "") + f"```python\n{usage(model, module)}```",
        "citation": [CITATION] if vim else [],
    }


def usage(model: nn.Module, module: str | None) -> str:
    """Python that predicts with an exported folder; `module` of vim/ registers the model, None for one of timm's."""
    modes = {1: "L", 3: "RGB"}  # Pillow's; for other numbers of channels there is no usual file
    lines = ["import timm", "import torch", "from PIL import Image", ""]
    if module:
        found = ['sys.path.insert(0, "vim")', f"import {module}  # registers the model with timm", ""]
        lines = ["import sys", "", *lines, *found]
    lines.append('model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/REPO"')
    if mode := modes.get(model.pretrained_cfg["input_size"][0]):
        lines += [
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
            f'image = transform(Image.open("photo.jpg").convert("{mode}"))',
            "with torch.inference_mode():",
            f"    logits = model(image[None])  # (1, {model.num_classes or model.num_features})",
        ]
    return "\n".join(lines) + "\n"


def push_to_hub(
    model: nn.Module, repo: str, identity: Identity, source: Checkpoint, names: list[str], card: dict
) -> str:
    """Upload what `export_folder` writes to the Hub's OWNER/REPO; returns its address.

    Needs a network and a token (`hf auth login`). Raises CheckpointError without.
    """
    config = {"label_names": names} if names else {}
    try:
        push_to_hf_hub(
            model, repo, model_config=config, model_card=card,
            model_args=_json_arguments(identity, source), safe_serialization=True,
        )  # fmt: skip
    except HFValidationError as error:
        raise CheckpointError(f"--push {repo}: expected OWNER/REPO, the name of a repository on the Hub") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise CheckpointError(
            f"--push {repo}: {one_line(error, 200)}; it needs a network and `hf auth login`"
        ) from error
    return f"https://huggingface.co/{repo}"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="checkpoint.py", description="Look into weight files and pass them on.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect|export")

    def add_command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        places = "a file, an exported folder, https://..., hf-hub:REPO or hf-hub:REPO/FILE"
        added.add_argument("file", metavar="FILE", help=places)
        added.add_argument("--model", metavar="NAME", help="name of the model, where the file does not tell it")
        unsafe = "unpickle without torch's safe loader: may run code"
        added.add_argument("--trust-checkpoint", action="store_true", help=unsafe)
        return added

    add_command("inspect", "what a file holds and which model it fits")
    exporter = add_command("export", "write a folder for timm and the Hugging Face Hub")
    exporter.add_argument("out", metavar="OUT", help="folder to write")
    which = exporter.add_mutually_exclusive_group()
    which.add_argument("--ema", dest="weights", action="store_const", const="ema", help="export the averaged weights")
    which.add_argument("--raw", dest="weights", action="store_const", const="raw", help="export the raw weights")
    exporter.add_argument("--push", metavar="OWNER/REPO", help="upload what is exported to the Hub as well")
    exporter.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="the weights' licence, as the Hub calls it (apache-2.0, cc-by-nc-4.0, ...), for the model card; "
        "default: %(default)s",
    )
    exporter.set_defaults(weights="auto")
    return parser


def export(args, checkpoint: Checkpoint) -> None:
    """`checkpoint.py export`."""
    model, identity, entry = open_model(checkpoint, args.model, args.weights)
    names, card = checkpoint.class_names, model_card(model, identity, checkpoint, args.license)
    export_folder(model, Path(args.out), identity, checkpoint, names, card)
    print(f"{args.out}: {identity.name}, entry {entry!r} of {checkpoint.path} (SHA-256 {checkpoint.sha256})")
    print(f'load it with: timm.create_model("local-dir:{args.out}", pretrained=True)')
    if args.push:
        print(f"pushed to {push_to_hub(model, args.push, identity, checkpoint, names, card)}")


def main(argv: list[str] | None = None) -> int:
    """`python checkpoint.py ...`; returns the exit code, 4 for what a user can mend."""
    return run_cli(command, build_parser().parse_args(argv))


def command(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.file, args.trust_checkpoint)
    if args.command == "inspect":
        print(inspect(checkpoint, args.model))
    else:
        export(args, checkpoint)
