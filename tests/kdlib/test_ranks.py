"""What the processes of one job do together: three of them on this machine, and one alone."""

import os

import pytest
import torch

from kdlib import ranks
from kdlib.errors import DataError, RankError


def caught(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def failing(*which, error=DataError):
    with ranks.together():
        if ranks.rank() in which:
            raise error(f"clip {ranks.rank()} is bad")


def failing_here(which):
    if ranks.rank() == which:
        raise ZeroDivisionError(f"clip {which} is bad")


def on_rank_0_alone():
    if ranks.rank():
        raise AssertionError("called on another rank")
    return {"made": [1, 2]}


def refused():
    raise DataError("disk full")


def counted():
    tensors = [torch.tensor([float(ranks.rank())]), torch.ones(2, 2)]
    ranks.summed(tensors)
    return [tensor.tolist() for tensor in tensors]


def brought_level():
    tensors = [torch.tensor([float(ranks.rank())]), torch.tensor([ranks.rank()]), torch.full((1, 2), ranks.rank() / 3)]
    ranks.level(tensors)
    return [tensor.tolist() for tensor in tensors]


def work(environment, say):
    os.environ |= environment
    torch.set_num_threads(1)
    with ranks.group():
        say(
            {
                "place": (ranks.rank(), ranks.world(), ranks.launched()),
                "one fails": caught(lambda: failing(1)),
                "a fault": caught(lambda: failing(0, error=ZeroDivisionError)),
                "two fail": caught(lambda: failing(2, 1)),
                "none fails": caught(failing),
                "once": ranks.once(on_rank_0_alone),
                "once, refused": caught(lambda: ranks.once(refused)),
                "alone": ranks.once(lambda: (ranks.rank(), ranks.world(), ranks.launched(), ranks.mapped(abs, [-7]))),
                "mapped": ranks.mapped(lambda number: (number, ranks.rank()), range(7)),
                "mapped, a fault": caught(lambda: ranks.mapped(lambda _: failing_here(1), range(3))),
                "level": brought_level(),
                "gathered": ranks.gathered(list("ab")[: ranks.rank()]),
                "collected": [ranks.collected(ranks.dealt(range(number))) for number in (0, 1, 2, 3, 7)],
                "split": [list(ranks.split(range(number))) for number in (0, 1, 2, 7)],
                "summed": counted(),
            }
        )
    assert not ranks.grouped()


def lost(environment, say):
    os.environ |= environment
    try:
        with ranks.group():
            if ranks.rank():
                say(None)
                os._exit(0)  # without a word to the others, as when it is killed
            ranks.gathered([1])
    except RankError as error:
        say(str(error))


@pytest.fixture(scope="module")
def found(launch):
    return launch(work, 3)


def test_each_knows_its_place(found):
    assert [one["place"] for one in found] == [(rank, 3, (rank, 3)) for rank in range(3)]


def test_an_error_of_one_rank_is_its_own_there_and_told_to_the_others(found):
    told = ("RankError", "rank 1: DataError: clip 1 is bad")
    assert [one["one fails"] for one in found] == [told, ("DataError", "clip 1 is bad"), told]
    assert [one["a fault"] for one in found] == [
        ("ZeroDivisionError", "clip 0 is bad"),
        *[("RankError", "rank 0: ZeroDivisionError: clip 0 is bad")] * 2,
    ]


def test_of_several_errors_the_lowest_ranks_is_the_jobs(found):
    told = ("RankError", "rank 1: DataError: clip 1 is bad")
    assert [one["two fail"] for one in found] == [told, ("DataError", "clip 1 is bad"), told]
    assert [one["none fails"] for one in found] == [None] * 3


def test_once_is_done_on_rank_0_and_known_to_all(found):
    assert [one["once"] for one in found] == [{"made": [1, 2]}] * 3
    assert [one["once, refused"] for one in found] == [
        ("DataError", "disk full"),
        *[("RankError", "rank 0: DataError: disk full")] * 2,
    ]


def test_inside_of_once_rank_0_is_a_job_of_its_own(found):
    assert [one["alone"] for one in found] == [(0, 1, (0, 3), [7])] * 3


def test_a_rank_that_is_gone_is_an_error_for_the_others(launch):
    told, _ = launch(lost, 2)
    assert told.startswith("rank 0: another process of the job is gone.")


def test_what_is_mapped_is_computed_once_and_comes_back_in_order(found):
    assert [one["mapped"] for one in found] == [[(number, number % 3) for number in range(7)]] * 3
    told = ("RankError", "rank 1: ZeroDivisionError: clip 1 is bad")
    assert [one["mapped, a fault"] for one in found] == [told, ("ZeroDivisionError", "clip 1 is bad"), told]


def test_tensors_are_brought_level_with_those_of_rank_0(found):
    assert [one["level"] for one in found] == [[[0.0], [0], [[0.0, 0.0]]]] * 3


def test_what_was_dealt_comes_back_in_order_on_every_rank(found):
    for one in found:
        assert one["gathered"] == ["a", "a", "b"]
        assert one["collected"] == [list(range(number)) for number in (0, 1, 2, 3, 7)]


def test_runs_are_disjoint_complete_in_order_and_of_almost_one_length(found):
    for place, number in enumerate((0, 1, 2, 7)):
        runs = [one["split"][place] for one in found]
        assert [item for run in runs for item in run] == list(range(number))
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_sums_are_over_all_ranks(found):
    assert [one["summed"] for one in found] == [[[3.0], [[3.0, 3.0], [3.0, 3.0]]]] * 3


def test_one_process_is_a_job_of_its_own(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with ranks.group():
        assert not ranks.grouped()
        assert (ranks.rank(), ranks.world(), ranks.launched()) == (0, 1, (0, 1))
        assert ranks.once(lambda: 5) == 5
        assert ranks.collected(ranks.dealt("abc")) == ranks.gathered("abc") == ["a", "b", "c"]
        assert ranks.split("abc") == "abc"
        assert counted() == [[0.0], [[1.0, 1.0], [1.0, 1.0]]]
        with pytest.raises(DataError) as error:
            failing(0)
        assert not isinstance(error.value, RankError)
        assert str(error.value) == "clip 0 is bad"
