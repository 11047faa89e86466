"""Models for programs without this repository: torch.export and ONNX give torch's logits."""

import argparse

import pytest
import timm
import torch

import build
import export
import models_mamba  # noqa: F401  (registers its models with timm)
from inference import load_classifier
from oracle_cases import fill
from small_weights import small_model, write_checkpoint


def images(batch, size=16):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def checkpoint(tmp_path):
    """One block: what an export costs grows with the blocks."""
    return write_checkpoint(tmp_path, model=small_model(depth=1).state_dict())


def model_of(checkpoint):
    parser = export.build_parser()
    return load_classifier(parser.parse_args(["x.onnx", "--checkpoint", str(checkpoint)])).model


@pytest.mark.parametrize(
    "dynamic", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["any batch", "batch of 2"]
)
def test_an_exported_program_gives_torchs_logits(checkpoint, dynamic, tmp_path):
    model = model_of(checkpoint)
    expected = {batch: model(images(batch)).detach() for batch in ((1, 2, 5) if dynamic else (2,))}
    program = export.export_program(model, images(2), dynamic)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "mamba_ssm" in name], "plain operations alone"
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for batch, logits in expected.items():
        assert export.relative_error(again(images(batch)), logits) <= 1e-5


@pytest.mark.parametrize(
    "flags, batches",
    [([], (1, 2, 5)), pytest.param(["--batch-size", "3"], (3,), marks=pytest.mark.slow)],
    ids=["any", "fixed"],
)
def test_onnx_files_give_torchs_logits(checkpoint, tmp_path, capsys, flags, batches):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    assert export.main([str(path), "--checkpoint", str(checkpoint), *flags]) == 0
    assert "relative error" in capsys.readouterr().out
    model = model_of(checkpoint)
    for batch in batches:
        logits = model(images(batch)).detach()
        assert export.relative_error(export.run_onnx(path, images(batch)), logits) <= 1e-4


@pytest.mark.slow
def test_the_program_writes_torchs_own_format(checkpoint, tmp_path):
    path = tmp_path / "model.pt2"
    assert export.main([str(path), "--checkpoint", str(checkpoint)]) == 0
    found = torch.export.load(path).module()(images(4))
    assert export.relative_error(found, model_of(checkpoint)(images(4))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_nano_patch4_32", "vim_tiny_patch16_224"])
def test_onnx_of_registered_names_at_224(name, tmp_path):
    """Two blocks: the 24 of Vim-Ti take a minute of CPU time to write (docs/LOG.md has them), the 4 of nano as long."""
    pytest.importorskip("onnxruntime")
    model = fill(timm.create_model(name, img_size=224, depth=2)).eval()
    with torch.no_grad():
        expected = {batch: model(images(batch, 224)) for batch in (1, 3)}
    export.export_onnx(export.export_program(model, images(2, 224)), tmp_path / "model.onnx")
    for batch, logits in expected.items():
        assert export.relative_error(export.run_onnx(tmp_path / "model.onnx", images(batch, 224)), logits) <= 1e-4


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "model.pt2").mkdir()
    assert export.main([str(tmp_path / "model.pt2"), "--checkpoint", str(checkpoint)]) == 4
    assert capsys.readouterr().err == f"error: [Errno 21] Is a directory: '{tmp_path / 'model.pt2'}'\n"


@pytest.mark.parametrize("name", ["test_resnet", "deit_nano_patch4_32"])
def test_another_model_is_exported_at_the_size_of_its_run(name, tmp_path, capsys):
    args = argparse.Namespace(model=name, input_size=64, num_classes=3)
    model = build.create_model("--model", name, img_size=64, num_classes=3)
    path = write_checkpoint(tmp_path, model=model.state_dict(), args=args)
    assert export.main([str(tmp_path / "model.pt2"), "--checkpoint", str(path)]) == 0
    assert "images (any, 3, 64, 64)" in capsys.readouterr().out


@pytest.mark.parametrize("bidirectional", ["v1", "none"])
def test_a_batch_may_be_as_large_as_the_model_is_wide(bidirectional):
    model = small_model(depth=1, bidirectional=bidirectional)
    program = export.export_program(model, images(2))
    assert program.module()(images(32)).shape == (32, 3), "2 * 16 channels"


def test_logits_that_are_not_finite_are_no_copy(tmp_path, capsys):
    weights = small_model(depth=1).state_dict()
    weights["head.bias"][1] = float("nan")
    path = write_checkpoint(tmp_path, model=weights)
    assert export.main([str(tmp_path / "model.pt2"), "--checkpoint", str(path), "--batch-size", "2"]) == 4
    assert "computes other logits (relative error nan)" in capsys.readouterr().err


def test_logits_of_zero_have_no_error():
    zeros = torch.zeros(2, 3)
    assert export.relative_error(zeros, zeros) == 0 and export.relative_error(zeros + 1, zeros) > export.TOLERANCE


@pytest.mark.parametrize(
    "out, expected", [("model.tflite", "use .onnx or .pt2"), ("absent/model.onnx", "does not exist")]
)
def test_mistakes_are_one_line(checkpoint, tmp_path, capsys, out, expected):
    assert export.main([str(tmp_path / out), "--checkpoint", str(checkpoint)]) == 4
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch, checkpoint, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert export.main([str(tmp_path / "model.onnx"), "--checkpoint", str(checkpoint)]) == 4
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
