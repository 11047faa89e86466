"""What timm asks of any registered model, on Vim's names; the block alone in other networks.

The checks are those of timm's own model tests that do not depend on one architecture: outputs, gradients, the
default configuration, features, and every way of adapting a model. Depth is cut so that each takes seconds.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

import main
import models_mamba
from mamba_ssm import BiMamba, Mamba
from mamba_ssm.modules.mamba_simple import Mamba as MambaModule
from models_mamba import VARIANTS
from oracle_cases import fill
from summary import summary

NAMES = [name for name in VARIANTS if "_bimambav2" not in name]
SMALL = {"vim_nano_patch4_32": {}, "vim_tiny_patch16_224": {"depth": 3, "img_size": 64}}


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


def create(name, **arguments):
    return timm.create_model(name, **SMALL[name] | arguments)


def images_for(model, batch=2):
    size = model.patch_embed.img_size
    return torch.randn(batch, model.in_chans, *size, generator=torch.Generator().manual_seed(0))


# --- timm's model tests


@pytest.mark.parametrize("registered", VARIANTS)
def test_default_configuration_fits_the_model(registered):
    with torch.device("meta"):
        model = timm.create_model(registered)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["architecture"] == registered and cfg is model.pretrained_cfg
    assert tuple(cfg["input_size"][1:]) == model.patch_embed.img_size and cfg["fixed_input_size"]
    assert f"{cfg['first_conv']}.weight" in state and f"{cfg['classifier']}.weight" in state
    assert len(state[f"{cfg['classifier']}.weight"]) == cfg["num_classes"] == model.num_classes
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert set(model.no_weight_decay()) & set(dict(model.named_parameters()))
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == tuple(cfg["input_size"]) and data["crop_pct"] == 0.875


@pytest.mark.parametrize("registered", NAMES)
def test_every_name_has_timms_shapes_at_its_own_size_and_depth(registered):
    """On the meta device, where a whole Vim-B costs as little as the smallest."""
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(registered).eval()
        images = torch.empty(2, *model.default_cfg["input_size"])
        logits, (tokens, features) = model(images), model.forward_intermediates(images)
        extractor = timm.create_model(registered, features_only=True).eval()
        levels = extractor(images)
    assert logits.shape == (2, 1000) and tokens.shape == (2, model.pos_embed.shape[1], model.num_features)
    assert len(features) == len(model.feature_info) == len(model.layers)
    assert {tuple(feature.shape) for feature in features} == {(2, model.embed_dim, *model.patch_embed.grid_size)}
    infos = zip(extractor.feature_info.channels(), extractor.feature_info.reduction())
    assert len(levels) == 3 and [level.shape[1] for level in levels] == extractor.feature_info.channels()
    for level, (_, reduction) in zip(levels, infos):
        assert level.shape[2] <= -(-images.shape[2] // reduction) + 1  # timm's own bound
    with torch.device("meta"), torch.no_grad():
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(images).shape == tokens.shape


def test_forward_gives_finite_logits(name):
    model = create(name).eval()
    logits = model(images_for(model))
    assert logits.shape == (2, 1000) and logits.isfinite().all()


def test_backward_reaches_every_parameter(name):
    model = create(name, num_classes=42).train()
    logits = model(images_for(model))
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_features_without_classifier_and_without_pooling(name):
    model = create(name).eval()
    images = images_for(model)
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert tokens.shape[2] == model.num_features and pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images), tokens)
    bare = create(name, num_classes=0, global_pool="").eval()
    assert bare(images).shape == tokens.shape and isinstance(bare.get_classifier(), torch.nn.Identity)


@pytest.mark.parametrize("cls_token, places", [("middle", [32]), ("head", [0]), ("double", [0, 65])])
def test_the_pooled_feature_is_the_class_token_at_its_true_index(cls_token, places):
    model = fill(timm.create_model("vim_nano_patch4_32", cls_token=cls_token)).eval()
    tokens = model.forward_features(images_for(model))
    assert model.cls_token_position(64) == tuple(places)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, places].mean(1))


def test_intermediate_features_agree_with_feature_info_and_the_forward_pass(name):
    model = create(name).eval()
    images = images_for(model)
    output, features = model.forward_intermediates(images)
    assert len(features) == len(model.feature_info) == len(model.layers)
    for info, feature in zip(model.feature_info, features):
        side = images.shape[-1] // info["reduction"]
        assert feature.shape == (2, info["num_chs"], side, side)
    torch.testing.assert_close(output, model.forward_features(images))
    model.train().set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(images)[0], output)


@pytest.mark.parametrize("options", [{"stop_early": True}, {"norm": True}, {"output_fmt": "NLC"}], ids=str)
def test_intermediate_features_by_option(name, options):
    model = create(name).eval()
    images = images_for(model)
    (feature,) = model.forward_intermediates(images, indices=[-2], intermediates_only=True, **options)
    everything = model.forward_intermediates(images, norm=options.get("norm", False), intermediates_only=True)
    expected = everything[-2].flatten(2).transpose(1, 2) if "output_fmt" in options else everything[-2]
    torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("prefix", [False, True])
def test_intermediate_features_by_timms_names(name, prefix):
    model = create(name).eval()
    images, options = images_for(model), {"return_prefix_tokens": prefix}
    tokens, features = model.forward_intermediates(images, **options)
    found = model.forward_intermediates(images, output_dict=True, **options)
    pairs = zip(found["image_intermediates"], found.pop("image_intermediates_prefix")) if prefix else ()
    assert list(found) == ["image_features", "image_intermediates"]
    torch.testing.assert_close(found["image_features"], tokens)
    torch.testing.assert_close(list(pairs) if prefix else found["image_intermediates"], features)
    only = model.forward_intermediates(images, output_dict=True, intermediates_only=True, **options)
    assert only.keys() == {"image_intermediates"} | ({"image_intermediates_prefix"} if prefix else set())


@pytest.mark.parametrize("only", [False, True])
def test_stopping_early_runs_no_block_after_the_last_one_asked_for(name, only):
    """The tokens that come with the features are then those after it, as timm's vision transformer gives them."""
    model = create(name).eval()
    images, ran = images_for(model), []
    for number, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    found = model.forward_intermediates(images, indices=[1], norm=True, stop_early=True, intermediates_only=only)
    assert ran == [0, 1]
    if not only:
        tokens, (feature,) = found
        patches, _ = models_mamba.split_cls_tokens(tokens, "middle")
        torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, feature.shape[2:]), feature)


def test_a_pruned_model_counts_the_blocks_that_are_left():
    """As timm's vision transformer does: the last one, the last two, and one that is gone."""
    model = timm.create_model("vim_nano_patch4_32").eval()
    images, (_, second, *_) = images_for(model), model.forward_intermediates(images_for(model), intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    for indices in (1, [-1], [1]):
        torch.testing.assert_close(model.forward_intermediates(images, indices, intermediates_only=True), [second])
    assert model.prune_intermediate_layers(1) == [1] and len(model.layers) == 2
    with pytest.raises(AssertionError, match=r"index 3 is out of range \(0 to 1\)"):
        model.forward_intermediates(images, [3])


def test_feature_maps_are_in_the_models_dtype():
    model = timm.create_model("vim_nano_patch4_32").eval()
    images = images_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(one.dtype == torch.float32 for one in model.forward_intermediates(images)[1])
    low, (tokens, features) = images.bfloat16(), model.bfloat16().forward_intermediates(images.bfloat16())
    assert all(one.dtype == low.dtype for one in (tokens, *features, *model.forward_intermediates(low, norm=True)[1]))


def test_a_resized_model_is_exported_at_its_size(tmp_path):
    """timm's `save_for_hf` writes down the size that it was told, and position embeddings fit no other one."""
    model = timm.create_model("vim_nano_patch4_32", depth=2, num_classes=3).eval()
    model.set_input_size((48, 64))
    save_for_hf(model, str(tmp_path), model_args={"depth": 2, "img_size": (48, 64)})  # older ones know no more
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 48, 64)
    assert torch.equal(again(images), model(images))


def test_features_by_hooks_are_refused():
    """They would be what the mixers gave, without the residual stream and with the class token inside."""
    assert timm.create_model("vim_nano_patch4_32", features_only=True, feature_cls="getter")
    with pytest.raises(ValueError, match=r"feature_cls='hook' .*; use 'getter', the default"):
        timm.create_model("vim_nano_patch4_32", features_only=True, feature_cls="hook")


def test_feature_extractor(name):
    whole = fill(create(name)).eval()
    extractor = create(name, features_only=True, out_indices=(0, 2)).eval()
    extractor.model.load_state_dict(whole.state_dict(), strict=False)
    images = images_for(whole)
    features = extractor(images)
    assert extractor.feature_info.channels() == [f.shape[1] for f in features]
    assert extractor.feature_info.reduction() == [images.shape[-1] // f.shape[-1] for f in features]
    for found, expected in zip(features, whole.forward_intermediates(images, [0, 2], intermediates_only=True)):
        torch.testing.assert_close(found, expected)


def test_pruned_models_keep_their_features(name):
    model = create(name).eval()
    images = images_for(model)
    expected = model.forward_intermediates(images, [1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1] and len(model.layers) == 2
    torch.testing.assert_close(model.forward_intermediates(images, [1], intermediates_only=True)[0], expected)
    assert model.num_classes == 0 and model(images).shape == (2, model.num_features)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_from_rgb_weights(name, channels):
    source = fill(create(name))
    arguments = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": source.state_dict(), "input_size": (
        3, *source.patch_embed.img_size)}}  # fmt: skip
    model = create(name, in_chans=channels, num_classes=5, **arguments).eval()
    assert model(images_for(model)).shape == (2, 5)
    rgb = source.patch_embed.proj.weight
    expected = rgb.sum(1, keepdim=True) if channels == 1 else torch.cat([rgb, rgb[:, :1]], dim=1) * 3 / 4
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)
    torch.testing.assert_close(model.norm_f.weight, source.norm_f.weight)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_copied_file_that_is_damaged_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(ValueError, match=f"{tmp_path / name} is damaged or no weight file"):
        timm.create_model(
            "vim_nano_patch4_32", pretrained=True, depth=1, pretrained_cfg_overlay={"file": str(tmp_path / name)}
        )


def test_a_copied_file_that_may_run_code_is_not_loaded(tmp_path):
    torch.save({"model": {}, "extra": print}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="its pickle asks for print, which may run code"):
        timm.create_model(
            "vim_nano_patch4_32", pretrained=True, depth=1, pretrained_cfg_overlay={"file": str(tmp_path / "x.pth")}
        )


@pytest.mark.parametrize("entries", [("model", "model_ema"), ("model_ema",), ()], ids=str)
def test_a_copied_file_gives_its_head(entries, tmp_path):
    """timm makes a new one where the classes are not the registered ones, if it is not told the file's."""
    source = fill(timm.create_model("vim_nano_patch4_32", img_size=(16, 24), num_classes=7))
    weights = source.state_dict()
    torch.save({entry: weights for entry in entries} or weights, tmp_path / "x.pth")
    copied = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "x.pth")}, "img_size": (16, 24)}
    model = timm.create_model("vim_nano_patch4_32", num_classes=7, **copied)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    other = timm.create_model("vim_nano_patch4_32", num_classes=5, **copied)
    assert other.head.weight.shape == (5, 64) and torch.equal(other.norm_f.weight, weights["norm_f.weight"])


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 40)], ids=str)
def test_features_at_any_size(size):
    model = timm.create_model("vim_nano_patch4_32", features_only=True, dynamic_img_size=True).eval()
    features = model(torch.randn(1, 3, *size))
    assert [f.shape[-2:] for f in features] == [(size[0] // 4, size[1] // 4)] * 3


def test_layer_wise_decay_through_timms_optimiser_factory(name):
    model = create(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = [scale[id(block.mixer.in_proj.weight)] for block in model.layers]
    assert all(after == 2 * before for before, after in itertools.pairwise(scales))
    assert scale[id(model.pos_embed)] == scale[id(model.cls_token)] == scales[0] / 2
    assert scale[id(model.norm_f.weight)] == scales[-1] == 0.5 and scale[id(model.head.weight)] == 1.0
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model.pos_embed)] == 0.0 and decay[id(model.head.weight)] == 0.1


def test_plain_operations_compute_the_same(name):
    model = fill(create(name)).eval()
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        model.set_fast_path(False)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("registered", NAMES)
def test_every_name_compiles_into_one_graph(registered):
    """Traced whole, at two blocks of its width: a break of the graph would raise."""
    model = timm.create_model(registered, depth=2).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = images_for(model, 1)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def flops_of(model):
    """By operation, for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(images_for(model, 1))
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


def test_the_summary_counts_parameters_and_both_directions(capsys):
    """It needs no GPU and no data. The second direction is a convolution, two projections and a scan a block."""
    assert main.main(["--summary", "--model", "vim_nano_patch4_32", "--input-size", "32"]) == 0
    text = capsys.readouterr().out
    model = timm.create_model("vim_nano_patch4_32")
    both, one = flops_of(model), flops_of(timm.create_model("vim_nano_patch4_32", bidirectional="none"))
    count = sum(p.numel() for p in model.parameters())
    assert f"total {count:>29,} {sum(both.values()) / 1e9:>10.3f}" in text
    length, channels, states, rank, width, depth = 65, 128, 16, 4, 4, 4
    second = 2 * length * channels * (width + (rank + 2 * states) + rank) * depth + one["mamba_ssm.selective_scan"]
    assert sum(both.values()) - sum(one.values()) == second


def test_the_summary_counts_attention_however_it_is_computed():
    """torch's counter knows scaled_dot_product_attention on a GPU and not on a CPU."""
    model = timm.create_model("deit_nano_patch4_32").eval()
    fused = summary(model, (32, 32))
    for block in model.blocks:
        block.attn.fused_attn = False
    eager = summary(model, (32, 32))
    assert "_scaled_dot_product" in fused and "bmm" in eager
    assert fused.splitlines()[:-1] == eager.splitlines()[:-1]


def test_a_misspelt_argument_is_told_with_the_accepted_ones():
    with pytest.raises(TypeError, match=r"no argument 'drop_rat' \(did you mean drop_rate\?\); it takes img_size, .*"):
        timm.create_model("vim_nano_patch4_32", drop_rat=0.1)


def test_timms_name_of_the_mean_is_known():
    model = timm.create_model("vim_nano_patch4_32", cls_token="none", global_pool="avg")
    assert model.global_pool == "mean"
    model.reset_classifier(3, global_pool="avg")
    assert model.global_pool == "mean" and model(images_for(model, 2)).shape == (2, 3)


# --- the block alone


def test_the_block_in_a_vision_transformer_instead_of_attention():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    for block in model.blocks:
        block.attn = BiMamba(model.embed_dim)
    logits = model(torch.randn(2, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (2, 3) and all(p.grad is not None for p in model.blocks.parameters())


def test_the_bidirectional_block_is_vims():
    block = BiMamba(16)
    same = MambaModule(16, bimamba_type="v2", if_divide_out=True)
    same.load_state_dict(block.state_dict())
    tokens = torch.randn(2, 9, 16)
    torch.testing.assert_close(block(tokens), same(tokens), rtol=0, atol=0)
    moved = block(torch.cat([tokens[:, :4], tokens[:, 4:] + 1], dim=1))
    assert not torch.equal(moved[:, 0], block(tokens)[:, 0]), "the first token reads the last"
    causal = Mamba(16)
    torch.testing.assert_close(causal(tokens)[:, :4], causal(tokens[:, :4]))


def test_masks_are_refused_by_name():
    tokens = torch.randn(1, 3, 16)
    with pytest.raises(NotImplementedError, match="attn_mask"):
        BiMamba(16)(tokens, attn_mask=torch.ones(3, 3))
    with pytest.raises(NotImplementedError, match="is_causal"):
        BiMamba(16)(tokens, is_causal=True)


AS_A_LIBRARY = """
import sys
sys.path.append(sys.argv[1])
import timm, torch, models_mamba
model = timm.create_model("vim_nano_patch4_32", num_classes=3)
print(tuple(model(torch.randn(2, 3, 32, 32)).shape))
"""


def test_a_project_with_modules_of_the_same_names_can_import_the_model(tmp_path):
    """`datasets`, `engine`, `errors`: the program's modules have names that others have, too."""
    folder = Path(models_mamba.__file__).parent
    for path in folder.glob("*.py"):
        if path.stem not in ("models_mamba", "vim_pretrained", "vim_tokens"):
            (tmp_path / path.name).write_text("raise ImportError('of another project')")
    command = [sys.executable, "-c", AS_A_LIBRARY, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "(2, 3)\n"), done.stderr
