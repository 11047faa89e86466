"""Which model a weight file is of: its registered name, its constructor's arguments, its grid of patches."""

import argparse
import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import timm
import torch
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg_value
from torch import Tensor, nn

import models_baseline  # noqa: F401  (registers its models with timm)
from arguments import size_of
from augment import channel_statistics, crop_ratio
from checkpoint import ENTRIES, Checkpoint
from errors import CheckpointError, ConfigError, nearby, one_line
from fitting import TELL_THE_SIZE, grid_of_model, load_weights
from models_mamba import VARIANTS
from vim_pretrained import published_weights
from vim_tokens import CLS_TOKENS

SHORT_NAMES = [name for name in VARIANTS if "_bimambav2" not in name]

# What dense models call the weights of their backbone; by their heads: their program, and what its score is called.
DENSE_BACKBONE = "backbone.model."
DENSE_PROGRAMS = {"decode_head": ("seg/train.py", "mIoU"), "roi_heads": ("det/train.py", "box AP")}


@dataclass
class Identity:
    """The model that a file fits: a registered name, and what its constructor takes beside the defaults."""

    name: str
    arguments: dict = field(default_factory=dict)

    def create(self) -> nn.Module:
        with hub_as_config_error("--model", self.name):
            return timm.create_model(self.name, **self.arguments)


def identify(checkpoint: Checkpoint, name: str | None = None) -> Identity:
    """Which registered name `checkpoint` fits, from its arguments if it has them and from its shapes if not.

    `name` overrides the file; it is needed when the file names no model. Raises CheckpointError if nothing identifies
    the model, or if a Vim's size contradicts `name`.
    """
    named = name is not None
    state_dict = checkpoint.preferred_weights
    if dense := dense_program(state_dict):
        raise CheckpointError(
            f"{checkpoint.path} is a model of {dense[0]}, not a classifier: evaluate it there, with --eval --resume"
        )
    name = name or getattr(checkpoint.args, "model", None)
    if name is not None and (problem := name_problem(name)):
        mend = "" if named else "; --model NAME overrides it"
        raise CheckpointError(f"{checkpoint.path}: {'the' if named else 'its'} model {name!r} {problem}{mend}")
    if name is not None and name not in VARIANTS:
        return Identity(name, _arguments_of_any(name, checkpoint, state_dict))
    if "patch_embed.proj.weight" not in state_dict or "layers.0.mixer.in_proj.weight" not in state_dict:
        raise CheckpointError(f"{checkpoint.path} holds no Vim ({len(state_dict)} tensors); {_way_out(state_dict)}")
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


def _way_out(state_dict: dict[str, Tensor]) -> str:
    """What to do with weights that are no Vim's by their names."""
    inner = "patch_embed.proj.weight"
    found = [name.removesuffix(inner) for name in state_dict if name.endswith("." + inner)]
    if found:
        return f"its names begin with {found[0]!r}: save it again without that, or give --model NAME"
    return "give --model NAME"


def name_problem(name: str) -> str:
    """Error text that follows the model's name, with near names or known tags; "" if the name is registered.

    What the Hub holds as hf-hub:OWNER/REPO only asking it would tell.
    """
    if name.startswith("hf-hub:"):
        return ""
    if not timm.is_model(name):
        return f"is not registered with timm{nearby(near_names(name))}"
    known = get_arch_pretrained_cfgs(name)
    if "." not in name or not known or name in known:
        return ""
    base, _, tag = name.partition(".")
    tags = [each.partition(".")[2] for each in known if "." in each]
    return f"has the unknown tag {tag!r}; {base} has {', '.join(tags) or 'none, leave it out'}"


@contextmanager
def hub_as_config_error(flag: str, name: str) -> Iterator[None]:
    """Turn what the Hub says about a model `hf-hub:OWNER/REPO`, or that it says nothing, into a ConfigError."""
    repo = name.removeprefix("hf-hub:")
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{flag} {name} is not in the local cache and the Hub cannot be reached; where there is a network run "
            f"`hf download {repo.replace('@', ' --revision ')} config.json`, then copy that cache (HF_HOME)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{flag} {name}: the Hub shows you no such repository; check OWNER/REPO, for a private one `hf auth login`"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise ConfigError(f"{flag} {name} cannot be downloaded: {one_line(error, 300)}") from error


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
        model = _create(checkpoint, identity)
        load_weights(model, state_dict)
    except ConfigError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # such as arguments that another model does not take
        raise CheckpointError(f"{checkpoint.path} is no {identity.name}: {one_line(error)}") from error
    model.pretrained_cfg = model.pretrained_cfg | preprocessing(model, checkpoint)
    return model.eval(), identity, entry


def _create(checkpoint: Checkpoint, identity: Identity) -> nn.Module:
    """The model of `identity`, for an exported folder with the arguments in its config.json: shapes do not tell all."""
    if describes(checkpoint, identity):
        return timm.create_model(f"local-dir:{checkpoint.path.parent}")
    return identity.create()


def describes(checkpoint: Checkpoint, identity: Identity) -> bool:
    """Whether an exported folder's config.json, and not the shapes alone, says how the model of `identity` is made."""
    return checkpoint.exported and identity.name == checkpoint.args.model


def choose_entry(checkpoint: Checkpoint, identity: Identity, weights: str = "auto") -> str:
    """The state dict to use: "model" for `weights` "raw", "model_ema" for "ema".

    "auto" takes the average where the published accuracy is the average's (base) or the file has no other. Raises
    CheckpointError for a choice from an exported folder, which holds one of them and does not tell which.
    """
    if weights != "auto" and checkpoint.exported:
        raise CheckpointError(
            f"{checkpoint.path} holds one set of weights, the exported one: {weights} cannot be chosen, leave it out"
        )
    if weights != "auto":
        return ENTRIES[weights]
    published = published_weights(identity.name)
    if published and checkpoint.model_ema is not None and checkpoint.path.name == published.file:
        return published.entry
    return checkpoint.preferred_entry


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
    return {
        "input_size": (channels, *args.input_size), "crop_pct": crop_ratio(args), "mean": mean, "std": std,
        "interpolation": "bicubic", "crop_mode": "center", "test_input_size": None, "test_crop_pct": None,
    }  # fmt: skip


def grid_of(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(H, W) in patches of the images that a file's model was built for; None where the file does not tell.

    None as well for a model without position embeddings, which has no use for it, and for one that the Hub describes.
    """
    size = getattr(checkpoint.args, "input_size", None)
    state_dict = checkpoint.preferred_weights
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
    elif (weight := _classifier_weight(name, state_dict)) is not None:
        arguments["num_classes"] = len(weight)
    size = getattr(checkpoint.args, "input_size", None)
    if size and _takes_size(name, size):
        arguments["img_size"] = size
    return arguments


def _classifier_weight(name: str, state_dict: dict[str, Tensor]) -> Tensor | None:
    """The weight of the last layer, (classes, ...), by what timm says that `name` calls it; None if there is none."""
    layer = None if name.startswith("hf-hub:") else get_pretrained_cfg_value(name, "classifier")
    layers = layer if isinstance(layer, tuple | list) else [layer or "head"]  # a distilled model has two
    return state_dict.get(f"{layers[0]}.weight")


def _takes_size(name: str, size) -> bool:
    """Whether this model's constructor accepts img_size."""
    try:
        with torch.device("meta"), hub_as_config_error("--model", name):
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
            f"image size; {TELL_THE_SIZE}"
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
