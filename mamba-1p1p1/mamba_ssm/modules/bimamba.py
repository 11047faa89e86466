"""The bidirectional block of Vision Mamba as a layer for other people's networks."""

from torch import Tensor

from mamba_ssm.modules.mamba_simple import Mamba


class BiMamba(Mamba):
    """Bidirectional Mamba mixer (Vision Mamba, arXiv 2401.09417, algorithm 1): (B, L, E) in and out, any L.

    `Mamba` with the options of the released Vim weights: two full directions, halved sum. It takes the place
    of a self-attention layer, also of timm's vision transformers, whose blocks pass `attn_mask` and `is_causal`.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, conv_bias, bias, dt_init_backward: see `Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        dt_init_backward: str = "published",
        device=None,
        dtype=None,
    ):
        super().__init__(
            d_model, d_state, d_conv, expand, dt_rank, conv_bias=conv_bias, bias=bias, device=device, dtype=dtype,
            bimamba_type="v2", if_divide_out=True, dt_init_backward=dt_init_backward,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mix tokens: (B, L, E) -> (B, L, E). Every token reaches every other: there is nothing to mask."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                f"{'attn_mask' if attn_mask is not None else 'is_causal'}: both directions read the whole sequence; "
                "leave it out, or use Mamba(bimamba_type='none') for a causal layer"
            )
        return super().forward(hidden_states)
