"""The model against the published implementation's numbers, its contracts, and the interface timm's tools expect."""

import math
import pickle
import re

import pytest
import timm
import torch

import models_mamba
import vim_tokens
from mamba_ssm.ops import backend, reference
from models_mamba import VARIANTS, VisionMamba, resample_pos_embed
from oracle_cases import fill, gradient_numbers, image, load_arrays, load_json

CASES = {case["name"]: case for case in load_json("models.json")}
REGISTERED = load_json("registered.json")
ALIASES = {name: name.split("_bimambav2")[0] for name in VARIANTS if "_bimambav2" in name}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NANO = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


def layout(model):
    return [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]


def build(case, dtype):
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in case["kwargs"].items()}
    return fill(VisionMamba(**kwargs).to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_state_dict_of_small_models(name):
    model = build(CASES[name], torch.float32)
    assert layout(model) == load_json("layouts.json")[CASES[name]["layout"]]
    assert sum(p.numel() for p in model.parameters()) == CASES[name]["n_params"]


def expect_gradients(model, images, numbers, tolerance):
    """Every recorded norm and projection, `null` meaning no gradient; `<image>` is the input's."""
    images = images.clone().requires_grad_()
    logits = model(images)
    loss = logits.square().mean()
    loss.backward()
    parameters = dict(model.named_parameters()) | {"<image>": images}
    for name, recorded in numbers["grads"].items():
        grad = parameters[name].grad
        if recorded is None:
            assert grad is None or not grad.any(), name
            continue
        l2, probe = gradient_numbers(name, grad)
        limit = tolerance * recorded[0] + 1e-3 * tolerance
        assert abs(l2 - recorded[0]) <= limit and abs(probe - recorded[1]) <= limit, (name, l2, probe, recorded)
    assert loss.item() == pytest.approx(numbers["loss"], rel=tolerance)
    return logits


@pytest.mark.parametrize("name", CASES)
def test_small_models_in_float64(name):
    case = CASES[name]
    logits = expect_gradients(build(case, torch.float64).train(), image(**case["image"]).double(), case, 1e-8)
    torch.testing.assert_close(logits.detach(), load_arrays("models.npz")[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_small_models_in_float32(name):
    case = CASES[name]
    logits = expect_gradients(build(case, torch.float32).train(), image(**case["image"]), case, 1e-4)
    expected = load_arrays("models.npz")[name].float()
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", sorted({key.split("/")[1] for key in load_arrays("models.npz") if key[:5] == "trace"}))
def test_every_block(name):
    model, arrays = build(CASES[name], torch.float64), load_arrays("models.npz")
    step = 2 if CASES[name]["kwargs"]["bidirectional"] == "layer" else 1
    with torch.no_grad():
        stages = list(model._stages(model._embed(image(**CASES[name]["image"]).double())))
    assert len(stages) == len(model.layers) // step
    for i, (hidden, residual) in enumerate(stages):

        def recorded(what, i=i):
            value = arrays[f"trace/{name}/layer{step * i}/{what}"]
            if step == 2:  # the second of a pair reads the sequence backwards; both are summed
                value = value + arrays[f"trace/{name}/layer{step * i + 1}/{what}"].flip(1)
            return value.double()

        torch.testing.assert_close(hidden, recorded("hidden"), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(residual, recorded("residual"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALIASES)
def test_state_dict_of_registered_names(name):
    """Published weights load by these names and shapes."""
    with torch.device("meta"):
        model, alias = timm.create_model(name), timm.create_model(ALIASES[name])
    assert layout(model) == layout(alias)
    if name in REGISTERED:
        assert layout(model) == load_json("layouts.json")[REGISTERED[name]["layout"]]
        assert sum(p.numel() for p in model.parameters()) == REGISTERED[name]["n_params"]


def test_parameter_counts():
    with torch.device("meta"):
        counts = {
            size: round(sum(p.numel() for p in timm.create_model(f"vim_{size}_patch16_224").parameters()) / 1e6, 2)
            for size in ("tiny", "small", "base")
        }
    assert counts == {"tiny": 7.15, "small": 25.80, "base": 97.60}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_names(name, device, monkeypatch):
    """Logits to 1e-5 of their largest, and every gradient, in float32 on whatever backend runs there."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the patch embedding's convolution
    model, images = fill(timm.create_model(name)).to(device), image(2, 3, 224, 224).to(device)
    if REGISTERED[name]["grads"]:
        logits = expect_gradients(model.train(), images, REGISTERED[name]["grads"], 1e-4).detach()
    else:
        with torch.no_grad():
            logits = model.eval()(images)
    logits, expected = logits.cpu(), load_arrays("models.npz")[name]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert logits.argmax(1).tolist() == REGISTERED[name]["argmax"]


def expect_close_bfloat16(name, device, limit, count=2):
    """Of the first `count` images."""
    model, images = fill(timm.create_model(name)).eval().to(device), image(2, 3, 224, 224)[:count].to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        logits = model(images)
    cosine = torch.cosine_similarity(logits.double().cpu(), load_arrays("models.npz")[name][:count])
    assert cosine.min() >= limit


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REGISTERED)
def test_autocast_bfloat16_stays_close(name, device):
    """The distances seen, and what each rounding adds to them: docs/LOG.md, 2026-11-26."""
    expect_close_bfloat16(name, device, 0.9999 if device == "cpu" else 0.9997)


@pytest.fixture
def cuda_backend(emulated_cuda, monkeypatch):
    """The CUDA backend on CPU tensors; its norms, which are Triton's, by the reference."""
    pytest.importorskip("triton")
    kernels = pytest.importorskip("mamba_ssm.ops.cuda.kernels", exc_type=ImportError)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")
    monkeypatch.setattr(kernels, "add_norm_forward", reference.add_norm_forward)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself: the test above")
@pytest.mark.parametrize("name", REGISTERED)
def test_autocast_bfloat16_on_the_cuda_kernels(name, cuda_backend):
    """All of a block's activations rounded, as autocast means it on a GPU."""
    expect_close_bfloat16(name, "cpu", 0.9997, count=1)  # an emulated image takes a minute


@pytest.mark.slow
def test_bfloat16_training_from_the_published_initialisation():
    """200 steps on four images, classes as labels: nothing that is not finite, and the loss falls."""
    torch.manual_seed(0)
    model, images, labels = VisionMamba(**NANO), torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1), []
    for _ in range(200):
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.1 < 1 < losses[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bidirectional": "v3"},
        {"cls_token": "center"},
        {"global_pool": "mean"},  # with a class token
        {"cls_token": "none"},  # with global_pool="token"
        {"norm": "batch"},
        {"dt_init_backward": "zero"},
        {"img_size": 4},
    ],
    ids=str,
)
def test_bad_option_values(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name}|an image of 4 x 4 is smaller than a patch of 8 x 8: use"):
        VisionMamba(**NANO | wrong)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("img_size", "a", "a whole number of at least 1, or (height, width)"),
        ("img_size", (32,), "a whole number of at least 1, or (height, width)"),
        ("patch_size", 0, "a whole number of at least 1, or (height, width)"),
        ("stride", 0, "None, a whole number of at least 1, or (height, width)"),
        ("in_chans", 0, "a whole number of at least 1"),
        ("num_classes", -1, "a whole number of at least 1, or 0 for no head"),
        ("embed_dim", 32.0, "a whole number of at least 1"),
        ("depth", 0, "a whole number of at least 1"),
        ("norm_eps", -1, "0 or a positive number"),
        ("drop_rate", -0.5, "a number between 0 and 1"),
        ("drop_path_rate", 1.5, "a number between 0 and 1"),
        ("d_state", 0, "a whole number of at least 1"),
        ("d_conv", 0, "a whole number of at least 1"),
        ("expand", 0, "a positive number"),
        ("expand", "a", "a positive number"),
        ("dt_rank", 0, "'auto' or a whole number of at least 1"),
        ("dt_rank", "foo", "'auto' or a whole number of at least 1"),
        ("pos_embed", "none", "True or False"),
        ("dynamic_img_size", "a", "True or False"),
        ("conv_bias", None, "True or False"),
        ("bias", "a", "True or False"),
        ("layer_scale", "a", "None or a number"),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_the_accepted_ones(name, value, accepted):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is invalid: use {accepted}") + "$"):
        VisionMamba(**NANO | {name: value})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_images_that_nothing_has_scaled_are_refused(dtype):
    """Bytes from 0 to 255 would give logits, of another picture."""
    with pytest.raises(ValueError, match=f"^images are {dtype}: use floating point, scaled and normalised"):
        VisionMamba(**NANO)(torch.zeros(1, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize("classes", [-5, "5"])
def test_a_head_of_classes_that_cannot_be_is_refused(classes):
    model = VisionMamba(**NANO)
    with pytest.raises(ValueError, match=f"^num_classes={classes!r} is invalid: use a whole number of at least 1, or"):
        model.reset_classifier(classes)


def test_the_modules_names_are_its_models():
    names = {}
    exec("from models_mamba import *", names)
    assert set(REGISTERED) | {"VisionMamba"} <= names.keys()
    assert pickle.loads(pickle.dumps(timm.model_entrypoint("vim_nano_patch4_32"))) is names["vim_nano_patch4_32"]


def test_a_misspelt_option_raises():
    with pytest.raises(TypeError, match="bidirectionl"):
        timm.create_model("vim_nano_patch4_32", bidirectionl="v2")


def test_drop_path_rates_are_shifted_by_one():
    model = VisionMamba(**NANO | {"depth": 4, "drop_path_rate": 0.3})
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2]) and model.drop_path.drop_prob == pytest.approx(0.3)
    assert VisionMamba(**NANO | {"depth": 1, "drop_path_rate": 0.3}).drop_path.drop_prob == 0.3


@pytest.mark.parametrize("number", [1, 2])
def test_stochastic_depth_drops_what_a_block_gave(number):
    """Where it is certain to, the block might as well give nothing; in evaluation nothing is dropped."""
    model, images = fill(VisionMamba(**NANO | {"depth": 3, "drop_path_rate": 0.5})).train(), torch.randn(2, 3, 32, 32)
    for of_block, drop in ((1, model.layers[2].drop_path), (2, model.drop_path)):
        drop.drop_prob = float(of_block == number)
    dropped = model(images), model.forward_intermediates(images)[0]
    assert not torch.allclose(dropped[0], model.eval()(images))
    torch.nn.init.zeros_(model.layers[number].mixer.out_proj.weight)
    torch.testing.assert_close(dropped, (model(images), model.forward_features(images)))


def test_patches_are_embedded_in_float32_under_autocast():
    embed, images = VisionMamba(**NANO).patch_embed, torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = embed(images)
    assert torch.equal(found, embed(images)) and found.dtype == torch.float32


@pytest.mark.parametrize("pos_embed", [True, False])
def test_dropout_is_of_the_embedded_tokens(pos_embed):
    model, images = VisionMamba(**NANO | {"drop_rate": 1.0, "pos_embed": pos_embed}), torch.randn(2, 3, 32, 32)
    assert not model.train()._embed(images).any() and model.eval()._embed(images).any()


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    mixer = VisionMamba(**NANO | {"embed_dim": 128}).layers[0].mixer
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert delta.min() >= 0.0009 and delta.max() <= 0.11
    assert not mixer.dt_proj_b.bias.any(), "the backward time step starts at softplus(0)"
    assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
    torch.testing.assert_close(mixer.A_b_log[3], torch.arange(1, 17).float().log())
    bound = 1 / (256**0.5 * 2**0.5)  # torch's default bound for D = 256 inputs, over sqrt(depth)
    assert bound * 0.9 < mixer.out_proj.weight.abs().max() <= bound
    same = VisionMamba(**NANO | {"dt_init_backward": "same"}).layers[0].mixer
    assert same.dt_proj_b.bias.any()


def test_what_surrounds_the_mixers_starts_as_published():
    torch.manual_seed(0)
    model = VisionMamba(**NANO | {"embed_dim": 128, "num_classes": 100, "bias": True})
    heads = [model.head]
    model.reset_classifier(50)
    heads.append(model.head)
    for values in (model.pos_embed, model.cls_token, *(head.weight for head in heads)):
        assert values.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.05)
    mixers = [block.mixer for block in model.layers]
    for module in (model.patch_embed.proj, *heads, *(m.in_proj for m in mixers), *(m.out_proj for m in mixers)):
        assert not module.bias.any()


@pytest.mark.parametrize(
    "cls_token, pool", [("middle", "token"), ("head", "token"), ("double", "token"), ("none", "mean")]
)
@pytest.mark.parametrize("bidirectional", ["v2", "layer"])
def test_intermediates_are_the_residual_stream_without_class_tokens(cls_token, pool, bidirectional):
    torch.manual_seed(0)
    model = VisionMamba(
        **NANO | {"img_size": (32, 48), "cls_token": cls_token, "global_pool": pool, "bidirectional": bidirectional}
    ).eval()
    images = torch.randn(2, 3, 32, 48)
    tokens, (feature,) = model.forward_intermediates(images, indices=1, norm=True)
    assert feature.shape == (2, 32, 4, 6)
    torch.testing.assert_close(tokens, model.forward_features(images))
    patches = models_mamba.split_cls_tokens(tokens, cls_token)[0]
    torch.testing.assert_close(feature, patches.transpose(1, 2).unflatten(2, (4, 6)))
    raw = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)[0]
    hidden, residual = list(model._stages(model._embed(images)))[-1]
    torch.testing.assert_close(raw, models_mamba.split_cls_tokens(hidden + residual, cls_token)[0])


def test_blocks_in_pairs_are_pruned_in_pairs():
    model, images = VisionMamba(**NANO | {"depth": 6, "bidirectional": "layer"}).eval(), torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(images, [1], intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1] and len(model.layers) == 4
    torch.testing.assert_close(model.forward_intermediates(images, [1], intermediates_only=True), expected)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_block_without_a_partner_is_idle(depth):
    with pytest.warns(UserWarning, match=f"depth={depth}: bidirectional='layer' pairs its blocks"):
        model = fill(VisionMamba(**NANO | {"depth": depth, "bidirectional": "layer"})).eval()
    images = torch.randn(2, 3, 32, 32)
    model(images).sum().backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is None} == {str(depth - 1)}
    expected = model(images)
    model.layers = model.layers[:-1]
    torch.testing.assert_close(model(images), expected)


def test_features_only():
    model = timm.create_model("vim_nano_patch4_32", features_only=True, out_indices=(0, 2))
    features = model(torch.randn(2, 3, 32, 32))
    assert [tuple(f.shape) for f in features] == [(2, 64, 8, 8), (2, 64, 8, 8)]
    assert model.feature_info.channels() == [64, 64] and model.feature_info.reduction() == [4, 4]
    assert len(model.model.layers) == 3, "blocks after the last feature are pruned"


def test_classifier_can_be_reset():
    model = timm.create_model("vim_nano_patch4_32", num_classes=7)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 7) and model.get_classifier().out_features == 7
    model.double().reset_classifier(3)
    assert model(images).shape == (2, 3) and model(images).dtype == torch.float64
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_keeps_less(training):
    """In evaluation mode, too, of which saliency maps are made."""
    model, kept = VisionMamba(**NANO).train(training), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(kept.pop() + t.nbytes) or t, lambda t: t):
            model(torch.randn(2, 3, 32, 32))
    assert kept[1] < kept[0] / 2


def test_gradient_checkpointing_changes_nothing_but_memory():
    model, images = fill(VisionMamba(**NANO)).train(), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_layer_wise_decay_groups_every_parameter():
    from timm.models import group_parameters

    model = VisionMamba(**NANO)
    groups = group_parameters(model, model.group_matcher(), reverse=False)
    assert sorted(name for names in groups.values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )
    assert len(groups) == 1 + NANO["depth"] + 1  # stem, blocks, and norm with head


def plain_resample(grid, size):
    return torch.nn.functional.interpolate(grid, size=size, mode="bicubic", antialias=False)


@pytest.mark.parametrize("old, new", [((14, 14), (27, 27)), ((14, 14), (10, 20)), ((4, 6), (5, 5))])
def test_position_embeddings_resample_around_the_class_token(old, new):
    torch.manual_seed(0)
    pos_embed = torch.randn(1, old[0] * old[1] + 1, 8)
    out = resample_pos_embed(pos_embed, new, "middle", old)
    half, new_half = old[0] * old[1] // 2, new[0] * new[1] // 2
    assert torch.equal(out[:, new_half], pos_embed[:, half])
    grid = torch.cat([pos_embed[:, :half], pos_embed[:, half + 1 :]], 1).unflatten(1, old).permute(0, 3, 1, 2)
    patches = torch.cat([out[:, :new_half], out[:, new_half + 1 :]], 1)
    torch.testing.assert_close(patches, plain_resample(grid, new).flatten(2).transpose(1, 2))
    assert resample_pos_embed(pos_embed, old, "middle", old) is pos_embed


@pytest.mark.parametrize("size, patch", [((32, 32), (8, 8)), ((33, 47), (8, 16)), ((7, 5), (7, 5))])
def test_disjoint_patches_are_those_of_the_strided_convolution(size, patch):
    """What a GPU runs, on a CPU in float64: a remainder is cut off, and gradients reach weight and image."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3, *patch), (5,)))
    out = vim_tokens.embed_disjoint_patches(x, weight, bias)
    right = torch.nn.functional.conv2d(x, weight, bias, patch)
    assert torch.allclose(out, right, rtol=0, atol=1e-12 * right.abs().max().item())
    assert out.flatten(2).transpose(1, 2).is_contiguous()  # tokens x channels in memory
    incoming = torch.randn_like(right)
    for grad, expected in zip(*(torch.autograd.grad(o, (x, weight, bias), incoming) for o in (out, right))):
        assert torch.allclose(grad, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size, patch", [((32, 32), (16, 16)), ((33, 40), (8, 8)), ((16, 24), (4, 4)), ((9, 10), (2, 2))]
)
def test_patches_gathered_by_16_bytes_have_the_same_pixels(size, patch, dtype):
    x = torch.randn(3, 3, *size).to(dtype)
    behind_an_element = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    for images in (x, x.transpose(2, 3).contiguous().transpose(2, 3), behind_an_element):
        right = vim_tokens.gather_patches(images, patch)
        assert torch.equal(vim_tokens.gather_patches_by_16_bytes(images, patch), right)


@pytest.mark.parametrize("cls_token", models_mamba.CLS_TOKENS)
def test_tokens_written_once_are_those_of_the_plain_sum(cls_token):
    torch.manual_seed(0)
    patches = torch.randn(3, 9, 8).transpose(0, 1).contiguous().transpose(0, 1)
    cls_tokens = torch.randn(1, len(models_mamba.CLS_TOKENS[cls_token]), 8).expand(3, -1, -1)
    pos_embed = torch.randn(1, 9 + cls_tokens.shape[1], 8, dtype=torch.float64)
    right = models_mamba.insert_cls_tokens(patches, cls_tokens, cls_token) + pos_embed
    assert torch.equal(vim_tokens.sum_tokens(patches, cls_tokens, pos_embed, cls_token), right)
    assert vim_tokens.is_untraced(patches)
    torch.func.vmap(lambda row: pytest.fail("is untraced") if vim_tokens.is_untraced(row) else row)(patches)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_the_same_with_a_gradient_and_without(device):
    model, images = fill(VisionMamba(**NANO)).to(device), torch.randn(2, 3, 32, 32, device=device)
    with torch.no_grad():
        tokens = model._embed(images)
    assert torch.equal(tokens, model._embed(images)) and torch.equal(tokens, model._embed(images.requires_grad_()))


def test_dynamic_image_size_equals_a_model_built_for_it():
    torch.manual_seed(0)
    dynamic = VisionMamba(**NANO | {"dynamic_img_size": True}).eval()
    fixed = VisionMamba(**NANO | {"img_size": (40, 64)}).eval()
    state = dynamic.state_dict()
    state["pos_embed"] = resample_pos_embed(state["pos_embed"], (5, 8))
    fixed.load_state_dict(state)
    images = torch.randn(2, 3, 40, 64)
    torch.testing.assert_close(dynamic(images), fixed(images))
    with pytest.raises(ValueError, match="dynamic_img_size"):
        fixed(torch.randn(2, 3, 32, 32))
    fixed.set_input_size((32, 32))
    assert fixed(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_another_input_size_keeps_what_can_be_kept():
    """Of an equal grid the parameter itself, of another whether it is frozen, and after an error all of the model."""
    model, images = VisionMamba(**NANO).eval(), torch.randn(1, 3, 32, 32)
    before, logits = model.pos_embed, model(images)
    model.set_input_size(32)
    assert model.pos_embed is before
    for size, words in (
        (2, "an image of 2 x 2 is smaller than a patch"), ("x", "img_size='x' is invalid"),
        (48.0, r"img_size=48.0 is invalid: use a whole number of at least 1, or \(height, width\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.set_input_size(size)
        assert torch.equal(model(images), logits)
    model.pos_embed.requires_grad_(False)
    model.set_input_size(64)
    assert not model.pos_embed.requires_grad and model(torch.randn(1, 3, 64, 64)).shape == logits.shape


@pytest.mark.slow
def test_compiles_into_one_graph():
    model, images = fill(VisionMamba(**NANO)).eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
