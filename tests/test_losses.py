"""Losses against their formulas, and which one a recipe gets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

from helpers import run_args
from losses import BinaryCrossEntropy, CosubLoss, CrossEntropy, DistillationLoss, build_criterion

B, C = 6, 5


@pytest.fixture
def logits():
    return torch.randn(B, C, generator=torch.Generator().manual_seed(0), requires_grad=True)


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


class Teacher(nn.Module):
    """Says the same whatever it sees."""

    def __init__(self, answer):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, images):
        return self.answer


def test_cross_entropy_is_minus_log_of_the_labels_share(logits):
    shares = logits.softmax(dim=1)[torch.arange(B), LABELS]
    torch.testing.assert_close(CrossEntropy()(logits, LABELS), -shares.log().mean())


def test_smoothing_spreads_a_share_over_all_classes(logits):
    soft = 0.9 * F.one_hot(LABELS, C) + 0.1 / C
    torch.testing.assert_close(CrossEntropy(0.1)(logits, LABELS), CrossEntropy()(logits, soft))
    torch.testing.assert_close(CrossEntropy()(logits, soft), -(soft * logits.log_softmax(1)).sum(1).mean())


def test_bce_asks_one_question_per_class(logits):
    answers = F.one_hot(LABELS, C).double()
    p = logits.double().sigmoid()
    expected = -(answers * p.log() + (1 - answers) * (1 - p).log()).mean()
    torch.testing.assert_close(BinaryCrossEntropy()(logits, LABELS).double(), expected, rtol=1e-6, atol=1e-6)


def test_bce_does_not_take_smoothing_for_an_answer(logits):
    """Mixup gives every class smoothing / C; only the two mixed labels are a yes."""
    mixed = torch.full((B, C), 0.1 / C)
    mixed[:, 1] += 0.9 * 0.3
    mixed[:, 2] += 0.9 * 0.7
    yes = torch.zeros(B, C)
    yes[:, 1:3] = 1.0
    found = BinaryCrossEntropy(floor=0.1 / C)(logits, mixed)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, yes))


@pytest.mark.parametrize("num_classes", [7, 1000])
def test_bce_is_not_misled_by_the_rounding_of_mixed_targets(num_classes):
    """The floor times lambda and times the rest add up to a little more than the floor, at some lambdas."""
    mixup, labels, smoothing = Mixup(mixup_alpha=0.8, num_classes=num_classes), torch.tensor([0, 1]), 0.1
    np.random.seed(0)
    floor, above, logits = smoothing / num_classes, 0, torch.zeros(2, num_classes)
    logits[:, 2:] = -50.0  # a yes to any class but the two costs 50
    for _ in range(200):
        _, mixed = mixup(torch.zeros(2, 3, 4, 4), labels)
        above += bool((mixed[:, 2:] > floor).any())
        assert BinaryCrossEntropy(floor)(logits, mixed) <= 1
    assert above  # the case does arise


def test_cosub_is_symmetric_and_the_taught_half_takes_no_gradient_as_teacher(logits):
    first, second = logits, logits.detach().flip(0).requires_grad_()
    loss = CosubLoss()(torch.cat([first, second]), LABELS)
    torch.testing.assert_close(loss, CosubLoss()(torch.cat([second, first]), LABELS))
    loss.backward()
    target = 0.25 * (F.one_hot(LABELS, C) + second.detach().sigmoid())
    expected = (0.5 * first.detach().sigmoid() - target) / (B * C)
    torch.testing.assert_close(first.grad, expected)


def test_hard_distillation_takes_the_teachers_first_choice_as_label(logits):
    teacher = Teacher(torch.eye(C)[[1, 1, 2, 2, 0, 0]])
    loss = DistillationLoss(CrossEntropy(), teacher, "hard", alpha=0.25, tau=1.0)
    found = loss(torch.zeros(B), logits, LABELS)
    choice = torch.tensor([1, 1, 2, 2, 0, 0])
    expected = 0.75 * F.cross_entropy(logits, LABELS) + 0.25 * F.cross_entropy(logits, choice)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert teacher.answer.grad is None


def test_soft_distillation_is_the_divergence_at_a_temperature(logits):
    answer, tau = torch.randn(B, C, generator=torch.Generator().manual_seed(1)), 3.0
    loss = DistillationLoss(CrossEntropy(), Teacher(answer), "soft", alpha=1.0, tau=tau)
    p, q = (answer / tau).softmax(1), (logits / tau).softmax(1)
    expected = tau**2 * (p * (p / q).log()).sum() / (B * C)
    torch.testing.assert_close(loss(torch.zeros(B), logits, LABELS), expected)


def test_a_student_with_a_distillation_token_hears_the_teacher_on_it(logits):
    other = logits.detach().flip(1).requires_grad_()
    loss = DistillationLoss(CrossEntropy(), Teacher(torch.eye(C)[LABELS]), "hard", alpha=0.5, tau=1.0)
    found = loss(torch.zeros(B), (logits, other), LABELS)
    torch.testing.assert_close(found, 0.5 * F.cross_entropy(logits, LABELS) + 0.5 * F.cross_entropy(other, LABELS))


def test_an_unknown_distillation_is_refused():
    with pytest.raises(ValueError, match="'firm' is unknown; take none, soft or hard"):
        DistillationLoss(CrossEntropy(), None, "firm", 0.5, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(logits, dtype):
    half = logits.detach().to(dtype)
    for loss in (CrossEntropy(0.1), BinaryCrossEntropy()):
        torch.testing.assert_close(loss(half, LABELS), loss(half.float(), LABELS), rtol=0, atol=0)
    pair = torch.cat([half, half])
    assert CosubLoss()(pair, LABELS).dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "mixup", "kind", "setting"),
    [
        ([], False, CrossEntropy, 0.1),
        ([], True, CrossEntropy, 0.0),
        (["--bce-loss"], True, BinaryCrossEntropy, 0.1 / C),
        (["--bce-loss"], False, BinaryCrossEntropy, 0.0),
        (["--cosub"], True, CosubLoss, None),
    ],
)
def test_a_recipe_gets_its_loss(flags, mixup, kind, setting):
    base = build_criterion(run_args(*flags), mixup, C).base
    assert type(base) is kind
    assert getattr(base, "smoothing", getattr(base, "floor", None)) == setting


def test_distillation_is_as_the_flags_say():
    teacher = torch.nn.Identity()
    flags = ("--distillation-type", "soft", "--distillation-alpha", "0.3", "--distillation-tau", "2")
    loss = build_criterion(run_args(*flags), False, C, teacher)
    assert (loss.kind, loss.alpha, loss.tau, loss.teacher) == ("soft", 0.3, 2.0, teacher)
