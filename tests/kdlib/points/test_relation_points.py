"""What every point on relations in a batch has to keep: any shape, equal rows, half precision, no teacher gradient."""

from functools import partial

import pytest
import torch

import kdlib
from kdlib.points.correlation import Correlation
from kdlib.points.pkt import Pkt
from kdlib.points.rkd import Rkd
from kdlib.points.similarity_preserving import SimilarityPreserving
from kdlib.settings import read_signature, validated
from kdlib.testing import check_point

KINDS = {"rkd": Rkd, "pkt": Pkt, "similarity_preserving": SimilarityPreserving, "correlation": Correlation}
POINTS = {
    **KINDS,
    "rkd of unit rows": partial(Rkd, normalise=True),
    "rkd of distances": partial(Rkd, angle=0.0),
    "rkd of angles": partial(Rkd, distance=0.0),
    "pkt of the paper": partial(Pkt, variant="paper"),
    "bilinear correlation": partial(Correlation, kernel="bilinear"),
}

every_point = pytest.mark.parametrize("name", POINTS)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss(name, student, teacher, **settings):
    return POINTS[name](**settings)({"embedding": student}, {"embedding": teacher}, {})


def gradient(name, student, teacher):
    student = student.detach().clone().requires_grad_()
    loss(name, student, teacher).backward()
    return student.grad


def rotation(width):
    return torch.linalg.qr(noise(width, width, seed=9)).Q


@every_point
def test_it_is_a_point(name):
    check_point(POINTS[name]())
    maps = {"embedding": noise(4, 3, 2, 2).float()}, {"embedding": noise(4, 5, 3, seed=1).float()}
    check_point(POINTS[name](), student=maps[0], teacher=maps[1], batch={})


@every_point
def test_gradcheck_in_float64(name):
    teacher = 2 * noise(5, 3, seed=1)
    assert torch.autograd.gradcheck(lambda rows: loss(name, rows, teacher), (noise(5, 4).requires_grad_(),))


@every_point
def test_the_order_of_the_rows_does_not_matter(name):
    student, teacher, order = noise(6, 5), noise(6, 5, seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
    expected = loss(name, student, teacher)
    torch.testing.assert_close(loss(name, student[order], teacher[order]), expected, rtol=1e-12, atol=1e-12)
    assert loss(name, student[order], teacher) != expected


@every_point
def test_a_rotation_of_either_side_does_not_matter(name):
    student, teacher = noise(6, 5), noise(6, 4, seed=1)
    turned = loss(name, student @ rotation(5), teacher @ rotation(4))
    torch.testing.assert_close(turned, loss(name, student, teacher), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [name for name in POINTS if name != "bilinear correlation"])
def test_the_scale_of_either_side_does_not_matter(name):
    student, teacher = noise(6, 5), noise(6, 4, seed=1)
    torch.testing.assert_close(loss(name, 3 * student, teacher / 7), loss(name, student, teacher), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["pkt", "pkt of the paper", "correlation", "rkd of unit rows"])
def test_the_scale_of_a_row_does_not_matter(name):
    student, teacher, scales = noise(6, 5), noise(6, 4, seed=1), torch.arange(1.0, 7.0)[:, None]
    torch.testing.assert_close(loss(name, scales * student, teacher), loss(name, student, teacher), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["rkd", "rkd of distances", "rkd of angles"])
def test_a_shift_does_not_matter(name):
    student, teacher = noise(6, 5), noise(6, 4, seed=1)
    torch.testing.assert_close(loss(name, student + 2, teacher - 1), loss(name, student, teacher), rtol=1e-9, atol=0)


@every_point
def test_equal_relations_cost_nothing(name):
    rows = noise(6, 5)
    assert abs(loss(name, rows, rows @ rotation(5)).item()) < 1e-12
    assert loss(name, rows, noise(6, 5, seed=1)).item() > 1e-6


@every_point
def test_taps_of_any_shape_are_flattened(name):
    student, teacher = noise(4, 3, 2, 2), noise(4, 7, seed=1)
    expected = loss(name, student.flatten(1), teacher)
    assert torch.equal(loss(name, student, teacher), expected)
    assert torch.equal(loss(name, student.to(memory_format=torch.channels_last), teacher), expected)
    assert loss(name, noise(4), teacher).isfinite()  # one number a row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e4, -1e4, -400.0])
@every_point
def test_extreme_taps_keep_loss_and_gradient_finite(name, scale, dtype):
    extreme, other = torch.zeros(4, 6, dtype=dtype), torch.zeros(4, 6, dtype=dtype)
    extreme[0, 0], extreme[1, 1] = scale, -scale
    other[2] = scale
    for student, teacher in ((extreme, other), (other, extreme), (extreme, extreme)):
        assert loss(name, student, teacher).isfinite()
        assert gradient(name, student, teacher).float().isnan().sum() == 0
        assert gradient(name, student.float(), teacher).isfinite().all()


@every_point
def test_equal_rows_and_rows_of_zeros_give_no_nan(name):
    plain = noise(5, 6, dtype=torch.float32)
    equal, zero = plain[:1].expand(5, 6), torch.zeros(5, 6)
    double = torch.cat([plain[:1], plain[:4]])
    for student in (equal, zero, double, plain):
        for teacher in (equal, zero, double, plain):
            assert loss(name, student, teacher).isfinite()
            found = gradient(name, student, teacher)
            assert found.isfinite().all()
            assert found.abs().max() < 1e4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_point
def test_half_precision_taps_give_the_float_loss_of_the_same_numbers(name, dtype):
    student, teacher = noise(8, 16).to(dtype), noise(8, 12, seed=1).to(dtype)
    expected = loss(name, student.double(), teacher.double()).item()
    found = loss(name, student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert gradient(name, student, teacher).dtype == dtype


@every_point
def test_autocast_changes_nothing(name):
    student, teacher = noise(8, 16).float(), noise(8, 12, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(name, student, teacher)
    assert torch.equal(inside, loss(name, student, teacher))


@every_point
def test_the_teacher_gets_no_gradient(name):
    student, teacher = noise(4, 5).requires_grad_(), noise(4, 5, seed=1).requires_grad_()
    loss(name, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["pkt", "pkt of the paper", "similarity_preserving", "correlation"])
def test_one_row_has_no_relation_and_gives_zero(name):
    student, teacher = noise(1, 5), noise(1, 5, seed=1)
    assert abs(loss(name, student, teacher).item()) < 1e-15
    assert gradient(name, student, teacher).abs().max() < 1e-12


@every_point
def test_unequal_numbers_of_rows_name_both_sides(name):
    with pytest.raises(kdlib.TapError, match=r"\(4, 3\).*\(5, 3\)"):
        loss(name, noise(4, 3), noise(5, 3))
    with pytest.raises(kdlib.TapError):
        loss(name, torch.tensor(1.0), torch.tensor(1.0))


@every_point
def test_the_teachers_tap_is_the_students_unless_named(name):
    student, teacher = noise(4, 4), noise(4, 4, seed=1)
    expected = loss(name, student, teacher)
    assert POINTS[name](tap="a")({"a": student, "embedding": teacher}, {"a": teacher}, {}) == expected
    assert POINTS[name](tap="a", teacher_tap="b")({"a": student}, {"a": student, "b": teacher}, {}) == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_can_write_it_down(name):
    live, settings = read_signature("point", name, KINDS[name])
    assert live == ()
    point = KINDS[name]()
    for setting, value in settings():
        assert getattr(point, setting) == (value if setting != "teacher_tap" else point.tap)
    for bad in ({"distance": -1.0}, {"variant": "other"}, {"kernel": "cosine"}, {"gamma": 0.0}, {"order": 0}):
        with pytest.raises(kdlib.RecipeError):
            validated(settings, bad, "points.p")
