"""Pictures of what a Vim looks at: the numbers in them, and the files that the program writes."""

import types

import pytest
import torch
from PIL import Image

import drawing
import inference
import visualize
from helpers import random_image
from models_mamba import VisionMamba, insert_cls_tokens
from oracle_cases import fill
from small_weights import write_checkpoint

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 3}


@pytest.fixture
def model():
    return fill(VisionMamba(**SIZES)).double().eval()


@pytest.mark.parametrize("direction", visualize.DIRECTIONS)
def test_hidden_attention_gives_the_scans_output(model, direction):
    """y[t] = sum_s alpha[t, s] x[s] + D x[t], gated and projected, is what the mixer computes."""
    mixer = model.layers[0].mixer
    hidden = torch.randn(1, 7, 16, dtype=torch.float64)
    suffix = visualize.DIRECTIONS[direction]
    other = "" if suffix else "_b"
    with torch.no_grad():
        terms = visualize.scan_terms(mixer, hidden, direction)
        rows = torch.stack([visualize.attention_row(terms, t) for t in range(7)], dim=1)  # (1, t, D, s)
        y = torch.einsum("btds,bsd->btd", rows, terms.x) + getattr(mixer, "D" + suffix) * terms.x
        y = y.flip(1) if suffix else y
        z = mixer.in_proj(hidden)[..., mixer.d_inner :]
        found = mixer.out_proj(0.5 * torch.nn.functional.silu(z) * y)
        getattr(mixer, "D" + other).zero_()
        getattr(mixer, "x_proj" + other).weight.zero_()  # B = C = 0: the other direction is silent
        torch.testing.assert_close(found, mixer(hidden))


def test_each_direction_reads_its_own_side(model):
    hidden = torch.randn(1, 9, 16, dtype=torch.float64)
    for direction, sign in (("forward", 1), ("backward", -1)):
        terms = visualize.scan_terms(model.layers[0].mixer, hidden, direction)
        matrix = visualize.attention_map(terms, list(range(9)), direction)
        reader, read = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
        assert (matrix[sign * (reader - read) >= 0] > 0).all() and not matrix[sign * (reader - read) < 0].any()


@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_the_receptive_field_covers_the_image_and_peaks_at_its_patch(height, width):
    model = fill(VisionMamba(**SIZES | {"img_size": (height, width)})).double().eval()
    fields = visualize.receptive_fields(model, torch.randn(2, 3, height, width, dtype=torch.float64))
    field = fields["the middle patch"]
    assert field.shape == (height, width) and field.max() == 1 and (field > 0).all()
    peak = divmod(int(field.argmax()), width)
    assert (peak[0] // 4, peak[1] // 4) == (height // 8, width // 8), "patches are 4 x 4 pixels"


def test_the_receptive_field_is_of_gradients_whatever_their_sign():
    weight = torch.zeros(3, 4, 4)
    weight[0, 1, 2], weight[1, 1, 2], weight[2, 3, 0] = 1, -3, 2
    model = types.SimpleNamespace(forward_features=lambda images: (images * weight).sum((1, 2, 3))[:, None])
    found = visualize.receptive_field(model, torch.randn(2, 3, 4, 4), lambda tokens: tokens)
    assert (found[1, 2], found[3, 0], found.sum()) == (1, 0.5, 1.5)


def test_grad_cam_sees_only_what_the_class_depends_on(model):
    """With a last block that gives nothing, the class token alone matters, and no patch."""
    torch.nn.init.zeros_(model.layers[1].mixer.out_proj.weight)
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with visualize.LayerRecord(model, 1) as record:
        model(images.requires_grad_())[0, 0].backward()
    assert not visualize.grad_cam(model, record).any()


def test_grad_cam_weighs_features_by_the_mean_gradient_of_their_channel(model):
    """On a stream whose gradients are known, another one at every patch."""
    cls = torch.zeros(1, 1, 16, dtype=torch.float64)
    patches, gradients = torch.randn(2, 1, 16, 16, dtype=torch.float64)  # (B, M, E) each
    stream, gradient = (insert_cls_tokens(each, cls, model.cls_token_design) for each in (patches, gradients))
    record = types.SimpleNamespace(stream=stream, gradient_of=types.SimpleNamespace(grad=gradient))
    expected = (patches[0] @ gradients[0].mean(0)).clamp(min=0).view(4, 4)
    assert expected.any() and torch.allclose(visualize.grad_cam(model, record), expected)


def test_saliency_is_the_gradient_at_the_pixels_that_the_score_reads():
    """A linear score's gradient is the same at every noisy copy: its weights, the largest of a pixel's channels."""
    weight = torch.zeros(3, 8, 8)
    weight[0, 2, 5], weight[1, 2, 5], weight[2, 7, 0] = 1, -3, 2

    def score(images: torch.Tensor) -> torch.Tensor:
        return (images * weight).sum((1, 2, 3))[:, None]

    found = visualize.saliency(score, torch.randn(1, 3, 8, 8), 0)
    assert found[2, 5] == 3 and found[7, 0] == 2 and found.sum() == 5


def test_saliencys_noise_is_a_share_of_the_images_range():
    """A quadratic score's gradient is the noisy image: it grows as the image does."""

    def score(images: torch.Tensor) -> torch.Tensor:
        return images.square().sum((1, 2, 3))[:, None]

    image = torch.randn(1, 3, 4, 4)
    found = visualize.saliency(score, image, 0)
    torch.testing.assert_close(visualize.saliency(score, 100 * image, 0), 100 * found)
    assert not torch.allclose(found, visualize.saliency(score, image, 0, noise=0.0), rtol=0.01)


def test_a_picture_for_every_image(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path)
    for i in range(3):
        random_image(i).save(tmp_path / f"photo{i}.jpg")
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "pictures"), "--device", "cpu"]
    assert visualize.main([str(tmp_path), "--limit", "2", "--layer", "0", *flags]) == 0
    names = ["000-photo0.png", "001-photo1.png", "receptive_field.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.width > 600 and len(picture.convert("L").getcolors(1 << 20)) > 50, "not blank"


def test_a_name_with_dollars_is_no_formula(tmp_path):
    """matplotlib would read one between two dollars, and fail at one that is none."""
    random_image(0).save(tmp_path / "$x^$.png")
    flags = ["--checkpoint", str(write_checkpoint(tmp_path)), "--output_dir", str(tmp_path / "pictures")]
    assert visualize.main([str(tmp_path / "$x^$.png"), *flags, "--device", "cpu"]) == 0
    assert (tmp_path / "pictures" / "000-$x^$.png").exists()


def test_a_name_that_the_font_lacks_is_one_line_for_all_pictures(tmp_path, capsys, recwarn):
    drawing.say_lacking.cache_clear()
    for name in ("猫.png", "犬.png"):
        random_image(0).save(tmp_path / name)
    flags = ["--checkpoint", str(write_checkpoint(tmp_path)), "--output_dir", str(tmp_path / "pictures")]
    assert visualize.main([str(tmp_path), *flags, "--device", "cpu"]) == 0
    assert capsys.readouterr().err.count("lacks characters of the names") == 1
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def explain(**arguments):
    model = fill(VisionMamba(**SIZES | arguments)).eval()
    classifier = inference.Classifier(model, None, ["ant", "bee", "cow"], "a test's")
    image = torch.randn(model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    return visualize.explain(classifier, image, 1, None)


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize(
    "arguments, readers",
    [({}, [8]), ({"cls_token": "head"}, [0]), ({"cls_token": "double"}, [0, 17]),
     ({"cls_token": "none", "global_pool": "mean"}, []), ({"img_size": (12, 24), "in_chans": 1}, [9])],
    ids=str,
)  # fmt: skip
def test_every_panel_says_what_it_shows(arguments, readers):
    explanation = explain(**arguments)
    grid = tuple(side // 4 for side in explanation.image.shape[1:])
    assert explanation.readers == readers
    assert {tuple(values.shape) for values in (explanation.cam, *explanation.reads.values())} == {grid}
    figure = visualize.explanation_figure(explanation, "why", layer=1)
    found = titles(figure)
    reader = "what the class token reads" if readers else "what all tokens read, on average"
    assert len(found) == 8 and sum(reader in title for title in found) == 1
    assert sum("dotted: the class token" in title for title in found) == (2 if readers else 0)
    labels = [axes.get_ylabel() for axes in figure.axes[8:]]
    assert labels == ["share of the largest value in the panel", "log10 of mean |alpha| over channels"]


def test_long_sequences_have_no_matrices_but_all_the_rest(monkeypatch):
    monkeypatch.setattr(visualize, "LONGEST_MATRIX", 10)
    explanation = explain()
    assert not explanation.matrices and all(values.any() for values in explanation.reads.values())
    assert len(titles(visualize.explanation_figure(explanation, "why", layer=1))) == 6


def test_a_map_of_nothing_says_so():
    explanation = explain()._replace(cam=torch.zeros(4, 4))
    found = titles(visualize.explanation_figure(explanation, "why", layer=1))
    assert [title for title in found if "zero everywhere" in title] == [
        "Grad-CAM of what enters block 1:\npatches that speak for the class\n(zero everywhere)"
    ]


@pytest.mark.parametrize(
    "flags, expected", [(["--layer", "9"], "blocks are 0 to 1"), (["--class", "12"], "classes are 0 to 2")]
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, expected):
    random_image(0).save(tmp_path / "a.png")
    checkpoint = write_checkpoint(tmp_path)
    arguments = [str(tmp_path / "a.png"), "--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert visualize.main([*arguments, "--device", "cpu", *flags]) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert expected in line
