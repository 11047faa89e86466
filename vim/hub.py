"""Weight files as other tools take them: which model a file fits, and folders for timm and the Hugging Face Hub.

python checkpoint.py inspect FILE
python checkpoint.py export FILE --ema OUT [--push OWNER/REPO]
"""

import argparse
import difflib
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules, push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme
from torch import Tensor, nn

import models_baseline  # noqa: F401  (registers its models with timm)
from arguments import OneLineParser, size_of
from augment import channel_statistics, crop_ratio
from checkpoint import Checkpoint, grid_of_model, load_weights, read_checkpoint
from errors import CheckpointError, nearby, one_line
from failures import run_cli
from models_mamba import CLS_TOKENS, VARIANTS
from pretrained import published_weights

SHORT_NAMES = [name for name in VARIANTS if "_bimambav2" not in name]

# What dense models call the weights of their backbone; by their heads: their program, and what its score is called.
DENSE_BACKBONE = "backbone.model."
DENSE_PROGRAMS = {"decode_head": ("seg/train.py", "mIoU"), "roi_heads": ("det/train.py", "box AP")}

# Modules that register names with timm, which has none of them.
OWN_MODELS = ("models_mamba", "models_baseline")

CITATION = (
    "@article{zhu2024vision,\n  title={Vision Mamba: Efficient Visual Representation Learning "
    "with Bidirectional State Space Model},\n  author={Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and "
    "Wang, Xinlong and Liu, Wenyu and Wang, Xinggang},\n  journal={arXiv preprint arXiv:2401.09417},\n"
    "  year={2024}\n}"
)


@dataclass
class Identity:
    """The model that a file fits: a registered name, and what its constructor takes beside the defaults."""

    name: str
    arguments: dict = field(default_factory=dict)

    def create(self) -> nn.Module:
        return timm.create_model(self.name, **self.arguments)


def identify(checkpoint: Checkpoint, name: str | None = None) -> Identity:
    """Which registered name `checkpoint` fits, from its arguments if it has them and from its shapes if not.

    Raises CheckpointError where neither tells; `name` decides then, or where the file is of another model. A Vim of
    another size than `name`'s is refused.
    """
    named = name is not None
    state_dict = checkpoint.some_weights
    if dense := dense_program(state_dict):
        raise CheckpointError(f"{checkpoint.path} is of {dense[0]}, no classifier; evaluate it there, --eval --resume")
    name = name or getattr(checkpoint.args, "model", None)
    if name is not None and (problem := name_problem(name)):
        whose = "the model" if named else "give --model NAME, its own"
        raise CheckpointError(f"{checkpoint.path}: {whose} {name!r} {problem}")
    if name is not None and name not in VARIANTS:
        return Identity(name, _arguments_of_any(name, checkpoint, state_dict))
    if "patch_embed.proj.weight" not in state_dict or "layers.0.mixer.in_proj.weight" not in state_dict:
        raise CheckpointError(f"{checkpoint.path} holds no Vim ({len(state_dict)} tensors); give --model NAME")
    facts = _shape_facts(state_dict)
    name = name or _nearest_name(facts, _tokens(state_dict))
    defaults, side = VARIANTS[name]
    usual = USUAL | defaults
    for key in ("embed_dim", "depth", "patch_size") if named else ():
        if facts[key] != usual[key]:
            raise CheckpointError(
                f"{checkpoint.path} is no {name}: its {key} is {facts[key]}, not {usual[key]}; "
                f"without --model it is taken for {_nearest_name(facts, _tokens(state_dict))}"
            )
    size = getattr(checkpoint.args, "input_size", None) or _image_size(state_dict, defaults, side, checkpoint)
    facts |= {"img_size": size, "stride": _stride(state_dict, defaults, size, facts)}
    return Identity(name, _differing(facts, defaults, side))


def name_problem(name: str) -> str:
    """Why timm has no model of this name, in words that follow it, with near names or known tags; "" if it has one."""
    if not timm.is_model(name):
        return f"is not registered with timm{nearby(near_names(name))}"
    known = get_arch_pretrained_cfgs(name)
    if "." not in name or not known or name in known:
        return ""
    base, _, tag = name.partition(".")
    tags = [each.partition(".")[2] for each in known if "." in each]
    return f"has the unknown tag {tag!r}; {base} has {', '.join(tags) or 'none, leave it out'}"


def near_names(name: str) -> list[str]:
    """At most three registered names: that begin with `name`, else that are like it, else of its family and size."""
    name, known = name.lower().replace("-", "_").partition(".")[0], timm.list_models()

    def beginning(text: str) -> list[str]:
        return sorted((each for each in known if each.startswith(text) and "_bimambav2" not in each), key=len)

    found = beginning(name) or difflib.get_close_matches(name, known) or beginning("_".join(name.split("_")[:2]))
    return found[:3]


def open_model(
    checkpoint: Checkpoint, name: str | None = None, weights: str = "auto"
) -> tuple[nn.Module, Identity, str]:
    """The model that a file fits, in evaluation mode with the file's weights; its identity; their entry in the file.

    The model's `pretrained_cfg` tells how the file's run evaluated it.

    Args:
        name: the model, where the file does not tell. weights: see `choose_entry`.

    Raises CheckpointError.
    """
    identity = identify(checkpoint, name)
    entry = choose_entry(checkpoint, identity, weights)
    state_dict = checkpoint.weights(entry)
    try:
        model = identity.create()
        load_weights(model, state_dict)
    except (CheckpointError, TypeError) as error:  # a TypeError where another model does not take the arguments
        raise CheckpointError(f"{checkpoint.path} is no {identity.name}: {one_line(error)}") from error
    model.pretrained_cfg = model.pretrained_cfg | preprocessing(model, checkpoint)
    return model.eval(), identity, entry


def grid_of(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(H, W) in patches of the images that a file's model was built for; None where the file does not tell.

    None as well for a model without position embeddings, which has no use for it, and for one that the Hub describes.
    """
    size = getattr(checkpoint.args, "input_size", None)
    state_dict = checkpoint.some_weights
    of_hub = str(getattr(checkpoint.args, "model", "")).startswith("hf-hub:")
    if size is None or of_hub or "pos_embed" not in state_dict:
        return None
    if isinstance(size, int):  # a square, which the number of slots tells
        patches = state_dict["pos_embed"].shape[1] - sum(name.startswith("cls_token") for name in state_dict)
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else None
    with torch.device("meta"):
        return grid_of_model(identify(checkpoint).create())


def dense_program(state_dict: dict[str, Tensor]) -> tuple[str, str] | None:
    """The program whose model these weights are, and its score; None where they are of no dense model."""
    dense = any(name.startswith(DENSE_BACKBONE) for name in state_dict)
    parts = {name.partition(".")[0] for name in state_dict}
    return next((program for head, program in DENSE_PROGRAMS.items() if dense and head in parts), None)


def _arguments_of_any(name: str, checkpoint: Checkpoint, state_dict: dict[str, Tensor]) -> dict:
    """Constructor arguments of a model that is no Vim, as far as its run's arguments tell."""
    arguments = {"in_chans": getattr(checkpoint.args, "in_chans", 3)}
    if getattr(checkpoint.args, "num_classes", None):
        arguments["num_classes"] = checkpoint.args.num_classes
    elif "head.weight" in state_dict:
        arguments["num_classes"] = len(state_dict["head.weight"])
    size = getattr(checkpoint.args, "input_size", None)
    if size and _takes_size(name, size):
        arguments["img_size"] = size
    return arguments


def _takes_size(name: str, size) -> bool:
    """Whether a model is built for one image size, as the run built it then."""
    try:
        timm.create_model(name, img_size=size)
    except TypeError:
        return False
    return True


def _shape_facts(state_dict: dict[str, Tensor]) -> dict:
    """Constructor arguments of `VisionMamba` that the names and shapes of its weights tell."""
    embed_dim, in_chans, *patch_size = state_dict["patch_embed.proj.weight"].shape
    mixer = {
        name.removeprefix("layers.0.mixer."): tensor
        for name, tensor in state_dict.items()
        if name.startswith("layers.0.mixer.")
    }
    inner, d_state = mixer["A_log"].shape
    cls_token = "double" if "cls_token_head" in state_dict else "middle" if "cls_token" in state_dict else "none"
    return {
        "embed_dim": embed_dim,
        "in_chans": in_chans,
        "patch_size": patch_size[0] if len(set(patch_size)) == 1 else tuple(patch_size),
        "depth": 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("layers.")),
        "num_classes": len(state_dict["head.weight"]) if "head.weight" in state_dict else 0,
        "cls_token": cls_token,
        "global_pool": "mean" if cls_token == "none" else "token",
        "pos_embed": "pos_embed" in state_dict,
        "norm": "layer" if "norm_f.bias" in state_dict else "rms",
        "bidirectional": "v2" if "D_b" in mixer else "v1" if "A_b_log" in mixer else "none",
        "d_state": d_state,
        "d_conv": mixer["conv1d.weight"].shape[-1],
        "expand": inner // embed_dim,
        "dt_rank": mixer["dt_proj.weight"].shape[1],
        "conv_bias": "conv1d.bias" in mixer,
        "bias": "in_proj.bias" in mixer,
        "layer_scale": 1.0 if "gamma" in mixer else None,
    }


# What a Vim has unless its variant or an argument says otherwise; dt_rank's depends on the width.
USUAL = {
    "in_chans": 3, "patch_size": 16, "num_classes": 1000, "cls_token": "middle", "global_pool": "token",
    "pos_embed": True, "norm": "rms", "bidirectional": "v2", "d_state": 16, "d_conv": 4, "expand": 2,
    "conv_bias": True, "bias": False, "layer_scale": None,
}  # fmt: skip


def _differing(facts: dict, defaults: dict, side: int) -> dict:
    usual = USUAL | defaults | {"img_size": side}
    usual.setdefault("stride", facts["patch_size"])
    usual["dt_rank"] = math.ceil(facts["embed_dim"] / 16)
    size = facts["img_size"]
    facts = facts | {"img_size": size if isinstance(size, int) else tuple(size)}
    if facts["img_size"] == (side, side):
        facts["img_size"] = side
    return {name: value for name, value in facts.items() if value != usual[name]}


def _tokens(state_dict: dict[str, Tensor]) -> int | None:
    return state_dict["pos_embed"].shape[1] if "pos_embed" in state_dict else None


def _patches_of(defaults: dict, side: int) -> int:
    """Patches of a variant at its usual image size."""
    patch = defaults.get("patch_size", 16)
    return ((side - patch) // defaults.get("stride", patch) + 1) ** 2


def _nearest_name(facts: dict, tokens: int | None) -> str:
    """The short name of this width; where several share it, the one of this depth, patch and grid."""

    def likeness(name: str) -> tuple[bool, ...]:
        defaults, side = VARIANTS[name]
        return (
            defaults["embed_dim"] == facts["embed_dim"],
            defaults.get("patch_size", 16) == facts["patch_size"],
            defaults["depth"] == facts["depth"],
            tokens == _patches_of(defaults, side) + len(CLS_TOKENS[facts["cls_token"]]),
        )

    return max(SHORT_NAMES, key=likeness)


def _image_size(state_dict: dict, defaults: dict, side: int, checkpoint: Checkpoint) -> int:
    """The side of the square image whose patches have `pos_embed`'s number."""
    facts = _shape_facts(state_dict)
    patches = _num_patches(state_dict, facts)
    if patches is None or patches == _patches_of(defaults, side):
        return side
    patch = facts["patch_size"] if isinstance(facts["patch_size"], int) else facts["patch_size"][0]
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise CheckpointError(
            f"{checkpoint.path}: its pos_embed has {patches} patches, no square, and the file does not tell the "
            "image size"
        )
    return (grid - 1) * defaults.get("stride", patch) + patch


def _num_patches(state_dict: dict, facts: dict) -> int | None:
    tokens = _tokens(state_dict)
    return None if tokens is None else tokens - len(CLS_TOKENS[facts["cls_token"]])


def _stride(state_dict: dict, defaults: dict, size, facts: dict) -> int:
    """The step between patches: the variant's, unless another one gives `pos_embed`'s number of patches."""
    patch = to_2tuple(facts["patch_size"])
    usual, patches = defaults.get("stride", facts["patch_size"]), _num_patches(state_dict, facts)

    def fits(stride) -> bool:
        steps = zip(to_2tuple(size), patch, to_2tuple(stride))
        return patches is None or patches == math.prod((side - p) // step + 1 for side, p, step in steps)

    return next((stride for stride in (usual, *range(max(patch), 0, -1)) if fits(stride)), usual)


def choose_entry(checkpoint: Checkpoint, identity: Identity, weights: str = "auto") -> str:
    """The state dict to use: "model" for `weights` "raw", "model_ema" for "ema".

    "auto" takes the average where the published accuracy is the average's (base) or the file has no other.
    """
    if weights != "auto":
        return {"raw": "model", "ema": "model_ema"}[weights]
    published = published_weights(identity.name)
    if published and checkpoint.model_ema is not None and checkpoint.path.name == published.file:
        return published.entry
    return "model" if checkpoint.model is not None else "model_ema"


def inspect(checkpoint: Checkpoint, name: str | None = None) -> str:
    """What a file holds and which model it fits, for people; `name` is the model where the file does not tell."""
    lines = [f"file       {checkpoint.path}", f"sha256     {checkpoint.sha256}"]
    lines.append(f"holds      {', '.join(checkpoint.keys) or 'a state dict alone'}")
    for entry in ("model", "model_ema"):
        state_dict = getattr(checkpoint, entry)
        if state_dict is not None:
            dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values())
            count = sum(tensor.numel() for tensor in state_dict.values())
            lines.append(f"{entry:<10} {len(state_dict)} tensors, {count / 1e6:.2f} M numbers, {', '.join(dtypes)}")
    if checkpoint.epoch is not None:
        lines.append(f"epoch      {checkpoint.epoch}")
    dense = dense_program(checkpoint.some_weights)
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


def evaluation_settings(model: nn.Module, settings: argparse.Namespace) -> argparse.Namespace:
    """What `augment.build_transform` reads for the evaluation of `model`; `settings` are its run's arguments."""
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = built_for or getattr(settings, "input_size", None) or model.pretrained_cfg["input_size"][1:]
    return argparse.Namespace(
        input_size=size_of(size),
        data_set=getattr(settings, "data_set", "IMNET"),
        eval_crop_ratio=getattr(settings, "eval_crop_ratio", 0.875),
    )


def preprocessing(model: nn.Module, source: Checkpoint) -> dict:
    """How `main.py --eval` prepares images for `model`, in timm's words."""
    args, channels = evaluation_settings(model, source.args or argparse.Namespace()), getattr(model, "in_chans", 3)
    mean, std = channel_statistics(channels)
    return {"input_size": (channels, *args.input_size), "crop_pct": crop_ratio(args), "mean": mean, "std": std}


def export_folder(model: nn.Module, folder: Path, identity: Identity, source: Checkpoint, names: list[str]) -> None:
    """Write `folder` as `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hub take it.

    model.safetensors, config.json (name, arguments, preprocessing, class names) and README.md, the model card.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made a folder to export to: {error.strerror}") from error
    config = {"label_names": names} if names else {}
    save_for_hf(model, str(folder), model_config=config, model_args=_json_arguments(identity), safe_serialization=True)
    card = model_card(identity, source)
    (folder / "README.md").write_text(generate_readme(card, identity.name), encoding="utf-8")


def _json_arguments(identity: Identity) -> dict:
    return {name: value for name, value in identity.arguments.items() if value is not None}


def model_card(identity: Identity, source: Checkpoint) -> dict:
    """What the model card says, in timm's form."""
    top1 = {} if source.best_metric is None else {"Best top-1": best_in_words(source)}
    module = next((name for name in OWN_MODELS if is_model_in_modules(identity.name, [name])), None)
    first = f" Import this project's `{module}` first: it registers the model's name." if module else ""
    vim = module == "models_mamba"
    return {
        "tags": ["image-classification", "timm", *(["vision-mamba"] if vim else [])],
        "license": "apache-2.0",
        "description": f"A{' Vision Mamba (Vim)' if vim else 'n'} image model.{first}",
        "details": {
            "Model": identity.name,
            "Arguments": identity.arguments or "the name's own",
            "Made from": f"{source.path.name}, SHA-256 {source.sha256}",
            **top1,
            **({"Paper": "https://arxiv.org/abs/2401.09417"} if vim else {}),
        },
        "usage": f"```python\nimport timm{f', {module}' if module else ''}\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:OWNER/REPO"\n```',
        "citation": [CITATION] if vim else [],
    }


def push_to_hub(model: nn.Module, repo: str, identity: Identity, source: Checkpoint, names: list[str]) -> str:
    """Upload what `export_folder` writes to the Hub's OWNER/REPO; returns its address.

    Needs a network and a token (`hf auth login`). Raises CheckpointError without.
    """
    config = {"label_names": names} if names else {}
    try:
        push_to_hf_hub(
            model, repo, model_config=config, model_card=model_card(identity, source),
            model_args=_json_arguments(identity), safe_serialization=True,
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
    for name, text in (("inspect", "what a file holds and which model it fits"),
                       ("export", "write a folder for timm and the Hugging Face Hub")):  # fmt: skip
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", metavar="FILE", help="a path, https://..., hf-hub:REPO or hf-hub:REPO/FILE")
        command.add_argument("--model", metavar="NAME", help="the model, where the file does not tell")
        command.add_argument("--trust-checkpoint", action="store_true", help="unpickle although it may run code")
    command.add_argument("out", metavar="OUT", help="the folder to write")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--ema", dest="weights", action="store_const", const="ema", help="the averaged weights")
    which.add_argument("--raw", dest="weights", action="store_const", const="raw", help="the raw weights")
    command.add_argument("--push", metavar="OWNER/REPO", help="upload the same to the Hub")
    command.set_defaults(weights="auto")
    return parser


def export(args, checkpoint: Checkpoint) -> None:
    """`checkpoint.py export`."""
    model, identity, entry = open_model(checkpoint, args.model, args.weights)
    names = list(checkpoint.extra.get("class_names", []))
    export_folder(model, Path(args.out), identity, checkpoint, names)
    print(f"{args.out}: {identity.name}, entry {entry!r} of {checkpoint.path} (SHA-256 {checkpoint.sha256})")
    print(f'load it with: timm.create_model("local-dir:{args.out}", pretrained=True)')
    if args.push:
        print(f"pushed to {push_to_hub(model, args.push, identity, checkpoint, names)}")


def main(argv: list[str] | None = None) -> int:
    """`python checkpoint.py ...`; returns the exit code, 4 for what a user can mend."""
    return run_cli(command, build_parser().parse_args(argv))


def command(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.file, args.trust_checkpoint)
    if args.command == "inspect":
        print(inspect(checkpoint, args.model))
    else:
        export(args, checkpoint)
