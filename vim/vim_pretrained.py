"""The published weights: where each registered name finds its own, and what to do where there is no network.

`timm.create_model(NAME, pretrained=True)` goes through here. The files are training checkpoints: timm opens
them with torch's safe loader, for which the one class they hold, `argparse.Namespace`, is allow-listed.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

TAG = "hustvl_in1k"
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class PublishedWeights(NamedTuple):
    """A file on the Hugging Face Hub, and which of its state dicts has the published accuracy."""

    repo: str
    file: str
    entry: str = "model"


PUBLISHED = {
    "vim_tiny_patch16_224": PublishedWeights("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
    "vim_tiny_patch16_stride8_224": PublishedWeights("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
    "vim_small_patch16_224": PublishedWeights("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
    "vim_small_patch16_stride8_224": PublishedWeights("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
    "vim_base_patch16_224": PublishedWeights(
        "hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", entry="model_ema"
    ),
}


def published_weights(name: str) -> PublishedWeights | None:
    """The weights of a registered name, long or short; None where none were published."""
    return PUBLISHED.get(name.split("_bimambav2")[0])


def unwrap_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without `module.` and `_orig_mod.` in front of every key."""
    state_dict = dict(state_dict)
    while prefix := next((p for p in WRAPPER_PREFIXES if _all_start_with(state_dict, p)), None):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def weights_in(content: Mapping, entry: str = "model") -> dict[str, torch.Tensor]:
    """The state dict of a file, unwrapped: under `entry`, "model" or "model_ema", or the file itself."""
    found = (content[name] for name in (entry, "model", "model_ema") if content.get(name))
    return unwrap_state_dict(next(found, content))


def _all_start_with(state_dict: dict, prefix: str) -> bool:
    return bool(state_dict) and all(key.startswith(prefix) for key in state_dict)


def refused_name(message: str) -> str:
    """What a pickle asks for that torch's safe loader, whose message this is, would not build; "" if it names none."""
    named = re.search(r"GLOBAL ([\w.]+)", message)
    return named[1] if named else ""


def read_copy(overlay: dict | None) -> dict:
    """What `pretrained_cfg_overlay={"file": PATH}` has to say besides, so that a copied file gives the same weights.

    timm's own reader of files takes the average of a file that has one; its readers of the Hub and of a state dict
    leave the choice to the model.
    """
    path = (overlay or {}).get("file")
    if not path:
        return {}
    try:
        if str(path).endswith(".safetensors"):
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        if refused := refused_name(str(error)):
            raise ValueError(f"{path} was not loaded: its pickle asks for {refused}, which may run code") from error
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is damaged or no weight file ({why})") from error
    head = weights_in(content).get("head.weight")
    # timm makes a new head where this number is not the model's.
    return {"state_dict": content} | ({} if head is None else {"num_classes": len(head)})


@contextmanager
def opening_weights(name: str) -> Iterator[None]:
    """Let timm open a published checkpoint, and say what to do where the Hub cannot be reached."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            yield
    except (LocalEntryNotFoundError, EntryNotFoundError, RepositoryNotFoundError) as error:
        weights = published_weights(name)
        where = f"{weights.repo} {weights.file}" if weights else "REPO FILE"
        unreachable = isinstance(error, LocalEntryNotFoundError)
        why = "not in the local cache, and the Hub cannot be reached" if unreachable else "not on the Hub"
        raise FileNotFoundError(
            f"the weights of {name} are {why}: where there is a network run `hf download {where}`, copy the file, "
            f'and pass pretrained_cfg_overlay={{"file": "PATH"}} beside pretrained=True'
        ) from error
