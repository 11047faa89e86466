"""What is measured: a Vim or a DeiT at a resolution, as a callable that runs it once.

A subject is named MODEL or MODEL/ATTENTION: `vim_tiny_patch16_224`, `deit_tiny_patch16_224/flash`.
Attention is one of ATTENTION: "eager" materialises the attention matrix, "sdpa" lets torch choose, the
others force one backend of torch's scaled_dot_product_attention.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import timm
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import published
from harness import ROOT

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "vim"))
import models_mamba  # noqa: F401  (registers the Vim names)
from dense import SCALES, Backbone
from seg.upernet import Rescale

ATTENTION = {
    "eager": None,
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COMPILE = ("none", "default", "reduce-overhead", "max-autotune")
DENSE = {"num_classes": 0, "dynamic_img_size": True}
PUBLISHED = " (published kernels)"  # ends the name of a Vim on the published CUDA kernels
MODES = ("infer", "backward", "step")
MODES_HELP = "infer: forward; backward: forward and backward; step: the optimiser's step, too"
# "-weights" casts the parameters once; the others run torch.autocast over float32 parameters.
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "bfloat16-weights": (torch.bfloat16, True),
}


def model_of(name: str) -> str:
    """The registered name in a subject's."""
    return name.partition("/")[0].removesuffix(PUBLISHED)


@dataclass(frozen=True)
class Subject:
    """One thing to measure. `mode`: "infer", "backward" (after a forward) or "step" (and AdamW's step).

    `pyramid`: the model without its head as a dense backbone, with four levels of x4, x2, x1 and x0.5 resolution.
    """

    name: str
    px: int
    batch: int
    mode: str = "infer"
    precision: str = "float32"
    device: str = "cpu"
    compile: str = "none"
    pyramid: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (
            ("attention", self.attention or "sdpa", ATTENTION),
            ("mode", self.mode, MODES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r} of {self.name}: use one of {', '.join(known)}")
        if self.mode != "infer" and PRECISIONS[self.precision][1]:
            raise ValueError(f"precision {self.precision!r} is for inference: training keeps float32 weights")

    @property
    def model_name(self) -> str:
        return model_of(self.name)

    @property
    def attention(self) -> str:
        return self.name.partition("/")[2]

    def fields(self) -> dict[str, object]:
        return asdict(self)


class Pyramid(torch.nn.Module):
    """Images (B, 3, H, W) -> UPerNet's four levels."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.levels = torch.nn.ModuleList(Rescale(width, scale) for width, scale in zip(backbone.channels, SCALES))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [level(x) for level, x in zip(self.levels, self.backbone(images))]


def loss_of(output, labels: torch.Tensor) -> torch.Tensor:
    """Something to differentiate: cross-entropy of logits, or the levels' mean squares."""
    if isinstance(output, list):
        return sum(level.float().square().mean() for level in output)
    return F.cross_entropy(output, labels)


def build_model(subject: Subject) -> torch.nn.Module:
    """The model with random weights (seeded), on its device, in its mode and precision."""
    torch.manual_seed(0)
    model = timm.create_model(subject.model_name, img_size=subject.px, **DENSE if subject.pyramid else {})
    if subject.attention:
        for block in model.blocks:
            block.attn.fused_attn = subject.attention != "eager"
    if subject.name.endswith(PUBLISHED):
        published.use_published_kernels(model, published.kernels())
    if subject.pyramid:
        model = Pyramid(Backbone(model, len(SCALES)))
    dtype, cast = PRECISIONS[subject.precision]
    model = model.to(subject.device, dtype if cast else None).train(subject.mode != "infer")
    if subject.compile != "none":
        model = torch.compile(model, mode=subject.compile)
    return model


def attention_context(subject: Subject) -> contextlib.AbstractContextManager:
    backend = ATTENTION[subject.attention or "sdpa"]
    return sdpa_kernel([backend]) if backend else contextlib.nullcontext()


def autocast_context(subject: Subject) -> contextlib.AbstractContextManager:
    dtype, cast = PRECISIONS[subject.precision]
    enabled = dtype != torch.float32 and not cast
    return torch.autocast(torch.device(subject.device).type, dtype, enabled=enabled)


def build(subject: Subject) -> Callable[[], object]:
    """A callable that runs the subject once: a forward, a forward + backward, or a whole training step."""
    model = build_model(subject)
    dtype, cast = PRECISIONS[subject.precision]
    images = torch.randn(subject.batch, 3, subject.px, subject.px, device=subject.device)  # (B, 3, H, W)
    images = images.to(dtype) if cast else images
    labels = torch.arange(subject.batch, device=subject.device)  # (B)

    def infer():
        with torch.inference_mode(), attention_context(subject), autocast_context(subject):
            return model(images)

    def backward():
        model.zero_grad(set_to_none=True)
        with attention_context(subject):
            with autocast_context(subject):
                loss = loss_of(model(images), labels)
            loss.backward()

    if subject.mode == "infer":
        return infer
    if subject.mode == "backward":
        return backward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step():
        backward()
        optimizer.step()

    return step


def attention_chosen(subject: Subject) -> str:
    """The backend that torch's SDPA takes for this subject; "eager" and "" (no attention) as given."""
    if subject.attention in ("", "eager"):
        return subject.attention
    dtype = PRECISIONS[subject.precision][0]
    model = timm.create_model(subject.model_name, img_size=subject.px, depth=1)
    heads, width = model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim
    shape = (subject.batch, heads, model.pos_embed.shape[1], width)  # (B, heads, L, head width)
    query = torch.empty(shape, device=subject.device, dtype=dtype, requires_grad=subject.mode != "infer")
    with attention_context(subject):
        chosen = SDPBackend(torch._fused_sdp_choice(query, query, query))
    return chosen.name.removesuffix("_ATTENTION").lower()
