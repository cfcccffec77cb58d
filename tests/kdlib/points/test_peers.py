"""Losses beside those of other libraries, where they are installed: pip install 'kdlib-asc[bench]'."""

import pytest
import torch

from kdlib import points

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, on import

GENERATOR = torch.Generator().manual_seed(7)
STUDENT = torch.randn(8, 10, generator=GENERATOR, dtype=torch.float64)
TEACHER = 2 * torch.randn(8, 10, generator=GENERATOR, dtype=torch.float64)
OURS, THEIRS = (torch.randn(8, 64, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
MAPS = [torch.randn(3, 4, 5, generator=GENERATOR, dtype=torch.float64) for _ in range(4)]


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_textbrewers_cross_entropy_is_hintons_without_the_square_of_the_temperature(temperature):
    losses = pytest.importorskip("textbrewer.losses", reason="TextBrewer is not installed")
    hinton = points.soft_cross_entropy(STUDENT, TEACHER, temperature=temperature, student_temperature=temperature)
    same(losses.kd_ce_loss(STUDENT, TEACHER, temperature) * temperature**2, hinton)


def test_textbrewers_cosine_of_a_hidden_layer_is_ours():
    losses = pytest.importorskip("textbrewer.losses", reason="TextBrewer is not installed")
    same(losses.cos_loss(OURS[:, None], THEIRS[:, None]), points.cosine_distance(OURS, THEIRS))


def test_textbrewers_fsp_is_the_mean_where_ours_and_the_paper_sum():
    losses = pytest.importorskip("textbrewer.losses", reason="TextBrewer is not installed")
    rows = [taps.mT for taps in MAPS]  # theirs have the channels last
    theirs = losses.fsp_loss((rows[0], rows[1]), (rows[2], rows[3]))
    same(theirs * 4 * 4, points.fsp_loss((MAPS[0], MAPS[1]), (MAPS[2], MAPS[3])))


def test_modelopts_default_is_smaller_by_the_number_of_classes():
    distill = pytest.importorskip("modelopt.torch.distill", reason="ModelOpt is not installed")
    kl = points.soft_cross_entropy(STUDENT, TEACHER, temperature=4.0, student_temperature=4.0, form="kl")
    same(distill.LogitsDistillationLoss(temperature=4.0)(STUDENT, TEACHER) * 10, kl)
    same(distill.LogitsDistillationLoss(temperature=4.0, reduction="batchmean")(STUDENT, TEACHER), kl)
