"""COCO's files as they are and as they should not be, and views of what they hold."""

import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import det_sets
from augment import counter_randomness
from datasets import Packed
from det.arguments import parse
from det.coco import Instance, coco_source, has_area, run_lengths
from det.coco_checks import FARTHEST, decompressed
from det.data import EvalDataset, TrainDataset, build_datasets, collate, read
from det.views import View, large_scale_jitter, scaled_size, targets, whole
from errors import DataError
from helpers import sent
from samplers import SampleKey


def one_image(tmp_path, *annotations, size=(40, 60), split="val"):
    """The source of one image, numbered 7, with these annotations."""
    det_sets.write_half(tmp_path, split, {7: size}, list(annotations))
    return coco_source(tmp_path, split)


def changed(tmp_path, change, split="train"):
    """Write a good set, spoil its JSON by `change`, and read it."""
    det_sets.write_tiny(tmp_path)
    path = tmp_path / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    det_sets.save_json(tmp_path, split, content)
    return coco_source(tmp_path, split)


# --- reading


def test_category_numbers_with_gaps_become_labels_from_one(tmp_path):
    source = one_image(
        tmp_path,
        det_sets.annotation(7, 90, (1, 1, 9, 9)),
        det_sets.annotation(7, 3, (1, 1, 9, 9)),
        det_sets.annotation(7, 17, (1, 1, 9, 9)),
    )
    assert source.category_ids == [3, 17, 90] and source.class_names == ["car", "cat", "brush"]
    assert [instance.label for instance in source.instances(0)] == [3, 1, 2]


def test_an_image_without_objects_stays(tmp_path):
    det_sets.write_tiny(tmp_path)
    source = coco_source(tmp_path, "train")
    assert len(source.labels) == 4 and source.instances(0) == []
    assert "images without objects, kept: 1" in source.remarks
    _, target = TrainDataset(source, (64, 64), (1.0, 1.0), 0.0, seed=0)[SampleKey(0, 0, 0)]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape[0] == 0 and len(target["labels"]) == 0


def test_a_crowd_is_no_target_but_stays_in_the_truth(tmp_path):
    mask = np.zeros((40, 60))
    mask[5:20, 5:30] = 1
    crowd = det_sets.annotation(7, 3, (5, 5, 30, 20), iscrowd=1, segmentation=det_sets.run_length(mask))
    source = one_image(tmp_path, crowd, det_sets.annotation(7, 3, (2, 2, 12, 12)))
    assert len(source.instances(0)) == 1 and "crowd regions, left out of training: 1" in source.remarks
    assert [one["iscrowd"] for one in source.truth["annotations"]] == [1, 0]


@pytest.mark.parametrize("box", [(60, 10, 80, 20), (-20, 5, 0, 9), (10, 5, 10, 9), (10, 50, 20, 60)])
def test_a_box_without_a_pixel_of_the_image_is_left_out_and_counted(tmp_path, box):
    source = one_image(tmp_path, det_sets.annotation(7, 3, box), det_sets.annotation(7, 3, (2, 2, 12, 12)))
    assert len(source.instances(0)) == 1
    assert "boxes without a pixel of the image, left out of training: 1" in source.remarks
    assert len(source.truth["annotations"]) == 2  # COCO's tools count it as one that nobody found


def test_a_box_that_is_not_a_number_is_left_out_and_counted(tmp_path):
    spoilt = det_sets.annotation(7, 3, (2, 2, 12, 12)) | {"bbox": [float("nan"), 2, 4, 4]}
    remarks = one_image_json_only(tmp_path, spoilt).remarks
    assert "boxes without a pixel of the image, left out of training: 1" in remarks


def test_a_held_out_box_that_is_not_a_number_is_named(tmp_path):
    """pycocotools lets it overlap with every detection, as a whole."""
    content = det_sets.write_half(tmp_path, "val", {7: (40, 60)}, [])
    spoilt = det_sets.annotation(7, 3, (2, 2, 12, 12)) | {"bbox": [float("nan"), 2, 4, 4]}
    det_sets.save_json(tmp_path, "val", content | {"annotations": [spoilt]})
    with pytest.raises(DataError, match=r"annotations\[0\] has bbox \[nan, 2, 4, 4\]: expected numbers"):
        coco_source(tmp_path, "val")


def one_image_json_only(tmp_path, annotation):
    content = det_sets.write_half(tmp_path, "train", {7: (40, 60)}, [])
    det_sets.save_json(tmp_path, "train", content | {"annotations": [annotation]})
    return coco_source(tmp_path, "train")


def test_an_object_that_reaches_out_is_clipped_and_counted(tmp_path):
    source = one_image(tmp_path, det_sets.annotation(7, 3, (50, -5, 70, 10)))
    assert "boxes clipped to their image: 1" in source.remarks
    target = targets(whole((40, 60), (40, 60)), source.instances(0))
    assert target["boxes"].tolist() == [[50, 0, 60, 10]]
    assert target["masks"].shape == (1, 40, 60) and target["masks"].sum() == 100


WITHOUT_AREA = {
    "two corners": [[1, 1, 5, 5]],
    "half a corner": [[1, 2, 3, 4, 5, 6, 7]],
    "in a line": [[5.3, 5.4, 15.3, 12.4, 25.3, 19.4]],
    "one point": [[5, 5, 5, 5, 5, 5]],
    "beside the image": [[-9, 5, -2, 5, -2, 20]],
    "along its border": [[60, 5, 70, 5, 70, 20, 60, 20]],
    "no pixel of 40 x 60": {"size": [40, 60], "counts": [2400]},
    "none, compressed": det_sets.compressed(np.zeros((40, 60))),
}


@pytest.mark.parametrize("shape", [[], None, {"size": [40, 60]}, *WITHOUT_AREA.values()])
def test_an_annotation_without_a_usable_mask_is_left_out_and_counted(tmp_path, shape):
    spoilt = det_sets.annotation(7, 3, (2, 2, 12, 12), segmentation=shape)
    source = one_image(tmp_path, spoilt, det_sets.annotation(7, 3, (2, 2, 12, 12)))
    assert len(source.instances(0)) == 1
    assert [one["segmentation"] is None for one in source.truth["annotations"]] == [True, False]
    assert "annotations without a usable mask, left out of mask AP: 1" in source.remarks
    assert "annotations without a usable mask, left out of training: 1" in source.remarks


def test_a_crowd_without_a_mask_is_counted_and_stays_in_the_truth_of_boxes(tmp_path):
    crowd = det_sets.annotation(7, 3, (5, 5, 30, 20), iscrowd=1, segmentation=[])
    source = one_image(tmp_path, crowd, det_sets.annotation(7, 3, (2, 2, 12, 12)))
    assert [one["iscrowd"] for one in source.truth["annotations"]] == [1, 0]
    assert "annotations without a usable mask, left out of mask AP: 1" in source.remarks
    assert "crowd regions, left out of training: 1" in source.remarks


def test_a_polygon_of_two_corners_is_dropped_from_those_with_an_area(tmp_path):
    shape = [[1, 1, 5, 5], *det_sets.rectangle(2, 2, 12, 12)]
    source = one_image(tmp_path, det_sets.annotation(7, 3, (2, 2, 12, 12), segmentation=shape))
    assert source.instances(0)[0].segmentation == det_sets.rectangle(2, 2, 12, 12)
    assert source.remarks == ""


@pytest.mark.parametrize(
    "polygon",
    [
        [5.1, 5.1, 5.2, 5.1, 5.2, 5.2],  # less than a pixel: a view may enlarge it
        [-50, -50, 110, -50, 30, 200],  # around the image, all corners outside
        [5, 5, 20, 20, 5, 20, 20, 5],  # crosses itself: two lobes of opposite sign
        [59.5, 39.5, 70, 39.5, 70, 50],  # a corner of the image's last pixel
    ],
)
def test_a_polygon_with_an_area_in_its_image_is_a_target(polygon, tmp_path):
    source = one_image(tmp_path, det_sets.annotation(7, 3, (2, 2, 12, 12), segmentation=[polygon]))
    assert [one.segmentation for one in source.instances(0)] == [[polygon]]


@pytest.mark.parametrize("seed", range(5))
def test_an_object_is_what_pycocotools_draws_in_an_enlarged_view(seed):
    """Random triangles in and around an image of 20 x 30 pixels, drawn thirty times as large."""
    random.seed(seed)
    polygons = [[random.uniform(-30, 60) for _ in range(6)] for _ in range(40)]
    drawn = [rle.area(run_lengths([[30 * value for value in polygon]], 600, 900)) > 0 for polygon in polygons]
    assert [has_area(polygon, 20, 30) for polygon in polygons] == drawn
    assert 5 < sum(drawn) < 35


def test_polygons_and_both_kinds_of_run_lengths_are_one_mask():
    mask = np.zeros((40, 60))
    mask[5:20, 7:30] = 1
    shapes = det_sets.rectangle(7, 5, 30, 20), det_sets.run_length(mask), det_sets.compressed(mask)
    for shape in shapes:
        assert np.array_equal(rle.decode(run_lengths(shape, 40, 60)), mask)


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.1, 0.5, 1):  # long runs and short ones, rising and falling
        mask = rng.random((80, 70)) < share
        assert decompressed(det_sets.compressed(mask)["counts"]) == det_sets.run_length(mask)["counts"]


def test_a_corner_far_outside_of_its_image_is_still_a_corner(tmp_path):
    shape = det_sets.rectangle(0, 0, 60 * FARTHEST, 40)
    source = one_image(tmp_path, det_sets.annotation(7, 3, (0, 0, 60, 40), segmentation=shape))
    assert targets(whole((40, 60), (40, 60)), source.instances(0))["boxes"].tolist() == [[0, 0, 60, 40]]


def test_the_truth_has_what_pycocotools_needs(tmp_path):
    """Numbers from 1 (0 would mean "not found"), `iscrowd` and `area`, where a file lacks them."""
    bare = [det_sets.annotation(7, 3, (2, 2, 12, bottom), id=0) for bottom in (22, 32)]
    for one in bare:
        del one["iscrowd"], one["area"]
    del bare[1]["segmentation"]
    source = one_image(tmp_path, *bare, det_sets.annotation(7, 3, (2, 2, 12, 12), id=0))
    truth = source.truth["annotations"]
    assert [one["id"] for one in truth] == [1, 2, 3] and [one["iscrowd"] for one in truth] == [0, 0, 0]
    assert [one["area"] for one in truth] == [200, 300, 100]  # of the mask, of the box, as the file says


def with_mask(shape):
    return lambda content: content["annotations"][0].update(segmentation=shape)


def with_box(place, value):
    return lambda content: content["annotations"][0]["bbox"].__setitem__(place, value)


def drop(key, kind):
    return lambda content: content[kind][1].pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("image_id", "annotations"), r"annotations\[1\] has no 'image_id'"),
        (drop("bbox", "annotations"), r"annotations\[1\] has no 'bbox'"),
        (drop("width", "images"), r"images\[1\] has no 'width'"),
        (drop("name", "categories"), r"categories\[1\] has no 'name'"),
        (lambda c: c["annotations"][0].update(image_id=5), "image 5, which is not listed; add the image, or remove"),
        (lambda c: c["annotations"][0].update(category_id=91), "the file lists 3 from 3 to 90; add the category, or"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]: expected"),
        (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), r"bbox \['1', 2, 3, 4\]: expected"),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [3, 4], "counts": [12]}),
            r"a mask of \[3, 4\] for an image of \[64, 40\]; write the mask at the image's size, or remove it",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [64, 40], "counts": [10, 20]}),
            "run lengths of 30 pixels for an image of 2560; write the mask again, or remove it",
        ),
        (lambda c: c["annotations"][0].update(segmentation=[1, 2, 3, 4, 5, 6]), "a flat list for a mask"),
        (lambda c: c["images"][0].update(width="64"), r"images\[0\] has width '64': expected a whole number"),
        (lambda c: c["images"][0].update(width=0), "images.0. is 0 x 48: expected a pixel at least"),
        (lambda c: c["images"][0].update(file_name=5), "has file_name 5: expected text"),
        (lambda c: c["images"].append("x"), r"images\[4\] is 'x'; it needs id, file_name, width, height"),
        (lambda c: c["annotations"].append(None), r"annotations\[6\] is None; it needs image_id"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"has image_id \[1\]: expected text or a whole number"),
        (lambda c: c["annotations"][0].update(category_id="cat"), "has category_id 'cat': expected a whole number"),
        (lambda c: c["annotations"][0].update(iscrowd=None), "has iscrowd None: expected a whole number"),
        (lambda c: c["annotations"][0].update(area="big"), "has area 'big': expected a number"),
        (lambda c: c["annotations"][0].update(area=float("nan")), "has area nan: expected 0 or a positive number"),
        (lambda c: c["annotations"][0].update(area=-1), "has area -1: expected 0 or a positive number"),
        (
            lambda c: (c["images"][1].update(id="101"), c.update(annotations=[])),
            r"images\[1\] has the id '101' and images\[0\] 100: expected ids of one type; write all as",
        ),
        (with_box(0, -math.inf), r"has bbox \[-inf, .*: expected numbers of 6,400 pixels at most"),
        (with_box(2, 10**400), r"has bbox \[.*: expected numbers of 6,400 pixels at most"),
        (with_mask([[1, 1, 10**400, 5, 9, 9]]), r"has a corner at 10{59}\.\.\.: expected pixels of the image"),
        (with_mask("M" * 99), r"has segmentation 'M{59}\.\.\.: expected polygons or run lengths"),
        (with_mask([[1, 1, None, 5, 9, 9]]), r"has \[1, 1, None, 5, 9, 9\] for a mask: expected polygons"),
        (with_mask([[[1, 1], [5, 5], [1, 5]]]), r"has \[\[1, 1\], \[5, 5\], \[1, 5\]\] for a mask"),
        (with_mask([[1, 1, 1e12, 5, 9, 9]]), r"has a corner at 1000000000000.0: expected pixels of the image"),
        (with_mask([[1, 1, 9e5, 5, 9, 9]]), r"a corner at 900000.0: .* of the image of 40 x 64, 6,400 at most"),
        (with_mask({"size": [64, 40], "counts": "hello world"}), "'hello world' that cannot be decoded"),
        (with_mask({"size": [64, 40], "counts": "Z?d0"}), "run lengths of 510 pixels for an image of 2560"),
        (with_mask({"size": [64, 40], "counts": "Z?d"}), "'Z.d' that cannot be decoded .it ends within a number"),
        (with_mask({"size": [64, 40], "counts": "O"}), "'O' that cannot be decoded .a run of -1 pixels"),
        (with_mask({"size": [64, 40], "counts": [-10, 2570]}), r"run lengths \[-10, 2570\]: expected whole numbers"),
        (with_mask({"size": [64, 40], "counts": 5}), "run lengths 5: expected whole numbers"),
        (with_mask({"size": None, "counts": [2560]}), r"a mask of None for an image of \[64, 40\]"),
        (lambda c: c["images"][1].update(id=100), "2 images have the id 100"),
        (lambda c: c["categories"][1].update(id=17), "2 categories have the id 17"),
        (lambda c: c.update(images=[], annotations=[]), "lists no images"),
        (lambda c: c.update(categories=[], annotations=[]), "lists no categories"),
        (lambda c: c.pop("annotations"), "is not a COCO instances file: it must hold the lists images, annotations"),
        (lambda c: c["images"][2].update(file_name="gone.png"), "1 of 4 images .* the first is gone.png"),
    ],
)
def test_a_file_that_does_not_fit_together_is_one_line(tmp_path, change, said):
    with pytest.raises(DataError, match=said) as caught:
        changed(tmp_path, change)
    assert "\n" not in str(caught.value) and "instances_train2017.json" in str(caught.value)


def test_a_missing_file_says_what_the_folder_holds(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"--data-path takes COCO's folder: .* holds: images"):
        coco_source(tmp_path, "train")
    with pytest.raises(DataError, match="holds: no folder"):
        coco_source(tmp_path / "nowhere", "train")


def test_a_damaged_file_is_one_line(tmp_path):
    det_sets.write_tiny(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(DataError, match="is not valid JSON"):
        coco_source(tmp_path, "train")


def test_an_image_of_another_size_than_its_annotations_is_one_line(tmp_path):
    source = one_image(tmp_path, det_sets.annotation(7, 3, (2, 2, 12, 12)))
    Image.new("RGB", (40, 60)).save(tmp_path / "val2017" / "000000000007.png")
    with pytest.raises(DataError, match="has 40 x 60 pixels and its annotations are for 60 x 40"):
        read(source, 0)


def test_an_image_that_cannot_be_read_is_one_line(tmp_path):
    source = one_image(tmp_path, det_sets.annotation(7, 3, (2, 2, 12, 12)))
    (tmp_path / "val2017" / "000000000007.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000000000007.png: .*; repair the file, or take the image out of"):
        read(source, 0)


def test_the_halves_must_agree_on_categories(tmp_path):
    det_sets.write_tiny(tmp_path)
    train = coco_source(tmp_path, "train")
    assert coco_source(tmp_path, "val", train.categories).category_ids == train.category_ids
    fewer = [c for c in det_sets.CATEGORIES if c["id"] != 90]
    det_sets.write_half(tmp_path, "val", {1: (8, 8)}, [], fewer)
    assert coco_source(tmp_path, "val", train.categories).category_ids == train.category_ids
    det_sets.write_half(tmp_path, "val", {1: (8, 8)}, [], [{"id": 3, "name": "lorry"}])
    with pytest.raises(DataError, match="category 3 'lorry' is not one of the training file's"):
        coco_source(tmp_path, "val", train.categories)


def test_packed_items_come_back():
    items = [{"a": [1, 2]}, None, "text", []]
    packed = Packed(items)
    assert len(packed) == 4 and [packed[i] for i in range(4)] == items
    assert len(Packed([])) == 0


@pytest.mark.parametrize("kind", ["coco", "scenes"])
def test_loader_processes_need_not_be_forked(kind, tmp_path):
    flags = ["--data-path", str(det_sets.write_tiny(tmp_path))] if kind == "coco" else ["--train-scenes", "2"]
    data = build_datasets(parse(["--device", "cpu", "--input-size", "48", "--val-scenes", "2", *flags]))
    for here, key in ((data.train, SampleKey(1, 1, 0)), (data.val, 1)):
        there, _ = sent(here)
        (image, described), (expected, about) = there[key], here[key]
        assert torch.equal(image, expected) and described.keys() == about.keys()
        assert there.source.truth is None, "annotations that evaluation alone compares with"
    assert data.val.source.truth


# --- views


def test_a_scaled_image_keeps_its_proportions_inside_the_size():
    assert scaled_size((480, 640), (1024, 1024), 1.0) == (768, 1024)
    assert scaled_size((480, 640), (1024, 1024), 0.1) == (77, 102)
    assert scaled_size((640, 480), (512, 1024), 1.0) == (512, 384)
    assert scaled_size((1, 1000), (64, 64), 0.1) == (1, 6)


def test_the_jitter_scales_from_a_tenth_to_double_and_never_exceeds_the_size():
    random.seed(0)
    views = [large_scale_jitter((480, 640), (128, 128), (0.1, 2.0), 0.5) for _ in range(300)]
    longest = [max(view.scaled) for view in views]
    assert min(longest) < 20 and max(longest) > 240
    assert all(side <= 128 for view in views for side in view.size)
    assert all(0 <= corner <= own - side for v in views for corner, own, side in zip(v.corner, v.scaled, v.size))
    assert 100 < sum(view.flip for view in views) < 200
    assert all(view.size == view.scaled for view in views if max(view.scaled) <= 128)
    corners = [large_scale_jitter((480, 640), (128, 128), (2.0, 2.0), 0.5).corner for _ in range(300)]
    for places, last in zip(zip(*corners), (192 - 128, 256 - 128)):
        assert min(places) < 5 and max(places) > last - 5, "a window may be anywhere"


def block_image(height, width, box):
    """A black image with a white rectangle."""
    left, top, right, bottom = box
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels), pixels[:, :, 0] // 255


VIEWS = {
    "whole": View((60, 80), (60, 80), (0, 0), (60, 80), False),
    "mirrored": View((60, 80), (60, 80), (0, 0), (60, 80), True),
    "doubled": View((60, 80), (120, 160), (0, 0), (120, 160), False),
    "doubled-cut": View((60, 80), (120, 160), (30, 50), (64, 64), False),
    "doubled-cut-mirrored": View((60, 80), (120, 160), (30, 50), (64, 64), True),
    "halved": View((60, 80), (30, 40), (0, 0), (30, 40), True),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
def test_pixels_masks_and_boxes_go_the_same_way(view, kind):
    """A white rectangle and its annotation: where the view is white, there is the object."""
    box = (20, 16, 52, 44)
    image, mask = block_image(60, 80, box)
    shape = det_sets.rectangle(*box) if kind == "polygon" else det_sets.run_length(mask)
    white = np.asarray(view.image(image))[:, :, 0] >= 128
    assert np.array_equal(rle.decode(view.shape(shape)).astype(bool), white)
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    target = targets(view, [Instance(5, shape)])
    assert target["boxes"].tolist() == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]
    assert target["labels"].tolist() == [5] and target["masks"].dtype == torch.uint8
    assert target["masks"].shape == (1, *view.size) and target["boxes"].dtype == torch.float32


def test_an_object_outside_the_window_is_not_in_the_view():
    view = View((60, 80), (60, 80), (0, 0), (20, 20), False)
    shapes = [det_sets.rectangle(40, 40, 50, 50), det_sets.rectangle(10, 10, 30, 30)]
    target = targets(view, [Instance(1, shapes[0]), Instance(2, shapes[1])])
    assert target["labels"].tolist() == [2] and target["boxes"].tolist() == [[10, 10, 20, 20]]


def test_a_training_item_follows_from_its_key_alone(tmp_path):
    det_sets.write_tiny(tmp_path)
    source = coco_source(tmp_path, "train")
    data = TrainDataset(source, (32, 48), (0.5, 2.0), 0.5, seed=3)
    first = data[SampleKey(2, 1, 0)]
    random.seed(99)
    again, others = data[SampleKey(2, 1, 0)], [data[SampleKey(3, 1, 0)], data[SampleKey(2, 1, 1)]]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["boxes"], again[1]["boxes"])
    others.append(TrainDataset(source, (32, 48), (0.5, 2.0), 0.5, seed=4)[SampleKey(2, 1, 0)])
    for other in others:
        assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
    assert first[0].shape[1] <= 32 and first[0].shape[2] <= 48
    with counter_randomness(1):
        before = random.getstate()
        data[SampleKey(2, 1, 0)]
        assert random.getstate() == before


def test_the_flags_say_how_a_view_is_drawn(tmp_path):
    det_sets.write_tiny(tmp_path)
    flags = "--device cpu --seed 3 --input-size 32x48 --scale-range 0.5 1.5 --flip-prob 0.2 --data-path"
    train = build_datasets(parse([*flags.split(), str(tmp_path)])).train
    assert (train.seed, train.size, train.scales, train.flip_prob) == (3, (32, 48), (0.5, 1.5), 0.2)


def test_evaluation_numbers_classes_as_training_did(tmp_path):
    """Where the held-out half's file lacks some of the training half's categories."""
    det_sets.write_tiny(tmp_path)
    content = json.loads((tmp_path / "annotations" / "instances_val2017.json").read_text())
    content["annotations"] = [one | {"category_id": 90} for one in content["annotations"]]
    content["categories"] = [one for one in content["categories"] if one["id"] == 90]
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    flags = ["--device", "cpu", "--data-path", str(tmp_path)]
    trained, evaluated = (build_datasets(parse([*flags, *more])) for more in ([], ["--eval", "--resume", "x"]))
    assert trained.num_classes == evaluated.num_classes == 3
    assert trained.class_names == evaluated.class_names == ["car", "cat", "brush"]
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    assert build_datasets(parse([*flags, "--eval", "--resume", "x"])).class_names == ["brush"]


def test_evaluation_sees_the_whole_image(tmp_path):
    det_sets.write_tiny(tmp_path)
    image, about = EvalDataset(coco_source(tmp_path, "val"), (32, 32))[1]
    assert image.shape == (3, 32, 20) and about == {"index": 1, "original": (64, 40)}


def test_a_batch_is_a_list_of_images_of_their_own_sizes(tmp_path):
    det_sets.write_tiny(tmp_path)
    data = EvalDataset(coco_source(tmp_path, "val"), (32, 32))
    images, described = collate([data[0], data[1]])
    assert [tuple(image.shape) for image in images] == [(3, 24, 32), (3, 32, 20)]
    assert [about["index"] for about in described] == [0, 1]
