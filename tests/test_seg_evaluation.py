"""mIoU and its relatives counted exactly, windows, scales and mirrors; the loss; overlays."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from datasets import DataBundle
from distributed import World
from errors import DataError
from seg import pictures
from seg.arguments import parse
from seg.data import SegmentationDataset, collate
from seg.evaluation import EvalSettings, Sample, Segmented, count, eval_settings, evaluate, logits_of, predict, starts
from seg.task import Segmentation, pixel_loss
from seg.views import IGNORED

WORLD = World(0, 1, torch.device("cpu"))
WHOLE = EvalSettings(sides=None, mode="whole", window=(16, 16), stride=10)


def confusion_of(label, predicted, classes):
    """By the definition, a pixel at a time."""
    found = torch.zeros(classes, classes, dtype=torch.int64)
    for truth, guess in zip(label.flatten().tolist(), predicted.flatten().tolist()):
        if truth != IGNORED:
            found[truth, guess] += 1
    return found


def test_measures_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (3, 10, 12), generator=generator)
    label[0, :3] = IGNORED
    predicted = torch.randint(0, 4, label.shape, generator=generator)
    result = Segmented(count(label, predicted, 4).view(4, 5)[:, :4], 3)
    assert torch.equal(result.confusion, confusion_of(label, predicted, 4))
    counted = label != IGNORED
    shares = []
    for k in range(4):
        both = ((label == k) & (predicted == k))[counted].sum().item()
        either = ((label == k) | (predicted == k))[counted].sum().item()
        shares.append(both / either)
        assert result.iou[k].item() == pytest.approx(100 * both / either)
        assert result.accuracy[k].item() == pytest.approx(100 * both / (label == k).sum().item())
    assert result.score == pytest.approx(100 * np.mean(shares))
    assert result.all_accuracy == pytest.approx(100 * (label == predicted)[counted].double().mean().item())


def test_a_class_that_nobody_has_does_not_count_and_one_only_predicted_does():
    confusion = torch.tensor([[4, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert Segmented(confusion, 1).score == 100.0
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    result = Segmented(confusion, 1)
    assert result.score == pytest.approx((75 + 0) / 2) and result.mean_accuracy == 75.0
    assert result.iou[2].isnan()
    assert result.row("test_") == {"test_miou": result.score, "test_macc": 75.0, "test_aacc": 75.0}


# --- views of an image


class Pointwise(nn.Module):
    """Logits of a pixel from that pixel alone: windows, mirrors and scales must not change them."""

    def forward(self, images):
        return torch.cat([images, -images.sum(1, keepdim=True)], dim=1)


class Columns(nn.Module):
    """Logits that say in which half of what it is shown a pixel stands: mirrors and windows change it."""

    def forward(self, images):
        width = images.shape[-1]
        right = (torch.arange(width) >= width // 2).float().expand(len(images), 1, images.shape[-2], width)
        return torch.cat([1 - right, right], dim=1)


def blocks(height, width, cell=16):
    """An image of constant cells, which resizing and back leaves alone in their middles."""
    cells = torch.randn(1, 3, height // cell, width // cell, generator=torch.Generator().manual_seed(0))
    return cells.repeat_interleave(cell, 2).repeat_interleave(cell, 3)


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (10, 50), (17, 33)])
def test_windows_of_a_pointwise_model_are_the_whole(size):
    images = torch.randn(2, 3, *size)
    slide = EvalSettings(**(vars(WHOLE) | {"mode": "slide"}))
    assert torch.equal(predict(Pointwise(), images, slide), predict(Pointwise(), images, WHOLE))


def test_windows_cover_a_side_and_end_at_its_end():
    assert starts(512, 512, 341) == [0] and starts(300, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1400, 512, 341) == [0, 341, 682, 888]


def test_overlapping_windows_are_averaged():
    """A window of 16 every 10 pixels over 26: the two disagree on the shared six, by which logit is larger."""
    images = torch.zeros(1, 3, 16, 26)
    slide = EvalSettings(sides=None, mode="slide", window=(16, 16), stride=10)
    found = predict(Columns(), images, slide)[0, 0]
    assert found.tolist() == [0] * 8 + [1] * 2 + [0] * 6 + [0] * 2 + [1] * 8


def test_logits_of_windows_are_averaged_whatever_their_number():
    """Added up they would outvote views of fewer windows where the views are averaged."""
    images = torch.randn(1, 3, 16, 36)
    slide = EvalSettings(sides=None, mode="slide", window=(16, 16), stride=10)
    torch.testing.assert_close(logits_of(Pointwise(), images, slide), Pointwise()(images))


def test_views_are_averaged_by_their_probabilities():
    """One that is all but certain does not outvote two that are fairly so, as its logits would."""
    views = iter([(0.0, 20.0), (2.0, 0.0), (2.0, 0.0)])

    def model(images):
        return torch.tensor(next(views)).view(1, 2, 1, 1).expand(1, 2, *images.shape[-2:])

    thrice = EvalSettings(**(vars(WHOLE) | {"scales": (1.0, 1.0, 1.0)}))
    assert (predict(model, torch.zeros(1, 3, 4, 4), thrice) == 0).all()


def test_mirrors_are_mirrored_back():
    images = torch.randn(1, 3, 16, 24)
    flip = EvalSettings(**(vars(WHOLE) | {"flip": True}))
    assert torch.equal(predict(Pointwise(), images, flip), predict(Pointwise(), images, WHOLE))
    seen = []
    model = Pointwise()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    predict(model, images, flip)
    assert len(seen) == 2 and torch.equal(seen[1], images.flip(-1))


def test_several_scales_are_averaged_at_the_images_size():
    images = blocks(64, 96)
    seen = []
    model = Pointwise()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    scales = EvalSettings(**(vars(WHOLE) | {"scales": (0.5, 1.0, 1.5)}))
    found = predict(model, images, scales)
    assert seen == [(32, 48), (64, 96), (96, 144)]
    expected = predict(Pointwise(), images, WHOLE)
    assert (found == expected)[:, 8::16, 8::16].all()


def test_every_pixel_of_an_image_that_shrinks_is_seen():
    images, seen = torch.zeros(1, 3, 16, 16), []
    images[..., ::4] = 1.0
    model = Pointwise()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    predict(model, images, EvalSettings(**(vars(WHOLE) | {"scales": (0.25,)})))
    assert seen[0].shape[-1] == 4 and (seen[0] > 0.1).all()


def test_the_flags_say_how_an_image_is_shown():
    flags = "--device cpu --data-set FOLDER --data-path x --resize 300x200 --crop-size 24x48 --window-stride 10"
    args = parse([*flags.split(), "--eval-mode", "whole", "--eval-scales", "0.5", "1.5", "--eval-flip"])
    assert eval_settings(args) == EvalSettings((200, 300), "whole", (24, 48), 10, (0.5, 1.5), True)


def test_an_image_is_shown_at_the_sides_that_it_is_made_to_fit():
    seen = []
    model = Pointwise()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    settings = EvalSettings(**(vars(WHOLE) | {"sides": (32, 80)}))
    assert predict(model, torch.randn(1, 3, 20, 30), settings).shape == (1, 20, 30)
    assert predict(model, torch.randn(1, 3, 50, 10), settings).shape == (1, 50, 10)
    assert seen == [(32, 48), (80, 16)]


# --- a whole evaluation


class Fixed:
    """A source of given images and labels."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def name(self, index):
        return f"picture {index}.png"

    def read(self, index, epoch=0):
        image, label = self.pairs[index]
        return Image.fromarray(image), label


class Reads(nn.Module):
    """Takes a pixel's red for its class: 20 a class, before normalisation."""

    def forward(self, images):
        red = (images[:, 0] * 0.229 + 0.485) * 255 / 20
        return F.one_hot(red.round().long().clamp(0, 3), 4).permute(0, 3, 1, 2).float()


def a_set(sizes, wrong=0.2, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for height, width in sizes:
        label = rng.integers(0, 4, (height, width)).astype(np.uint8)
        shown = np.where(rng.random(label.shape) < wrong, rng.integers(0, 4, label.shape), label)
        label[rng.random(label.shape) < 0.1] = IGNORED
        pairs.append((np.stack([20 * shown] * 3, axis=2).astype(np.uint8), label))
    return SegmentationDataset(Fixed(pairs), None), pairs


@pytest.mark.parametrize("sizes", [[(12, 16)] * 5, [(12, 16), (9, 7), (20, 11)]])
def test_evaluation_counts_every_pixel_of_every_image(sizes):
    data, pairs = a_set(sizes)
    args = parse(["--device", "cpu", "--data-set", "SCENES", "--pictures", "2"])
    found = evaluate(Reads(), DataLoader(data, batch_size=2, collate_fn=collate), args, WORLD, 4)
    expected = sum(confusion_of(torch.tensor(label), torch.tensor(image[:, :, 0] // 20), 4) for image, label in pairs)
    assert found.images == len(sizes) and torch.equal(found.confusion, expected)
    assert [sample.index for sample in found.samples] == [0, 1]
    assert (found.samples[1].label == pairs[1][1]).all()
    assert (found.samples[1].predicted == pairs[1][0][:, :, 0] // 20).all()


def test_an_evaluation_is_no_training():
    data, _ = a_set([(12, 16)] * 3)
    model, modes = Reads().train(), []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    evaluate(model, DataLoader(data, collate_fn=collate), parse(["--device", "cpu", "--data-set", "SCENES"]), WORLD, 4)
    assert modes == [(False, False)] * 3


class Damaged(Reads):
    """Logits that are not finite for the pixels of the left half."""

    def forward(self, images):
        logits = super().forward(images)
        logits[..., : images.shape[-1] // 2] = float("nan")
        return logits


def test_pixels_whose_logits_are_not_finite_count_as_wrong_and_are_told():
    """Else they would be of class 0, in which most pixels may be."""
    pairs = [(np.zeros((8, 6, 3), np.uint8), np.zeros((8, 6), np.uint8))] * 3
    args = parse(["--device", "cpu", "--data-set", "SCENES", "--pictures", "1"])
    loader = DataLoader(SegmentationDataset(Fixed(pairs), None), collate_fn=collate)
    found = evaluate(Damaged(), loader, args, WORLD, 4)
    assert found.all_accuracy == found.mean_accuracy == found.score == 50
    assert "logits of 3 images are not finite" in found.words
    assert (found.samples[0].predicted == [[IGNORED] * 3 + [0] * 3]).all()


def test_a_set_without_labels_that_count_is_said():
    pairs = [(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), IGNORED, np.uint8))]
    args = parse(["--device", "cpu"])
    loader = DataLoader(SegmentationDataset(Fixed(pairs), None), collate_fn=collate)
    with pytest.raises(DataError, match=r"every pixel of 1 val images is ignored \(255\): check the label files, "):
        evaluate(Reads(), loader, args, WORLD, 4)


# --- the loss


def test_the_loss_is_the_mean_over_pixels_that_count():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 6, 5, generator=generator), torch.randint(0, 4, (2, 6, 5), generator=generator)
    labels[0, :4] = IGNORED
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    torch.testing.assert_close(pixel_loss(logits, labels), expected)
    assert pixel_loss(logits, torch.full_like(labels, IGNORED)).item() == 0.0


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_auxiliary_loss_has_its_weight(weight):
    logits, auxiliary = torch.randn(2, 2, 4, 6, 5)
    images, labels = torch.zeros(2, 3, 6, 5), torch.randint(0, 4, (2, 6, 5))
    run = SimpleNamespace(world=WORLD, net=lambda images, with_auxiliary: (logits, auxiliary))
    expected = pixel_loss(logits, labels) + weight * pixel_loss(auxiliary, labels)
    torch.testing.assert_close(Segmentation(4, weight).loss(run, (images, labels), 0), expected)


# --- pictures


def test_overlays_show_the_classes_in_their_colours(tmp_path):
    data, _ = a_set([(12, 16), (9, 7)])
    label = data[0][1].byte().numpy()
    guess = np.where(label == IGNORED, 0, label).astype(np.uint8)
    result = Segmented(torch.eye(4, dtype=torch.int64), 2, [Sample(0, label, guess)])
    bundle = DataBundle(None, data, 4, ["a", "b", "c", "d"], "")
    written = pictures.write(tmp_path, result, bundle)
    assert [path.name for path in written] == ["samples.png", "classes.png", "overlays"]
    mixed = np.asarray(Image.open(tmp_path / "overlays" / "picture-0.png")).astype(float)
    raw = np.asarray(data.raw(0)).astype(float)
    expected = (1 - pictures.OPACITY) * raw + pictures.OPACITY * pictures.palette(4)[guess]
    assert np.abs(mixed - expected).max() <= 1


def test_images_called_alike_have_overlays_of_their_own(tmp_path):
    """north/1.png and south/1.png."""
    data, _ = a_set([(12, 16), (9, 7), (8, 8)])
    data.name = lambda index: ("north/1.png", "south/1.png", "south/2 b.png")[index]
    samples = [Sample(i, *[data[i][1].byte().numpy()] * 2) for i in range(3)]
    result = Segmented(torch.eye(4, dtype=torch.int64), 3, samples)
    pictures.write(tmp_path, result, DataBundle(None, data, 4, ["a", "b", "c", "d"], ""))
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "overlays").iterdir()}
    assert sizes == {"1-0.png": (16, 12), "1-1.png": (7, 9), "2-b.png": (8, 8)}


@pytest.mark.parametrize("names", [("n/a", "s/a", "s/a-1"), ("n/a", "s/a-0", "s/a", "t/a-0-1", "t/a-0")])
def test_a_number_makes_no_name_that_another_image_has(names):
    data = SimpleNamespace(val=SimpleNamespace(name=lambda index: f"{names[index]}.png"))
    samples = [Sample(i, np.zeros((2, 2)), np.zeros((2, 2))) for i in range(len(names))]
    found = pictures.file_names(Segmented(torch.eye(2, dtype=torch.int64), len(names), samples), data)
    assert len(set(found)) == len(names)


def test_classes_of_one_name_have_bars_of_their_own(monkeypatch, tmp_path):
    """matplotlib would draw bars of one name over each other."""
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, dpi: drawn.append(figure.axes[0]))
    confusion = torch.diag(torch.tensor([9, 1, 5]))
    confusion[0, 1] = 3
    pictures.draw_classes(Segmented(confusion, 1), ["crane", "crane", "c"], tmp_path / "classes.png")
    (axes,) = drawn
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.patches] == [
        (0, pytest.approx(75)), (1, pytest.approx(25)), (2, 100),
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["crane", "crane", "c"]


def test_names_with_dollars_are_no_formulas(tmp_path):
    """matplotlib would read one between two dollars, and end the run at one that is none."""
    data, _ = a_set([(12, 16)])
    label = data[0][1].byte().numpy()
    result = Segmented(torch.eye(4, dtype=torch.int64), 1, [Sample(0, label, label)])
    pictures.write(tmp_path, result, DataBundle(None, data, 4, ["$x^$", "cost $5_$", "$", "a\\$b"], ""))
    assert Image.open(tmp_path / "samples.png").height > 100 and Image.open(tmp_path / "classes.png").height > 100


def test_a_background_is_not_painted():
    image = np.full((2, 2, 3), 9, np.uint8)
    mixed = pictures.overlay(image, np.array([[0, 1], [1, 0]], np.uint8), pictures.palette(2), bare=[0])
    assert (mixed[0, 0] == 9).all() and (mixed[1, 1] == 9).all() and (mixed[0, 1] != 9).any()


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_classes_have_colours_of_their_own(classes):
    colours = pictures.palette(classes)[:classes]
    assert len({tuple(colour) for colour in colours.tolist()}) == classes
    assert colours.shape == (classes, 3)


def test_classes_in_their_hundreds_fit_a_picture(tmp_path):
    confusion = torch.diag(torch.arange(150))
    result = Segmented(confusion, 1)
    pictures.draw_classes(result, [f"class {i}" for i in range(150)], tmp_path / "classes.png")
    with Image.open(tmp_path / "classes.png") as image:
        assert image.height < 2000


def test_a_run_without_a_folder_draws_nothing():
    from seg.task import Segmentation

    said = []
    log = SimpleNamespace(dir=None, say=said.append)
    Segmentation(4).pictures(log, Segmented(torch.eye(4, dtype=torch.int64), 1), None)
    assert said == []
