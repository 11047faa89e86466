"""Learning rates as functions of epoch and step, and which parameters decay."""

import itertools
import math
import sys

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import list_optimizers

import optim
from errors import ConfigError
from helpers import run_args
from optim import COMMON_OPTIMIZERS, SCHEDULES, Schedule, build_optimizer, scaled_lr

PURE = tuple(name for name in SCHEDULES if name not in ("plateau", "none"))


def schedule(*flags, lr=1e-3, steps_per_epoch=10):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    return Schedule(run_args(*flags), optimizer, steps_per_epoch)


def cosine(epoch, lr=1e-3, low=1e-5, epochs=300):
    return low + 0.5 * (lr - low) * (1 + math.cos(math.pi * epoch / epochs))


def test_the_learning_rate_is_linear_in_the_whole_batch():
    args = run_args("--batch-size", "128", "--accum-steps", "2", "--lr", "5e-4")
    assert scaled_lr(args, num_ranks=8) == pytest.approx(5e-4 * 128 * 8 * 2 / 512)
    assert scaled_lr(run_args("--unscale-lr", "--lr", "3e-4"), num_ranks=8) == 3e-4


def test_epochs_have_deits_learning_rates():
    """DeiT steps its schedule after an epoch with that epoch's number: the first value serves twice."""
    s = schedule()
    found = [s.set(epoch, 10 * epoch) for epoch in (0, 1, 2, 5, 6, 7, 150, 299)]
    warm = [1e-6, 1e-6, 1e-6 + (1e-3 - 1e-6) / 5, 1e-6 + 4 * (1e-3 - 1e-6) / 5]
    assert found == pytest.approx([*warm, *map(cosine, (5, 6, 149, 298))])


@pytest.mark.parametrize("name", PURE)
def test_the_cooldown_of_old_commands_has_no_effect(name):
    flags = f"--sched {name} --epochs 20 --decay-epochs 2 --decay-milestones 8 --cooldown-epochs".split()
    without, long = (schedule(*flags, count) for count in ("0", "15"))
    assert [without.set(epoch, 0) for epoch in range(20)] == [long.set(epoch, 0) for epoch in range(20)]


BETAS = [("adamw --opt-betas 0.9", "takes 2, not 1"), ("sgd --opt-betas 0.9 0.99", "takes none")]


@pytest.mark.parametrize(("flags", "words"), BETAS)
def test_betas_that_an_optimiser_does_not_take_are_one_line(flags, words):
    with pytest.raises(ConfigError, match=f"^--opt-betas .*{words}"):
        build_optimizer(run_args("--opt", *flags.split()), torch.nn.Linear(2, 2), 1e-3)


def test_an_epoch_asked_for_out_of_order_has_the_same_rate():
    """So a resumed epoch runs at its own rate, not at the next one's."""
    forward = schedule()
    rates = [forward.set(epoch, 0) for epoch in range(300)]
    assert schedule().set(137, 0) == rates[137]
    assert [forward.set(epoch, 0) for epoch in reversed(range(300))] == rates[::-1]


def test_rates_may_change_with_every_step():
    s = schedule("--sched-on-updates", "--epochs", "20", "--warmup-epochs", "2")
    rates = [s.set(step // 10, step) for step in range(200)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[20] == max(rates)
    assert len(set(rates)) == 200
    assert rates[-1] == pytest.approx(1e-5, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([n for n in PURE if n not in ("step", "multistep")]),
    epochs=st.integers(20, 60),
    warmup=st.integers(1, 2),
    steps=st.integers(10, 40),
)
def test_rates_are_positive_and_continuous_over_steps(name, epochs, warmup, steps):
    """From step to step no schedule jumps by more than its own range in an epoch's share."""
    flags = f"--sched {name} --sched-on-updates --epochs {epochs} --warmup-epochs {warmup} --decay-epochs 0.2"
    s = schedule(*flags.split(), steps_per_epoch=steps)
    rates = [s.set(step // steps, step) for step in range(epochs * steps)]
    assert all(0 < rate <= 1e-3 * (1 + 1e-9) for rate in rates)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 1e-3 * 6 / steps


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SCHEDULES),
    epochs=st.integers(5, 40),
    warmup=st.integers(1, 3),
    by_step=st.booleans(),
    noise=st.booleans(),
    metrics=st.lists(st.floats(0, 100), min_size=40, max_size=40),
)
def test_no_schedule_ever_gives_a_negative_rate(name, epochs, warmup, by_step, noise, metrics):
    """Nor one that is no number, whatever the metric does: a negative rate climbs."""
    by_step = by_step and name != "plateau"
    decay = 0.5 if name == "wsd" else min(3, epochs - warmup)  # rsqrt takes no more
    flags = f"--sched {name} --epochs {epochs} --warmup-epochs {warmup} --decay-epochs {decay} --decay-milestones 2 5"
    flags += " --lr-noise 0.2 0.9" * noise + " --sched-on-updates" * by_step
    s = schedule(*flags.split(), steps_per_epoch=3)
    for epoch in range(epochs):
        for step in range(3 * epoch, 3 * epoch + 3):
            assert 0 <= s.set(epoch, step) < math.inf
        s.observe(epoch, metrics[epoch])


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(["step", "multistep"]), start=st.integers(3, 30), by_step=st.booleans())
def test_schedules_in_stairs_are_flat_between_their_stairs(name, start, by_step):
    """Within an epoch of where they are meant to jump, by `--decay-rate`, and nowhere else."""
    flags = f"--sched {name} --epochs 32 --warmup-epochs 0 --decay-epochs {start} --decay-milestones {start}"
    s = schedule(*flags.split(), *["--sched-on-updates"] * by_step, steps_per_epoch=4)
    rates = [s.set(step // 4, step) for step in range(32 * 4)]
    jumps = [(step, b / a) for step, (a, b) in enumerate(itertools.pairwise(rates), start=1) if a != b]
    stairs = [epoch for epoch in range(start, 31, start if name == "step" else 32)]
    assert [ratio for _, ratio in jumps] == pytest.approx([0.1] * len(stairs))
    assert all(abs(step - 4 * epoch) <= 4 for (step, _), epoch in zip(jumps, stairs))


def test_plateau_lowers_the_rate_when_the_metric_stalls_and_its_state_can_be_saved():
    flags = ("--sched", "plateau", "--patience-epochs", "1", "--warmup-epochs", "0", "--decay-rate", "0.5")
    s = schedule(*flags)
    for epoch, metric in enumerate([50, 60, 60, 60]):
        assert s.set(epoch, 0) == 1e-3
        s.observe(epoch, metric)
    assert s.set(4, 0) == 5e-4
    resumed = schedule(*flags)
    resumed.load_state_dict(s.state_dict())
    assert resumed.timm.lr_scheduler.best == 60


def test_noise_on_a_plateaus_rate_does_not_add_up_over_a_resume():
    flags = ("--sched", "plateau", "--warmup-epochs", "0", "--lr-noise", "0")
    whole, resumed = schedule(*flags), schedule(*flags)
    for epoch in range(3):
        whole.observe(epoch, 50)
    assert whole.lr != 1e-3, "noise is on"
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    resumed.load_state_dict(whole.state_dict())
    for each in (whole, resumed):
        each.observe(3, 50)
    assert resumed.lr == whole.lr


def test_no_schedule_leaves_the_rate_alone():
    assert schedule("--sched", "none").set(17, 170) == 1e-3


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(ConfigError, match=r"--sched cosin is unknown: use one of .* did you mean cosine"):
        schedule("--sched", "cosin")
    with pytest.raises(ConfigError, match=r"--sched wsd: .*requires 0 < decay_epochs <= epochs"):
        schedule("--sched", "wsd", "--epochs", "8", "--decay-epochs", "9")
    with pytest.raises(ConfigError, match="--opt adamww is not an optimiser of timm; did you mean"):
        build_optimizer(run_args("--opt", "adamww"), torch.nn.Linear(1, 1), 1e-3)
    assert set(COMMON_OPTIMIZERS) <= set(list_optimizers())
    with pytest.raises(ConfigError, match="--opt nope is not an optimiser of timm; common ones are adamw, sgd"):
        build_optimizer(run_args("--opt", "nope"), torch.nn.Linear(1, 1), 1e-3)


PACKAGES = [(name, "apex" if name.startswith("fused") else "bitsandbytes")
            for name in list_optimizers(["fused*", "bnb*"])]  # fmt: skip


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("name", "package"), PACKAGES)
def test_an_optimiser_of_a_package_that_is_missing_names_it(name, package, gpu, monkeypatch):
    """Without a GPU timm asserts one, with one it looks for the package."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"^--opt {name} needs a GPU and the package {package}: [^\n]+$"):
        build_optimizer(run_args("--opt", name), torch.nn.Linear(2, 2), 1e-3)


def test_optimisers_that_the_loop_cannot_step_are_refused():
    with pytest.raises(ConfigError, match=r"^--opt adahessian needs second derivatives, which training does not"):
        build_optimizer(run_args("--opt", "adahessian"), torch.nn.Linear(2, 2), 1e-3)
    with pytest.raises(ConfigError, match=r"^--opt Lookahead_AdamW: .* lookahead_ is not supported; take adamw alone$"):
        build_optimizer(run_args("--opt", "Lookahead_AdamW"), torch.nn.Linear(2, 2), 1e-3)


# --- which parameters decay


@pytest.fixture(scope="module")
def vim():
    import models_mamba  # noqa: F401

    return timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=3)


def decayed(model, *flags):
    optimizer = build_optimizer(run_args(*flags), model, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert set().union(*groups.values()) == set(names.values())
    return groups[0.05], groups[0.0]


def test_decay_is_as_published(vim):
    """Matrices decay, the scan's A_log with them; vectors, position embeddings and class tokens do not."""
    decay, exempt = decayed(vim)
    assert "layers.0.mixer.A_log" in decay and "layers.0.mixer.A_b_log" in decay
    assert {"pos_embed", "cls_token", "layers.0.mixer.D", "norm_f.weight", "head.bias"} <= exempt
    assert {name for name in decay if name.endswith("bias")} == set()


def test_no_decay_ssm_exempts_a_log_alone(vim):
    before, after = decayed(vim)[0], decayed(vim, "--no-decay-ssm")[0]
    assert {name.split(".")[-1] for name in before - after} == {"A_log", "A_b_log"}
    assert not after - before


def test_no_decay_ssm_is_refused_where_there_is_no_a_log():
    with pytest.raises(ConfigError, match="--no-decay-ssm: deit_base_patch16_224 has no state-space parameters"):
        build_optimizer(run_args("--no-decay-ssm"), torch.nn.Linear(1, 1), 1e-3)


def test_a_schedule_that_an_older_timm_does_not_have_is_refused(monkeypatch):
    """It gives none for a name that it does not know, and training would go on without one."""
    monkeypatch.setattr(optim, "create_scheduler_v2", lambda optimizer, **options: (None, 3))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with pytest.raises(ConfigError, match=r"--sched constant is unknown to timm .*: upgrade it, or take cosine"):
        Schedule(run_args("--sched", "constant"), optimizer, steps_per_epoch=3)
    Schedule(run_args("--sched", "none"), optimizer, steps_per_epoch=3)
