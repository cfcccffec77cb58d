"""Batches, and messages for one that lacks something."""

from types import MappingProxyType

import pytest
import torch
from torch import nn

import kdlib
from kdlib.batch import call


def test_a_pair_becomes_a_mapping():
    x, y = torch.zeros(2, 4), torch.tensor([0, 1])
    for pair in ((x, y), [x, y]):
        batch = kdlib.as_batch(pair)
        assert list(batch) == ["x", "y"]
        assert batch["x"] is x
        assert batch["y"] is y


def test_any_mapping_stays_the_same_object():
    for batch in ({"x": 1}, MappingProxyType({"x": 1, "y": 2, "partners": 3})):
        assert kdlib.as_batch(batch) is batch


@pytest.mark.parametrize("wrong", [(1, 2, 3), (1,), torch.zeros(2, 4), "xy", None])
def test_anything_else_is_refused_by_type(wrong):
    with pytest.raises(kdlib.BatchError, match=type(wrong).__name__):
        kdlib.as_batch(wrong)


def distiller(point, source=None):
    net = nn.Linear(4, 3)
    return kdlib.Distiller(kdlib.Tapped(net, logits="", embedding=""), source, pull=point)


def test_a_missing_key_names_the_point_that_wants_it_and_what_there_is():
    with pytest.raises(kdlib.BatchError, match=r"(?s)'pull'.*'y'.*\bx\b"):
        distiller(lambda student, teacher, batch: batch["y"].sum())({"x": torch.zeros(2, 4), "index": 0})


def test_a_missing_key_names_the_source_that_wants_it():
    def source(batch):
        return {"logits": batch["partners"]}

    with pytest.raises(kdlib.BatchError, match=r"(?si)source.*'partners'.*\bx\b"):
        distiller(kdlib.SoftLabels(), source)({"x": torch.zeros(2, 4)})


def test_a_batch_without_x_is_an_error_of_the_batch():
    with pytest.raises(kdlib.BatchError, match=r"'x'.*inputs"):
        distiller(kdlib.HardLabels())({"inputs": torch.zeros(2, 4), "y": torch.zeros(2, dtype=torch.int64)})


def test_a_missing_tap_names_point_side_and_the_taps_there_are():
    for side, names in (("student", "embedding, logits"), ("teacher", "none")):

        def point(student, teacher, batch, side=side):
            return {"student": student, "teacher": teacher}[side]["logit"].sum()

        with pytest.raises(kdlib.TapError, match=rf"(?s)'pull'.*{side}.*'logit'.*{names}"):
            distiller(point)({"x": torch.zeros(2, 4)})


def test_a_missing_tap_suggests_a_near_name():
    with pytest.raises(kdlib.TapError, match=r"Did you mean 'logits'\?"):
        distiller(lambda student, teacher, batch: student["logit"].sum())({"x": torch.zeros(2, 4)})


def test_optional_keys_can_be_asked_for():
    def point(student, teacher, batch):
        assert batch.get("mask") is None
        assert "mask" not in batch
        return student["logits"].sum()

    assert distiller(point)({"x": torch.zeros(2, 4)}).total.isfinite()


def test_unequal_shapes_are_both_named():
    kdlib.same_shape(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(kdlib.TapError, match=r"student.*\(2, 3\).*teacher.*\(2, 4\)"):
        kdlib.same_shape(torch.zeros(2, 3), torch.zeros(2, 4))


def test_shapes_that_broadcast_are_unequal():
    with pytest.raises(kdlib.TapError):
        kdlib.same_shape(torch.zeros(2, 3), torch.zeros(1, 3))


def test_x_may_be_a_tensor_a_tuple_or_a_mapping():
    def model(left, right=1):
        return left - right

    assert call(model, 5) == 4
    assert call(model, (5, 2)) == 3
    assert call(model, [5, 2]) == 3
    assert call(model, {"right": 5, "left": 2}) == -3


def test_every_error_is_a_kdlib_error():
    for error in (kdlib.BatchError, kdlib.DataError, kdlib.PluginError, kdlib.RecipeError, kdlib.TapError):
        assert issubclass(error, kdlib.KdlibError)
    assert issubclass(kdlib.TrainingError, kdlib.KdlibError)
