"""Random arguments of the operations, which several files of tests share."""

import pytest
import torch

from mamba_ssm.ops.bimamba import DirectionParameters, _serves_block

BF16 = torch.bfloat16


def scan_inputs(B=2, D=6, N=4, L=7, form="token", dtype=torch.float64, is_complex=False):
    """u, delta, A, B, C, D, z, delta_bias; B and C "constant", "token" or "grouped"."""
    torch.manual_seed(0)
    columns = 2 * L if is_complex else L
    shape = {"constant": (D, N), "token": (B, N, columns), "grouped": (B, 2, N, columns)}[form]
    A = -torch.rand(D, N) - 0.1
    matrix_dtype = torch.complex128 if is_complex and form == "constant" else dtype
    inputs = [
        torch.randn(B, D, L, dtype=dtype),
        torch.randn(B, D, L, dtype=dtype),
        torch.complex(A, torch.randn(D, N)).to(torch.complex128) if is_complex else A.to(dtype),
        torch.randn(shape, dtype=matrix_dtype),
        torch.randn(shape, dtype=matrix_dtype),
        torch.randn(D, dtype=dtype),
        torch.randn(B, D, L, dtype=dtype),
        torch.randn(D, dtype=dtype),
    ]
    return [t.requires_grad_() for t in inputs]


def direction(D, N, R, W, dtype, seed, conv_bias=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    A = (-torch.rand(D, N, generator=generator) - 0.1).to(dtype).requires_grad_()
    return DirectionParameters(
        normal(D, W), normal(D) if conv_bias else None, normal(R + 2 * N, D, scale=D**-0.5),
        normal(D, R, scale=R**-0.5), normal(D), A, normal(D),
    )  # fmt: skip


def mixer_inputs(B=2, L=5, D=6, N=3, R=2, W=3, dtype=torch.float64, conv_bias=True):
    torch.manual_seed(0)
    xz = torch.randn(B, L, 2 * D, dtype=dtype, requires_grad=True)
    return xz, direction(D, N, R, W, dtype, 1, conv_bias), direction(D, N, R, W, dtype, 2, conv_bias)


needs_block = pytest.mark.skipif(
    not _serves_block(16, 32, 3, 3), reason="the CPU kernels that take the projections along are not built"
)
