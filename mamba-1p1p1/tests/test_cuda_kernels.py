"""The mixer's CUDA kernels against the float64 reference: outputs and every gradient.

Without a GPU the kernels' sources, compiled by g++, run on CPU tensors (cuda_emulation.h). On a GPU the same cases run
there, and larger ones: `-m gpu`.

The kernels take 16-bit activations alone. float16, whose roundings are eight times finer than bfloat16's, shows
errors of logic; bfloat16 may err by what rounding u, one of the scans, y and the weights costs (docs/LOG.md). Sums over
states take TF32 factors, of ten bits like float16's.
"""

import pytest
import torch

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops import backend, bimamba, reference

pytest.importorskip("triton")
from mamba_ssm.ops.cuda import bimamba as kernels

EMULATED = not torch.cuda.is_available()
DEVICE = "cpu" if EMULATED else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.usefixtures("emulated_cuda") if EMULATED else pytest.mark.gpu,
]
NAMES = bimamba.DirectionParameters._fields
# max|x - r| / max|r| of activations and their gradients, and of parameters' gradients
LIMITS = {torch.float16: (1.25e-3, 5e-3), torch.bfloat16: (8e-3, 2.5e-2)}
LONG, LONG_LIMITS = 500, (1.5e-3, 5e-3)  # of more tokens, more to be the largest float16 error of: 1.4e-3 of a thousand


def case(batch=1, length=11, channels=32, rank=12, width=4, bias=True, dtype=torch.float16):
    return locals()


CASES = {
    "one-token": case(length=1, batch=2),
    "two-tokens": case(length=2, width=2, bias=False, dtype=torch.bfloat16),
    "group-and-one": case(length=9, width=3),
    "tile": case(length=16, batch=3),
    "tile-and-one": case(length=17, channels=96),
    "even-tiles": case(length=32),
    "idle-warps": case(length=21, channels=160),
    "chunk-less-one": case(length=63),
    "chunk-and-one": case(length=65, channels=64),
    "unpadded-rank": case(length=12, rank=8, batch=2),
    "vim-length": case(length=197),
    "bf16": case(length=37, channels=64, dtype=torch.bfloat16),
    "bf16-two-tiles": case(length=25, batch=2, dtype=torch.bfloat16),
}
LARGE = {  # of a GPU
    "vim-tiny": case(batch=3, length=197, channels=384, rank=12, dtype=torch.bfloat16),
    "stride-8": case(length=730, channels=384, rank=12),
    "vim-small": case(batch=2, length=197, channels=768, rank=24),
    "vim-base": case(length=1000, channels=1536, rank=48),
}


def arguments(case, seed=0):
    """xz, both directions' parameters, the gradient of y."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    D, R, W = (case[key] for key in ("channels", "rank", "width"))

    def direction():
        parameters = (
            0.5 * draw(D, W), 0.2 * draw(D) if case["bias"] else None, draw(R + 32, D) / D**0.5,
            draw(D, R) / R**0.5, draw(D) - 2, -torch.exp(0.3 * draw(D, 16)), draw(D),
        )  # fmt: skip
        return bimamba.DirectionParameters(*(None if p is None else p.to(DEVICE) for p in parameters))

    xz, dy = draw(case["batch"], case["length"], 2 * D), draw(case["batch"], case["length"], D)
    return xz.to(DEVICE, case["dtype"]), direction(), direction(), dy.to(DEVICE, case["dtype"])


def in_float64(parameters):
    return bimamba.DirectionParameters(*(None if p is None else p.cpu().double() for p in parameters))


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.double().cpu() - expected).abs().max() / scale).nan_to_num(float("inf")).item()


def assert_close(actual, expected, names, limit):
    for name, grad, right in zip(names, actual, expected):
        assert (grad is None) == (right is None), name
        assert grad is None or relative_error(grad, right) <= limit, name


@pytest.mark.parametrize("few", [True, False], ids=["two-channels", "four-channels"])
@pytest.mark.parametrize("name", [*CASES, *([] if EMULATED else LARGE)])
def test_the_mixer_equals_the_reference(name, few, monkeypatch):
    """Both cuts of the kernels, for few and for many sequences."""
    case = (CASES | LARGE)[name]
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(1))
    monkeypatch.setattr(kernels, "FEW_WARPS", 10**6 if few else 0)
    assert kernels._shapes(case["batch"], case["channels"], case["rank"]).backward.channels == (2 if few else 4)
    xz, ahead, behind, dy = arguments(case)
    long = case["length"] > LONG and case["dtype"] == torch.float16
    activations, parameters = LONG_LIMITS if long else LIMITS[case["dtype"]]
    y, saved = kernels.bimamba_forward(xz, ahead, behind, 0.5, True)
    assert saved.numel() == 0
    wide = xz.cpu().double(), in_float64(ahead), in_float64(behind)
    right, right_saved = reference.bimamba_forward(*wide, 0.5, True)
    assert relative_error(y, right) <= activations

    dxz, *grads = kernels.bimamba_backward(dy, xz, ahead, behind, 0.5, saved)
    expected_dxz, *expected = reference.bimamba_backward(dy.cpu().double(), *wide, 0.5, right_saved)
    assert relative_error(dxz, expected_dxz) <= activations
    for direction in range(2):
        assert_close(grads[direction], expected[direction], NAMES, parameters)


@pytest.fixture
def serving(monkeypatch):
    """A device for which few sequences are enough: on a real one Triton's kernels would walk them."""
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(1))


def test_the_same_bits_twice_and_in_memory_of_their_own(serving):
    xz, ahead, behind, dy = arguments(case(length=40, batch=2, channels=64))
    runs = [kernels.bimamba_backward(dy, xz, ahead, behind, 0.5, None) for _ in range(2)]
    first, second = ([dxz, *ahead_grads, *behind_grads] for dxz, ahead_grads, behind_grads in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert len({grad.untyped_storage().data_ptr() for grad in first}) == len(first)


def test_rows_that_16_byte_copies_cannot_read(serving):
    xz, ahead, behind, dy = arguments(case(length=20))
    cut = torch.cat([xz, xz[..., :3]], dim=-1)[..., : xz.shape[-1]]  # rows of 67 elements
    assert cut.stride(1) % 8
    for run in (
        lambda x: kernels.bimamba_forward(x, ahead, behind, 0.5, False)[0],
        lambda x: kernels.bimamba_backward(dy, x, ahead, behind, 0.5, None)[0],
    ):
        assert torch.equal(run(xz), run(cut))


def test_arguments_that_begin_anywhere(serving):
    """A gradient and an A that are views behind another element."""
    xz, ahead, behind, dy = arguments(case(length=20))

    def moved(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    offset = moved(dy), xz, ahead._replace(A=moved(ahead.A)), behind
    assert offset[0].is_contiguous() and offset[0].data_ptr() % 16 and offset[2].A.data_ptr() % 16
    (dxz, *_), (expected, *_) = (kernels.bimamba_backward(*a, 0.5, None) for a in (offset, (dy, xz, ahead, behind)))
    assert torch.equal(dxz, expected)


@pytest.mark.parametrize("decay", bimamba.DECAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, 12])
def test_weights_are_narrowed_and_padded(rank, dtype, decay):
    """All in one launch: in 16 bits as torch rounds them, where of the padding's rows any number will do; and A."""
    _, ahead, behind, _ = arguments(case(rank=rank, channels=64, dtype=dtype))
    others = torch.randn(128, 36, device=DEVICE).T, torch.randn(32, 64, device=DEVICE).double()  # one is strided
    parameters = kernels._parameters(ahead, behind)
    weights = kernels._prepare(parameters, dtype, *others, decay=decay, backward=True)
    padded = kernels._padded(rank)
    for both, weight in zip(weights.x_proj, parameters.x_proj_weight):
        assert both.shape[0] == padded + 32
        assert torch.equal(torch.cat([both[:rank], both[padded:]]), weight.to(dtype))
    assert all(torch.equal(new, old.to(dtype)) for new, old in zip(weights.others, others))
    for made, given in zip(weights.dt_weight, parameters.dt_weight):
        assert torch.equal(made[:, :rank], given.to(dtype)) and not made[:, rank:].any()
    assert kernels._prepare(parameters, dtype, *others, decay=decay).dt_weight is None
    for made, given in zip(weights.parameters.A, parameters.A):
        right = -torch.exp(given.double()) if decay == "log" else given.double()
        assert relative_error(made, right.cpu()) <= (2e-7 if decay == "log" else 0)


def test_what_is_served(monkeypatch):
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(132))
    sizes = {"batch": 128, "length": 197, "channels": 384, "d_state": 16, "rank": 12, "d_conv": 4}
    served = {"dtype": torch.bfloat16} | sizes
    assert kernels.serves(**served)
    for change in (
        {"dtype": torch.float32}, {"batch": 8}, {"channels": 400}, {"d_state": 8}, {"rank": 10}, {"d_conv": 5},
        {"rank": 96}, {"length": 2**22}, {"batch": 2**16}, {"length": 2**21, "channels": 32, "batch": 2**12},
    ):  # fmt: skip
        assert not kernels.serves(**served | change), change
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(132, 100 * 1024))
    assert not kernels.serves(**served)


@pytest.mark.parametrize(
    ("batch", "length", "segment"),
    [(128, 197, 40), (32, 6085, 40), (1, 197, 32), (1, 1, 32), (1000, 197, 40), (8, 730, 32)],
)
def test_segments_of_the_convolution(batch, length, segment, monkeypatch):
    """Of Vim-Ti's 384 channels on 132 multiprocessors: whole steps, and as near to whole waves as they allow."""
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(132))
    assert kernels._conv_segment(batch, length, 384) == segment


@pytest.mark.parametrize(("few", "rank"), [(False, 12), (True, 12), (False, 32)], ids=["", "two-channels", "rank-32"])
@pytest.mark.parametrize("length", [3, 9, 40, 43])
@pytest.mark.parametrize("multiprocessors", [1, 2])
def test_scans_in_pieces(multiprocessors, length, few, rank, monkeypatch):
    """More sequences than walk at once: cut wherever equal parts of them end, in either half of the way and between,
    they give the same bits, forward and backward, as sequences walked as a whole.
    """
    monkeypatch.setattr(kernels, "FEW_WARPS", 10**6 if few else 0)
    for batch in (1, 5, 11):
        xz, *directions, dy = arguments(case(batch, length, channels=64, rank=rank, dtype=torch.bfloat16))
        results, cut = [], []
        for count, least in ((multiprocessors, 0), (100, 0), (multiprocessors, 10**6)):
            monkeypatch.setattr(kernels, "_device", lambda count=count: kernels.Device(count, 2**20))
            monkeypatch.setattr(kernels, "TILES_OF_A_SLOT", least)
            weights = kernels._prepare(kernels._parameters(*directions), xz.dtype)
            results.append([])
            for gradient in (None, dy):
                inputs = kernels._scan_inputs(xz, weights, again=gradient is not None)
                cut.append(inputs.pieces.period > 1)
                results[-1] += kernels._scan_forward(xz, inputs, weights.parameters, 0.5, gradient)
        shapes = kernels._shapes(batch, 64, rank)[:2]
        sizes = [(batch * kernels.ceil_div(64, s.block), multiprocessors * s.resident // (2 * s.warps)) for s in shapes]
        assert cut == [jobs > slots and jobs % slots > 0 for jobs, slots in sizes] + 4 * [False]
        for values in zip(*results):
            assert values[0] is None or all(torch.equal(values[0], other) for other in values[1:])


@pytest.mark.parametrize(
    ("batch", "length", "channels", "again", "cut"),
    [
        (128, 197, 384, False, False), (128, 197, 384, True, True),
        (128, 197, 768, False, True), (128, 197, 768, True, True),
        (32, 6085, 384, False, False), (88, 197, 384, False, False), (264, 197, 384, False, False),
    ],
)  # fmt: skip
def test_which_scans_are_cut(batch, length, channels, again, cut, monkeypatch):
    """On an H200: neither whole waves nor less than 45 tiles for a block."""
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(132, 228 * 1024))
    rank = channels // 32
    shapes = kernels._shapes(batch, channels, rank)
    shape = shapes.again if again else shapes.forward
    pieces = kernels._pieces(batch, length, channels, shape, kernels._forward_shared(shape, rank, again))
    assert (pieces.period > 1) == cut
    assert not cut or pieces.slots == 132 * shape.resident // (2 * shape.warps)


def test_slots_are_as_many_as_shared_memory_holds(monkeypatch):
    """Vim-B's blocks of 66 KB: three on an H200, two on an A100."""
    shape = kernels.Shape(4, 2, 12)
    shared = kernels._forward_shared(shape, 48, again=True)
    for memory, together in ((228 * 1024, 3), (164 * 1024, 2)):
        monkeypatch.setattr(kernels, "_device", lambda memory=memory: kernels.Device(100, memory))
        assert kernels._pieces(128, 197, 1536, shape, shared).slots == 100 * together


# --- with its projections


@pytest.fixture
def cuda_backend(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")


def block_arguments(dtype, requires_grad=False, decay="A"):
    _, *directions, _ = arguments(case(channels=64, length=21))
    if decay == "log":
        directions = [direction._replace(A=torch.log(-direction.A)) for direction in directions]
    ahead, behind = directions
    generator = torch.Generator().manual_seed(1)
    hidden, w_in, w_out = (
        torch.randn(shape, generator=generator).to(DEVICE) for shape in ((2, 21, 32), (128, 32), (32, 64))
    )
    tensors = [hidden.to(dtype), w_in / 32**0.5, w_out / 64**0.5, *ahead, *behind]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def run_block(tensors, dtype=None, decay="A"):
    count = len(NAMES)
    directions = (bimamba.DirectionParameters(*tensors[i : i + count]) for i in (3, 3 + count))
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        return bimamba.bimamba_block(*tensors[:3], *directions, 0.5, decay)


@pytest.mark.parametrize("decay", bimamba.DECAYS)
@pytest.mark.parametrize("how", ["autocast", "float16 activations"])
def test_the_block_equals_the_reference(how, decay, cuda_backend):
    """Out and every gradient, with autocast and without; nothing but hidden is kept for backward."""
    half = torch.bfloat16 if how == "autocast" else torch.float16
    activations, parameters = LIMITS[half]
    tensors = block_arguments(torch.float32 if how == "autocast" else half, requires_grad=True, decay=decay)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = run_block(tensors, half if how == "autocast" else None, decay)
    assert out.dtype == half
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    new = [t for t in kept if t.untyped_storage().data_ptr() not in given and t.numel()]
    assert sum(t.nbytes for t in new) <= 2 * tensors[0].numel()  # hidden in 16 bits at most

    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, half)
    grads = torch.autograd.grad(out, tensors, dout)
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    directions = [bimamba.DirectionParameters(*wide[i : i + len(NAMES)]) for i in (3, 3 + len(NAMES))]
    if decay == "log":
        directions = [direction._replace(A=-torch.exp(direction.A)) for direction in directions]
    right = reference.bimamba(wide[0] @ wide[1].T, *directions, 0.5) @ wide[2].T
    assert relative_error(out.detach(), right.detach()) <= activations
    expected = torch.autograd.grad(right, wide, dout.cpu().double())
    names = ("hidden", "in_proj", "out_proj", *NAMES, *NAMES)
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in tensors]
    assert_close(grads, expected, names, parameters)


@pytest.mark.parametrize("decay", bimamba.DECAYS)
def test_block_where_triton_walks_few_sequences(decay, cuda_backend, monkeypatch):
    """A block of too few sequences for these kernels. Emulated, the reference stands for Triton."""
    if EMULATED:
        monkeypatch.setattr(kernels, "triton_bimamba", reference)
    tensors = block_arguments(torch.float16, requires_grad=True, decay=decay)
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(10**6))
    few = torch.autograd.grad(run_block(tensors, decay=decay).sum(), tensors)
    monkeypatch.setattr(kernels, "_device", lambda: kernels.Device(1))
    many = torch.autograd.grad(run_block(tensors, decay=decay).sum(), tensors)
    for a, b in zip(few, many):
        assert relative_error(a, b.double().cpu()) <= 1e-2


@pytest.mark.parametrize("decay", bimamba.DECAYS)
def test_registered_op(decay, cuda_backend):
    arguments = (*block_arguments(torch.float16, requires_grad=True), 0.5, decay)
    torch.library.opcheck(
        torch.ops.mamba_ssm.bimamba_half_block, arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"), atol=1e-2, rtol=1e-2,
    )  # fmt: skip


@pytest.mark.skipif(EMULATED, reason="graphs are of a GPU")
def test_a_cuda_graph_replays_training(cuda_backend):
    tensors = block_arguments(torch.float16, requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            eager = torch.autograd.grad(run_block(tensors).square().sum(), tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(run_block(tensors).square().sum(), tensors)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured))


@pytest.mark.parametrize("dynamic", [False, True], ids=["one-size", "any-size"])
def test_the_block_compiles_whole(dynamic, cuda_backend):
    """One graph under autocast, forward and backward, with the numbers of eager mode."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer = Mamba(32, dt_rank=12, bimamba_type="v2", if_divide_out=True).to(DEVICE)
    hidden = torch.randn(2, 21, 32, device=DEVICE, requires_grad=True)

    def run(module):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = module(hidden)
        return out, *torch.autograd.grad(out.float().square().sum(), [hidden, *mixer.parameters()])

    whole = torch.compile(mixer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for compiled, eager in zip(run(whole), run(mixer)):
        assert relative_error(compiled.detach(), eager.detach().double().cpu()) <= 1e-6
