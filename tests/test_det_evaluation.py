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
from det.drawing import draw, save_pictures
from det.evaluation import MEASURES, as_results, average_precisions, evaluate, summarise
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


def test_nothing_found_is_zero_and_no_error(source):
    assert average_precisions(source.truth, [], "bbox") == dict.fromkeys(MEASURES, 0.0)


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
    model = Knowing(source, range(3)).train()
    result = evaluate(model, loader, args, CPU)
    assert not model.training
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


def test_pictures_stand_beside_the_truth(source, tmp_path):
    shown = summarise(perfect(source), source).shown
    save_pictures(shown, source, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.ndim == 3 and sheet.shape[0] > 320 and sheet.std() > 10
