"""Average precisions: perfect, half right, crowds; over ranks; and pictures."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import det.evaluation
import det_sets
from det.coco import coco_source
from det.data import EvalDataset, collate
from det.evaluation import MEASURES, as_results, average_precisions, evaluate, summarise
from det.pictures import LARGEST_SIDE, colour, draw, save_pictures
from distributed import World
from samplers import EvalSampler

CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture
def source(tmp_path):
    return coco_source(det_sets.write_tiny(tmp_path), "val")


def perfect(source):
    """Results that are the truth itself."""
    sizes = {source.image_id(i): source.size(i) for i in range(len(source.labels))}
    return [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": list(one["bbox"]),
            "score": 0.9,
            "segmentation": rle.merge(rle.frPyObjects(one["segmentation"], *sizes[one["image_id"]])),
        }
        for one in source.truth["annotations"]
    ]


def test_the_truth_itself_has_an_average_precision_of_100(source):
    result = summarise(perfect(source), source)
    assert result.images == 3
    assert result.box["AP"] == pytest.approx(100) and result.mask["AP75"] == pytest.approx(100)
    assert math.isnan(result.box["APl"])  # there is no large object
    assert result.score == result.box["AP"]
    assert "box AP 100.00" in result.words and "APl -" in result.words
    row = result.row("test_")
    assert row["test_box_AP"] == pytest.approx(100) and "test_box_APl" not in row


def test_boxes_and_masks_are_judged_apart(source):
    """Right masks in shifted boxes: masks count in full, boxes only where little overlap is asked for."""
    found = perfect(source)
    for one in found:
        one["bbox"][0] += 0.25 * one["bbox"][2]  # an overlap of 0.6
    result = summarise(found, source)
    assert result.mask["AP"] == pytest.approx(100)
    assert result.box["AP50"] == pytest.approx(100) and result.box["AP75"] == 0


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_nothing_found_is_zero_where_there_is_something_to_find(source, kind):
    found = average_precisions(source.truth, [], kind)
    assert [name for name, value in found.items() if math.isnan(value)] == ["APm", "APl"]  # all objects are small
    assert {found[name] for name in ("AP", "AP50", "AP75", "APs")} == {0}


def test_nothing_found_where_nothing_is_has_no_precision(tmp_path):
    det_sets.write_half(tmp_path, "val", {7: (40, 60)}, [])
    found = average_precisions(coco_source(tmp_path, "val").truth, [], "bbox")
    assert list(found) == list(MEASURES) and all(map(math.isnan, found.values()))


def test_an_object_without_a_mask_counts_for_boxes_alone(tmp_path):
    """As pycocotools judges boxes by the file itself; a mask found there is one too many."""
    whole, bare = (det_sets.annotation(7, 3, box) for box in ((2, 2, 22, 22), (30, 5, 50, 30)))
    del bare["segmentation"]
    det_sets.write_half(tmp_path, "val", {7: (40, 60)}, [whole, bare])
    truth = coco_source(tmp_path, "val").truth
    found = [perfect_one(7, (30, 5, 50, 30), 0.9), perfect_one(7, (2, 2, 22, 22), 0.5)]
    assert average_precisions(truth, found, "bbox")["AP"] == pytest.approx(100)
    assert average_precisions(truth, found, "segm")["AP"] == pytest.approx(50)


def test_a_crowd_without_a_mask_is_one_for_boxes(tmp_path):
    crowd = det_sets.annotation(7, 3, (30, 0, 60, 40), iscrowd=1, segmentation=None)
    det_sets.write_half(tmp_path, "val", {7: (40, 60)}, [det_sets.annotation(7, 3, (2, 2, 22, 22)), crowd])
    found = [perfect_one(7, (35, 5, 55, 30), 0.9), perfect_one(7, (2, 2, 22, 22), 0.5)]
    assert average_precisions(coco_source(tmp_path, "val").truth, found, "bbox")["AP"] == pytest.approx(100)


def test_the_truth_is_left_as_it_was(source):
    before = [dict(one) for one in source.truth["annotations"]]
    average_precisions(source.truth, perfect(source), "segm")
    average_precisions(source.truth, perfect(source), "bbox")
    assert source.truth["annotations"] == before


def test_a_detection_of_a_crowd_is_neither_right_nor_wrong(tmp_path):
    mask = np.zeros((40, 60))
    mask[:, 30:] = 1
    crowd = det_sets.annotation(7, 3, (30, 0, 60, 40), iscrowd=1, segmentation=det_sets.run_length(mask))
    det_sets.write_half(tmp_path, "val", {7: (40, 60)}, [det_sets.annotation(7, 3, (2, 2, 22, 22)), crowd])
    source = coco_source(tmp_path, "val")
    right, inside = perfect_one(7, (2, 2, 22, 22), 0.5), perfect_one(7, (35, 5, 55, 30), 0.9)
    outside = perfect_one(7, (2, 25, 22, 38), 0.9)
    assert average_precisions(source.truth, [right, inside], "bbox")["AP"] == pytest.approx(100)
    assert average_precisions(source.truth, [right, outside], "bbox")["AP"] == pytest.approx(50, abs=1)


def perfect_one(image_id, box, score):
    left, top, right, bottom = box
    return {
        "image_id": image_id,
        "category_id": 3,
        "bbox": [left, top, right - left, bottom - top],
        "score": score,
        "segmentation": rle.frPyObjects(det_sets.rectangle(*box), 40, 60)[0],
    }


def test_results_name_the_files_categories_and_boxes_by_width():
    detection = {
        "boxes": torch.tensor([[2.0, 3.0, 12.0, 33.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.75]),
        "masks": torch.zeros(1, 40, 60, dtype=torch.bool),
    }
    detection["masks"][0, 3:33, 2:12] = True
    (one,) = as_results(detection, 7, [3, 17, 90])
    assert one["category_id"] == 17 and one["bbox"] == [2, 3, 10, 30] and one["score"] == 0.75
    assert rle.area(one["segmentation"]) == 300 and rle.toBbox(one["segmentation"]).tolist() == [2, 3, 10, 30]


class Knowing(torch.nn.Module):
    """Detects the truth of a source, in the coordinates of the images it is shown, in their order."""

    def __init__(self, source, order):
        super().__init__()
        self.source, self.order = source, list(order)

    def forward(self, images):
        return [self.one(self.order.pop(0), image.shape[-2:]) for image in images]

    def one(self, index, size):
        number, scale = self.source.image_id(index), size[0] / self.source.size(index)[0]
        own = [one for one in self.source.truth["annotations"] if one["image_id"] == number]
        boxes = torch.tensor([one["bbox"] for one in own], dtype=torch.float32).reshape(-1, 4) * scale
        boxes[:, 2:] += boxes[:, :2]
        return {
            "boxes": boxes,
            "labels": torch.tensor([self.source.category_ids.index(one["category_id"]) + 1 for one in own]),
            "scores": torch.full((len(own),), 0.9),
            "masks": torch.ones(len(own), 1, 28, 28),
        }


def test_evaluation_maps_detections_back_to_the_files(source):
    data = EvalDataset(source, (32, 32))
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate)
    args = SimpleNamespace(if_amp=False, amp_dtype="bfloat16", dist_eval=False)
    model, modes = Knowing(source, range(3)).train(), []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    result = evaluate(model, loader, args, CPU)
    assert modes == [(False, False)] * 2
    assert result.box["AP"] == pytest.approx(100)
    assert result.mask["AP50"] == pytest.approx(100)  # a full mask in its box
    assert sorted(result.shown) == [0, 1, 2] and [len(result.shown[i]) for i in range(3)] == [0, 2, 2]


def test_the_ranks_detections_come_together_once(source, monkeypatch):
    """Rank 0 of two, as if rank 1 had found the truth of its share."""
    loader = torch.utils.data.DataLoader(
        EvalDataset(source, (32, 32)), sampler=EvalSampler(3, num_ranks=2, rank=0), collate_fn=collate
    )
    others = [one for one in perfect(source) if one["image_id"] == source.image_id(1)]
    gathered = []

    def gather(found):
        gathered.append({one["image_id"] for one in found})
        return [found, others]

    monkeypatch.setattr(det.evaluation, "gather_objects", gather)
    args = SimpleNamespace(if_amp=False, amp_dtype="bfloat16", dist_eval=True)
    result = evaluate(Knowing(source, [0, 2]), loader, args, CPU)
    assert gathered == [{source.image_id(2)}]  # the first image holds nothing
    assert result.box["AP"] == pytest.approx(100) and result.images == 3


def test_a_drawing_shows_box_and_mask_in_the_colour_of_the_class():
    image = Image.new("RGB", (40, 30), (0, 0, 0))
    mask = torch.zeros(1, 30, 40, dtype=torch.bool)
    mask[0, 10:20, 10:30] = True
    picture = draw(image, torch.tensor([[10.0, 10.0, 30.0, 20.0]]), [1], mask, ["cat 0.90"])
    factor = picture.shape[2] // 40
    assert picture.shape == (3, 30 * factor, 40 * factor) and factor >= 8
    assert picture[2, 18 * factor, 28 * factor] > 60  # blue, the first class, half transparent
    assert picture[:, 2 * factor, 2 * factor].tolist() == [0, 0, 0]
    assert draw(image, torch.zeros(0, 4), [], torch.zeros(0, 30, 40).bool(), []).max() == 0


@pytest.mark.parametrize(("width", "height"), [(3000, 2000), (900, 2100), (640, 48), (40, 32)])
def test_a_drawing_is_bounded_and_shows_box_and_mask_where_the_object_is(width, height):
    """A black image whose middle is the object: at a quarter of each side the box begins, and within is the mask."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    box = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
    picture = draw(Image.new("RGB", (width, height)), box, [1], mask, None)
    _, h, w = picture.shape
    assert max(h, w) <= LARGEST_SIDE and w / h == pytest.approx(width / height, rel=0.01)
    rows, columns = (picture.amax(0).amax(axis).nonzero().ravel() for axis in (1, 0))
    for found, side in ((rows, h), (columns, w)):
        assert [found[0], found[-1]] == pytest.approx([side / 4, 3 * side / 4], abs=3)
    outline, inside = torch.tensor(colour(1)), picture[:, 2 * h // 5, 2 * w // 5]
    assert torch.equal(picture[:, round(h / 4), w // 2], outline.byte())
    assert (inside - 0.45 * outline).abs().max() <= 1  # half transparent


def test_the_thinnest_drawing_has_a_pixel():
    assert draw(Image.new("RGB", (1, 5000)), torch.zeros(0, 4), [], torch.zeros(0, 5000, 1).bool(), []).shape[2] == 1


def test_a_sheet_of_thin_images_is_bounded(tmp_path):
    sizes = {1: (24, 640), 2: (640, 24), 3: (1, 300), 4: (300, 1)}
    det_sets.write_half(tmp_path, "val", sizes, [det_sets.annotation(1, 3, (2, 2, 22, 22))])
    save_pictures({i: [] for i in range(4)}, coco_source(tmp_path, "val"), tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width <= 3 * 2 * 1.05 * LARGEST_SIDE and height <= 2 * 1.05 * LARGEST_SIDE


def test_pictures_stand_beside_the_truth(source, tmp_path):
    shown = summarise(perfect(source), source).shown
    save_pictures(shown, source, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.ndim == 3 and sheet.shape[0] > 320 and sheet.std() > 10
