"""The benchmark: what it compares is the same training, and its clock counts the steps that it should."""

import pytest
import torch

import kdlib.bench
from kdlib.bench import Batches, Net, Ratio, Size, Trained, alternated, bench, by_hand, distilled, made, tapped
from kdlib.cli import main

SMALL = Size(Net, 32, 16, warm=2, steps=8)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("asks_for_more", [True, False])
def test_the_clock_counts_the_steps_after_those_that_warm_up(monkeypatch, warm, asks_for_more):
    now = 0
    monkeypatch.setattr(kdlib.bench.time, "process_time", lambda: now)
    batches = Batches(["a", "b", "c", "d", "e"], warm)
    steps = [1, 10, 100, 1000, 10000]
    source = iter(batches)
    for step, name in zip(steps, "abcde", strict=True):
        assert next(source) == name
        now += step
    if asks_for_more:
        assert next(source, None) is None
    timed = steps[warm:] if asks_for_more else steps[warm:-1]  # a loop's end may be anything, if it does not say so
    assert (batches.steps, batches.seconds) == (len(timed), sum(timed))


def test_a_ratio_is_taken_round_by_round():
    ratio = Ratio.of([2.0, 9.0, 30.0], [1.0, 3.0, 5.0])
    assert ratio == (3.0, 2.0, 6.0)
    assert str(ratio) == "3.000 (2.000 to 6.000)"


def test_loops_take_turns_and_the_first_round_is_not_counted():
    turns = []

    def loop(name):
        turns.append(name)
        return float(len(turns))

    times = alternated({"one": lambda: loop("one"), "other": lambda: loop("other")}, rounds=2)
    assert turns == ["one", "other"] * 3
    assert times == {"one": [3.0, 5.0], "other": [4.0, 6.0]}


def test_the_distiller_ends_where_the_loop_by_hand_ends_each_time():
    teacher, student, _, batches = made(SMALL)
    hand, ours = (
        Trained(by_hand, teacher, student, batches, 2),
        Trained(distilled, tapped(teacher), student, batches, 2),
    )
    for _ in range(2):
        assert hand() > 0
        assert ours() > 0
        assert ours.differs(hand) <= 1e-6
    assert any(not torch.equal(value, hand.start[name]) for name, value in hand.end.items())
    assert not any(module._forward_hooks for module in student.modules())  # the loop by hand must not pay for hooks


def test_a_loop_that_trains_something_else_is_seen():
    teacher, student, _, batches = made(SMALL)
    hand, other = (Trained(by_hand, teacher, student, rows, 2) for rows in (batches, batches[:-1]))
    hand()
    other()
    assert other.differs(hand) > 1e-4


def test_every_figure_is_of_the_same_training_as_by_hand():
    before = torch.get_rng_state()
    figures = list(bench(rounds=1))
    assert [(one.network, one.what, one.beside) for one in figures] == [
        (network, *titles)
        for network in ("tiny", "images")
        for titles in (
            ("teacher online", "same by hand"),
            ("teacher online", "student alone"),
            ("stored labels", "student alone"),
        )
    ]
    for one in figures:
        assert one.difference <= 1e-6
        assert 0 < one.ratio.least <= one.ratio.median <= one.ratio.largest
        assert one.step > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", kdlib.bench.SIZES.values(), ids=kdlib.bench.SIZES)
def test_the_networks_give_the_taps_that_are_compared(size):
    teacher, student, part, batches = made(size)
    wanted, taps = teacher(batches[0]["x"]), student(batches[0]["x"])
    assert {name: tap.shape for name, tap in wanted.items()} == {name: tap.shape for name, tap in taps.items()}
    assert len(part) == sum(len(batch["x"]) for batch in batches)


def test_the_command_prints_a_line_a_figure(monkeypatch, capsys):
    monkeypatch.setattr(kdlib.bench, "SIZES", {"small": SMALL})
    monkeypatch.setattr("sys.argv", ["kdlib", "bench", "--rounds", "2"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert [text.count(title) for title in ("small", "teacher online", "stored labels", "by hand")] == [1, 2, 1, 2]
    assert "2 rounds" in text
