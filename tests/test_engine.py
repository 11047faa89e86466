"""The training step: what it computes, what it survives, and that counters alone decide its randomness."""

import math
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import build
import engine
import subsets
from arguments import parse_args
from build import build_model, build_run
from checkpoint import Checkpoint
from datasets import build_datasets
from distributed import World
from ema import WeightsEma
from engine import build_val_loader, training_step, training_steps
from errors import ConfigError, NonFiniteError
from evaluation import evaluate
from report import RunLog
from subsets import evaluate_real

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
PLAIN = "--mixup 0 --cutmix 0 --no-repeated-aug --drop-path 0"


def make_run(flags=PLAIN, model="deit_nano_patch4_32"):
    args = parse_args(f"--device cpu --model {model} --input-size 8 --num_workers 0 {flags}".split())
    torch.manual_seed(args.seed)
    data = build_datasets(args)
    return build_run(args, WORLD, build_model(args, data.num_classes), data), data


def a_batch(size=16, seed=0, side=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, side, side, generator=generator), torch.arange(size) % 10


def weights(run):
    return deepcopy(run.model.state_dict())


def differ(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


def assert_same(a, b):
    assert differ(a, b) == []


# --- what a step computes


def test_a_step_is_one_move_of_the_optimiser_along_the_gradient():
    run, _ = make_run(
        f"{PLAIN} --opt momentum --momentum 0 --weight-decay 0 --unscale-lr --lr 0.1 --sched none --smoothing 0"
    )
    before, (images, labels) = weights(run), a_batch()
    loss = F.cross_entropy(run.model.train()(images), labels)
    gradients = dict(zip(dict(run.model.named_parameters()), torch.autograd.grad(loss, list(run.model.parameters()))))
    result = training_step(run, [(images, labels)], 0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value, before[name] - 0.1 * gradients[name])


@pytest.mark.parametrize("model", ["deit_nano_patch4_32", "vim_nano_patch4_32"])
def test_accumulated_batches_are_one_whole_batch(model):
    sgd = f"{PLAIN} --opt momentum --momentum 0 --unscale-lr --lr 0.1 --sched none"
    images, labels = a_batch(16)
    whole, _ = make_run(sgd, model)
    parts, _ = make_run(sgd, model)
    training_step(whole, [(images, labels)], 0)
    training_step(parts, [(images[:8], labels[:8]), (images[8:], labels[8:])], 0)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["--no_amp", "--if_amp --amp-dtype float16"])
def test_clipping_limits_the_gradients_norm(precision):
    """Also of a loss that is scaled: the limit is for the gradients that the optimiser sees."""
    sgd = f"{PLAIN} --opt momentum --momentum 0 --weight-decay 0 --unscale-lr --lr 1.0 --sched none"
    run, _ = make_run(f"{sgd} --clip-grad 0.01 {precision}")
    before = weights(run)
    result = training_step(run, [a_batch()], 0)
    moved = math.sqrt(sum((v - before[k]).square().sum().item() for k, v in run.model.state_dict().items()))
    assert 0.02 < result.grad_norm < 20
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("model", ["deit_nano_patch4_32", "deit_tiny_distilled_patch16_224"])
def test_attention_only_moves_attention_and_heads(model):
    run, _ = make_run(f"{PLAIN} --attn-only --input-size 16", model)
    before = weights(run)
    training_step(run, [a_batch(side=16)], 0)
    moved = differ(before, run.model.state_dict())
    assert moved and all(".attn." in name or name.startswith("head") for name in moved)
    assert set(moved) >= {name for name in before if name.startswith("head")}


@pytest.mark.parametrize(
    "flags",
    [
        "--no-repeated-aug",
        "--bce-loss",
        "--cosub",
        "--mixup-mode elem --cutmix-minmax 0.2 0.8",
        "--if_amp",
        "--if_amp --amp-dtype float16",
        "--grad-checkpointing",
        "--opt lamb --clip-grad 1",
    ],
)
@pytest.mark.parametrize("model", ["deit_nano_patch4_32", "vim_nano_patch4_32"])
def test_every_recipe_steps(flags, model):
    run, _ = make_run(flags, model)
    before = weights(run)
    result = training_step(run, [a_batch()], 0)
    assert result.finite and result.grad_norm > 0
    assert differ(before, run.model.state_dict())


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("student", ["vim_nano_patch4_32", "deit_tiny_distilled_patch16_224"])
def test_a_convolutional_teacher_distils_into_a_student(kind, student, tmp_path):
    teacher = timm.create_model("resnet10t", num_classes=10)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    flags = f"--distillation-type {kind} --teacher-model resnet10t --teacher-path {tmp_path / 'teacher.pth'}"
    args = parse_args(f"--device cpu --model {student} --input-size 32 --num_workers 0 {flags}".split())
    data = build_datasets(args)
    run = build_run(args, WORLD, build_model(args, data.num_classes), data)
    before, taught = weights(run), deepcopy(run.task.criterion.teacher.state_dict())
    images, labels = a_batch()
    result = training_step(run, [(F.interpolate(images, 32), labels)], 0)
    assert result.finite and differ(before, run.model.state_dict())
    assert_same(taught, run.task.criterion.teacher.state_dict())
    moved = set(differ(before, run.model.state_dict()))
    assert moved >= {"head_dist.weight", "head.weight"} if "distilled" in student else "head.weight" in moved


def test_gradient_checkpointing_that_a_model_lacks_is_one_line():
    args = parse_args(["--device", "cpu", "--model", "convit_tiny", "--grad-checkpointing", "--input-size", "224"])
    with pytest.raises(ConfigError, match="--grad-checkpointing: convit_tiny does not support it; leave it out"):
        build_model(args, 10)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    names = [str(digit) for digit in range(10)]
    content = {"model": timm.create_model("resnet10t", num_classes=10).state_dict(), "class_names": [*names[1:], "0"]}
    torch.save(content, tmp_path / "teacher.pth")
    flags = f"--distillation-type hard --teacher-model resnet10t --teacher-path {tmp_path / 'teacher.pth'}"
    args = parse_args(f"--device cpu --model vim_nano_patch4_32 --input-size 32 --num_workers 0 {flags}".split())
    data = build_datasets(args)
    assert data.class_names == names
    with pytest.raises(ConfigError, match=r"'0' is 0 in the data and 9 there; a teacher must know the data's classes"):
        build_run(args, WORLD, build_model(args, data.num_classes), data)


@pytest.mark.parametrize(("repeated", "times"), [("--repeated-aug", 3), ("--no-repeated-aug", 1)])
def test_flags_of_the_recipe_reach_the_model_and_the_order(repeated, times):
    run, _ = make_run(f"--drop 0.2 --drop-path 0.3 {repeated}", "vim_nano_patch4_32")
    assert (run.model.pos_drop.p, run.model.drop_path.drop_prob, run.sampler.repeats) == (0.2, 0.3, times)


# --- what a step survives


BROKEN = (torch.full((16, 3, 8, 8), float("nan")), torch.arange(16) % 10)


@pytest.mark.parametrize("precision", ["--no_amp", "--if_amp --amp-dtype float16"])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(precision):
    """In float16 as well, where an infinite gradient of a finite loss is no fault."""
    run, _ = make_run(f"{PLAIN} {precision}")
    training_step(run, [a_batch()], 0)
    before, average = weights(run), deepcopy(run.ema.state_dict())
    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 1: loss nan.*--nonfinite skip"):
        training_step(run, [BROKEN], 1)
    assert_same(before, run.model.state_dict())
    assert_same(average, run.ema.state_dict())


def test_a_skipped_step_leaves_the_run_as_if_its_batch_had_not_been():
    skipping, _ = make_run(f"{PLAIN} --nonfinite skip --model-ema-decay 0.5")
    without, _ = make_run(f"{PLAIN} --model-ema-decay 0.5")
    for micro, batch in enumerate([a_batch(seed=1), BROKEN, a_batch(seed=2)]):
        result = training_step(skipping, [batch], micro)
        assert result.finite == (micro != 1)
    training_step(without, [a_batch(seed=1)], 0)
    without.progress.record_step(math.nan, finite=False)
    training_step(without, [a_batch(seed=2)], 2)
    assert_same(skipping.model.state_dict(), without.model.state_dict())
    assert_same(skipping.ema.state_dict(), without.ema.state_dict())
    assert skipping.progress == without.progress
    assert (skipping.progress.skipped, skipping.progress.skipped_in_row) == (1, 0)


def test_a_skipped_step_leaves_batch_norm_as_it_was():
    """Its statistics move in forward, before anybody knows that the step is left out."""
    run, _ = make_run(f"{PLAIN} --nonfinite skip --input-size 32", "test_resnet")
    before = weights(run)
    images, labels = a_batch()
    training_step(run, [(images * torch.nan, labels)], 0)
    assert_same(before, run.model.state_dict())


def test_too_many_skipped_steps_in_a_row_stop():
    run, _ = make_run(f"{PLAIN} --nonfinite skip --nonfinite-limit 2")
    training_step(run, [BROKEN], 0)
    training_step(run, [BROKEN], 1)
    with pytest.raises(NonFiniteError, match=r"3 such step\(s\) in a row"):
        training_step(run, [BROKEN], 2)


def test_an_overflow_in_float16_lowers_the_scale_and_is_no_fault():
    run, _ = make_run(f"{PLAIN} --if_amp --amp-dtype float16")
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**40})
    before = weights(run)
    assert not training_step(run, [a_batch()], 0).finite
    assert_same(before, run.model.state_dict())
    assert run.scaler.get_scale() == 2.0**39
    while not training_step(run, [a_batch()], run.progress.step).finite:
        run.progress.skipped_in_row = 0
    assert differ(before, run.model.state_dict())


@pytest.mark.parametrize("flags", ["--if_amp", "--no_amp --amp-dtype float16", "--if_amp --amp-dtype float16"])
def test_the_loss_is_scaled_where_float16_computes(flags):
    run, _ = make_run(f"{PLAIN} {flags}")
    assert run.scaler.is_enabled() == (flags == "--if_amp --amp-dtype float16")


def test_logits_can_be_made_finite_before_the_loss():
    run, _ = make_run(f"{PLAIN} --if_nan2num")
    with torch.no_grad():
        run.model.head.bias[0] = float("nan")
    assert math.isfinite(training_step(run, [a_batch()], 0).loss)


def test_logits_of_two_tokens_can_be_made_finite_before_the_loss():
    run, _ = make_run(f"{PLAIN} --if_nan2num --input-size 16", "deit_tiny_distilled_patch16_224")
    run.model.set_distilled_training(True)
    with torch.no_grad():
        run.model.head.bias[0] = run.model.head_dist.bias[0] = float("nan")
    assert math.isfinite(training_step(run, [a_batch(side=16)], 0).loss)


def test_ranks_agree_on_means_and_on_what_one_of_them_met(monkeypatch):
    loss, norm = torch.tensor(1.0), torch.tensor(2.0)
    for stop, failed in ((True, False), (False, True)):
        monkeypatch.setattr(engine, "sum_over_ranks", lambda numbers: numbers + torch.tensor([2.0, 6.0, 0.0, 0.0]))
        assert engine.agree(loss, norm, stop, failed, World(0, 2, torch.device("cpu"))) == (1.5, 4.0, stop, failed)


def test_a_signal_is_seen_at_the_end_of_the_step():
    run, _ = make_run()
    assert not training_step(run, [a_batch()], 0).stop
    run.stop.received = "SIGTERM"
    assert training_step(run, [a_batch()], 1).stop


# --- randomness comes from counters


@pytest.mark.parametrize("model", ["deit_nano_patch4_32", "vim_nano_patch4_32"])
def test_a_steps_randomness_follows_from_its_number(model):
    """Dropout, stochastic depth and mixup: the same for the same micro-batch, whatever ran before."""

    def loss_of(micro, disturb=False):
        run, _ = make_run("--drop 0.2 --drop-path 0.3 --seed 5", model)
        if disturb:
            torch.rand(100)
        return training_step(run, [a_batch()], micro).loss

    assert loss_of(3) == loss_of(3, disturb=True)
    assert loss_of(3) != loss_of(4)


@pytest.mark.parametrize("flags", ["--mixup 0 --cutmix 0 --drop 0.3", "--drop-path 0"], ids=["dropout", "mixup"])
def test_every_micro_batch_of_a_step_has_randomness_of_its_own(flags):
    """What an accumulated batch draws is what it draws as a step by itself under its number."""

    def loss_of(micro, parts=1):
        run, _ = make_run(flags)
        return training_step(run, [a_batch() for _ in range(parts)], micro).loss

    apart = [loss_of(6), loss_of(7)]
    assert apart[0] != pytest.approx(apart[1], rel=1e-5)
    assert loss_of(6, parts=2) == pytest.approx(sum(apart) / 2, rel=1e-6)


def test_ranks_mix_their_batches_each_in_its_own_way():
    run, _ = make_run("--drop-path 0")
    losses = []
    for run.world in [World(rank, 2, torch.device("cpu")) for rank in (0, 1, 0)]:
        losses.append(run.task.loss(run, a_batch(), 0).item())
    assert losses[0] == losses[2] != losses[1]


def test_an_epoch_can_be_taken_up_in_the_middle():
    """The rest of an interrupted epoch, by the same steps and images as if it had not been."""
    whole, data = make_run("--batch-size 200 --accum-steps 2")
    parts, _ = make_run("--batch-size 200 --accum-steps 2")

    def steps(run):
        loader = DataLoader(data.train, batch_size=200, sampler=run.sampler, drop_last=True)
        return training_steps(run, loader)

    losses = [step.loss for step in steps(whole)]
    assert len(losses) == whole.steps_per_epoch == 3, "the seventh batch has no second one"
    first = next(steps(parts))
    resumed, _ = make_run("--batch-size 200 --accum-steps 2")
    resumed.model.load_state_dict(parts.model.state_dict())
    resumed.optimizer.load_state_dict(parts.optimizer.state_dict())
    resumed.progress.load_state_dict(parts.progress.state_dict() | {"samples": 400})
    assert [first.loss] + [step.loss for step in steps(resumed)] == losses
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


@pytest.mark.parametrize(("batches", "steps"), [(3, 2), (7, 0)])
def test_an_epoch_taken_up_with_more_accumulation_has_whole_steps(batches, steps):
    """Stopped after an odd number of batches with --accum-steps 1: the half of a step is done again or left out."""
    run, data = make_run("--batch-size 200 --accum-steps 2")
    run.progress.samples = 200 * batches
    loader = DataLoader(data.train, batch_size=200, sampler=run.sampler, drop_last=True)
    assert len(list(training_steps(run, loader))) == steps
    assert run.progress.samples == 200 * batches + 400 * steps


def test_the_steps_of_an_epoch_taken_up_are_numbered_on(capsys):
    run, data = make_run("--batch-size 200 --accum-steps 2 --log-every 1")
    run.progress.samples = 400
    loader = DataLoader(data.train, batch_size=200, sampler=run.sampler, drop_last=True)
    assert not engine.train_one_epoch(run, loader, RunLog(run.args, is_main=True))
    assert re.findall(r"step (\d+)/(\d+)", capsys.readouterr().out) == [("2", "3"), ("3", "3")]


# --- averages and evaluation


def test_the_average_follows_the_weights_with_a_constant_decay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    start = deepcopy(model.state_dict())
    ema = WeightsEma(model, decay=0.9)
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].num_batches_tracked.add_(5)
    ema.update(model)
    torch.testing.assert_close(ema.state_dict()["0.weight"], start["0.weight"] + 0.1)
    assert ema.state_dict()["1.num_batches_tracked"] == 5
    raw = deepcopy(model.state_dict())
    with ema.applied_to(model):
        assert_same(ema.state_dict(), model.state_dict())
    assert_same(raw, model.state_dict())


@pytest.mark.parametrize(("flag", "device"), [("--model-ema-force-cpu", "cpu"), ("", None)])
def test_the_average_lives_where_told(flag, device, monkeypatch):
    monkeypatch.setattr(build, "WeightsEma", lambda model, decay, device: (decay, device))
    args = parse_args(f"--device cpu --model-ema-decay 0.9 {flag}".split())
    assert build.build_ema(args, torch.nn.Linear(2, 2)) == (0.9, device)


@pytest.mark.gpu
def test_an_average_on_the_host_waits_for_a_gpus_weights():
    """The copies to pinned memory are asynchronous: read too early, they are what was there before."""
    model = torch.nn.Linear(4096, 1024, device="cuda")
    ema = WeightsEma(model, decay=0.5, device="cpu")
    for value in (1.0, 2.0, 3.0):
        before = ema.state_dict()["weight"].clone()
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model)
        torch.testing.assert_close(ema.state_dict()["weight"], (before + value) / 2)


def test_moments_of_other_shapes_are_refused():
    """torch takes them, and the next step would fail, or be wrong where shapes can be broadcast."""
    run, _ = make_run("--no-model-ema")
    training_step(run, [a_batch()], 0)
    saved = run.optimizer.state_dict()
    checkpoint = Checkpoint(Path("x.pth"), "", model=run.model.state_dict(), optimizer=saved)
    engine.load_optimizer(run, checkpoint)
    number = next(n for n, state in saved["state"].items() if state["exp_avg"].dim() == 2)
    saved["state"][number]["exp_avg"] = saved["state"][number]["exp_avg"][:1]
    with pytest.raises(ConfigError, match=r"^x\.pth: its optimiser state does not fit \(exp_avg \(1, "):
        engine.load_optimizer(run, checkpoint)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_rate_by_step_follows_the_place_in_the_epochs(parts):
    """Also of a run whose whole batch was changed, which has made fewer steps or more."""
    flags = f"--epochs 4 --warmup-epochs 0 --batch-size 16 --accum-steps {parts} --unscale-lr --lr 1"
    run, _ = make_run(f"--sched-on-updates {flags}")
    rates, half = [], run.steps_per_epoch // 2
    for run.progress.step in (0, 1000):
        run.progress.epoch, run.progress.samples = 2, 16 * parts * half
        rates.append(training_step(run, [a_batch() for _ in range(parts)], 0).lr)
    expected = run.schedule.set(2, 2 * run.steps_per_epoch + half)
    assert rates == [expected, expected] and 0 < expected < 0.5


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"optimizer": {}}, r"its optimiser state does not fit \(it holds nothing\)"),
        ({"optimizer": {"a": 1}}, r"its optimiser state does not fit \(it holds a\)"),
        ({"epoch": "3"}, "its epoch is '3', expected a whole number"),
    ],
    ids=str,
)
def test_entries_of_another_kind_are_one_line(entries, words):
    run, _ = make_run("--no-model-ema")
    with pytest.raises(ConfigError, match=rf"^x\.pth: {words}"):
        engine.restore(run, Checkpoint(Path("x.pth"), "", model=run.model.state_dict(), **entries))


def test_an_average_of_another_model_is_refused():
    ema = WeightsEma(torch.nn.Linear(2, 2), decay=0.9)
    with pytest.raises(ValueError, match="another model's: bias differ"):
        ema.load_state_dict({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"its average of bias is \(3,\), not \(2,\)"):
        ema.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(3)})


class Table(torch.nn.Module):
    """Gives each one-pixel image the logits that stand at its value's place."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits[images.flatten().long()]


def test_images_whose_logits_are_no_numbers_are_wrong_and_told():
    """In none of the tables, and with ReaL's labels too."""
    logits = torch.eye(4)
    logits[0, 2], logits[2, 1] = float("nan"), -float("inf")
    loader = DataLoader(TensorDataset(torch.arange(4.0).view(4, 1, 1, 1), torch.arange(4)), batch_size=4)
    args = parse_args(["--device", "cpu"])
    found = evaluate(Table(logits), loader, args, WORLD, 4)
    assert (found.top1, found.top5, found.not_finite, found.mistakes) == (50, 50, 2, [])
    assert torch.equal(found.confusion, torch.diag(torch.tensor([0, 1, 0, 1])))
    assert found.words.endswith("loss nan; logits of 2 images are not finite (damaged weights?)")
    assert evaluate_real(Table(logits), loader, args, WORLD, [{0}, {1}, {2}, {3}]) == (50, 4)


@pytest.mark.parametrize("num_classes", [3, 7])
def test_evaluation_counts_exactly(num_classes):
    logits = torch.randn(53, num_classes, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(num_classes, (53,), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(torch.arange(53.0).view(53, 1, 1, 1), labels), batch_size=8)
    found = evaluate(Table(logits), loader, parse_args(["--device", "cpu"]), WORLD, num_classes)

    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    predicted = logits.argmax(dim=1)
    assert found.images == 53
    assert found.top1 == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert found.top5 == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    for label in range(num_classes):
        for guess in range(num_classes):
            assert found.confusion[label, guess] == ((labels == label) & (predicted == guess)).sum()
    wrong = (labels != predicted).nonzero()[:, 0]
    confidence = logits.softmax(1).amax(1)
    expected = sorted(wrong.tolist(), key=lambda i: -confidence[i])[:24]
    assert [mistake.index for mistake in found.mistakes] == expected
    assert all(m.label == labels[m.index] and m.predicted == predicted[m.index] for m in found.mistakes)


def test_every_held_out_image_is_evaluated():
    run, data = make_run("--batch-size 50")
    loader = build_val_loader(data.val, run.args, WORLD)
    assert evaluate(run.model, loader, run.args, WORLD, 10).images == len(data.val) == 360


@pytest.mark.parametrize(
    ("flags", "evaluated"),
    [
        ("--eval-weights raw", ["raw"]),
        ("--eval-weights ema", ["ema"]),
        ("--eval-weights both", ["raw", "ema"]),
        ("--eval-weights ema --no-model-ema", ["raw"]),
    ],
    ids=str,
)
def test_the_weights_asked_for_are_evaluated_and_raw_ones_where_there_is_no_average(flags, evaluated):
    run, data = make_run(f"{PLAIN} {flags}")
    assert list(engine.assess(run, build_val_loader(data.val, run.args, WORLD))) == evaluated


def after_epochs(flags, scores):
    """A run, and what it says of epochs with these scores: whether each was the best so far; the rate before each."""
    run, data = make_run(f"{PLAIN} {flags}")
    best, rates = [], []
    for score in scores:
        rates.append(run.schedule.lr)
        result = SimpleNamespace(score=score, words="", row=lambda prefix: {})
        best.append(engine.record_epoch(run, {"raw": result}, data, RunLog(run.args, is_main=False)))
        run.progress.next_epoch()
    return run, best, rates


def test_the_log_counts_the_parameters_that_are_trained():
    run, data = make_run(f"{PLAIN} --attn-only")
    log = RunLog(run.args, is_main=False)
    engine.record_epoch(run, {"raw": SimpleNamespace(score=1.0, words="", row=lambda prefix: {})}, data, log)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert log.rows[0]["n_parameters"] == trained < sum(p.numel() for p in run.model.parameters())


def test_the_best_epoch_is_the_first_of_its_score():
    run, best, _ = after_epochs("", [50.0, 60.0, 60.0, 40.0])
    assert best == [True, True, False, False] and (run.progress.best, run.progress.best_epoch) == (60.0, 1)


def test_a_plateaus_rate_warms_up_with_the_epochs():
    flags = "--sched plateau --warmup-epochs 2 --warmup-lr 0.1 --unscale-lr --lr 0.5"
    assert after_epochs(flags, [10.0, 20.0, 30.0])[2] == pytest.approx([0.1, 0.3, 0.5])


def test_a_resume_takes_up_plateaus_state_and_the_losss_scale():
    flags = "--sched plateau --warmup-epochs 0 --if_amp --amp-dtype float16"
    run, *_ = after_epochs(flags, [60.0, 50.0])
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 1024.0})
    states = {"lr_scheduler": run.schedule.state_dict(), "scaler": run.scaler.state_dict()}
    again, _ = make_run(f"{PLAIN} {flags}")
    engine.restore(again, Checkpoint(Path("x.pth"), "", model=run.model.state_dict(), **states))
    assert again.schedule.state_dict() == run.schedule.state_dict()
    assert again.scaler.get_scale() == 1024.0


def test_a_checkpoint_knows_the_images_that_any_rank_could_not_read(monkeypatch, tmp_path):
    run, _ = make_run(f"{PLAIN} --bad-image replace --output_dir {tmp_path}")
    run.world, run.dataset.replaced[3], states = World(0, 2, torch.device("cpu")), True, []
    of_other = torch.arange(len(run.dataset)) == 5
    monkeypatch.setattr(engine, "sum_over_ranks", lambda counts: counts + of_other)
    monkeypatch.setattr(run.writer, "store", lambda folder, state, **options: states.append(state))
    engine.save(run)
    assert states[0]["replaced"].tolist() == [3, 5]


@pytest.mark.parametrize("measure", [evaluate, evaluate_real])
def test_an_evaluation_is_no_training(measure):
    model, modes = Table(torch.eye(4)).train(), []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    loader = DataLoader(TensorDataset(torch.arange(4.0).view(4, 1, 1, 1), torch.arange(4)), batch_size=2)
    measure(model, loader, parse_args(["--device", "cpu"]), WORLD, {evaluate: 4, evaluate_real: [{0}] * 4}[measure])
    assert modes == [(False, False)] * 2


@pytest.mark.parametrize(("flag", "found"), [("--dist-eval", (75.0, 8)), ("--no-dist-eval", (100.0, 4))])
def test_real_accuracy_is_over_the_images_of_all_ranks_where_they_share_them(flag, found, monkeypatch):
    """Here as if another rank had two of four right."""
    monkeypatch.setattr(subsets, "sum_over_ranks", lambda sums: sums + torch.tensor([2.0, 4.0]))
    loader = DataLoader(TensorDataset(torch.arange(4.0).view(4, 1, 1, 1), torch.arange(4)), batch_size=4)
    labels = [{0}, {1}, {2}, {3}]
    assert evaluate_real(Table(torch.eye(4)), loader, parse_args(["--device", "cpu", flag]), WORLD, labels) == found
