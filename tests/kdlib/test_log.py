"""The epoch table, the step log and the bar, as functions of events."""

import csv
import io
import json
import re

import pytest
import rich
import torch
from rich.console import Console

import kdlib
from kdlib.log import csv_log, jsonl_log, progress_bar


def event(kind, step=1, epoch=0, total=1.5, terms=None, record=None):
    terms = {"hard": 0.5, "soft": 1.0} if terms is None else terms
    losses = kdlib.Losses(torch.tensor(total), {name: torch.tensor(value) for name, value in terms.items()})
    return kdlib.Event(kind, step, epoch, losses, None, {} if record is None else record)


def table(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_csv_has_one_line_an_epoch_with_the_records_numbers(tmp_path):
    write = csv_log(tmp_path)
    for epoch in range(3):
        write(event("step"))
        write(event("epoch", record={"epoch": epoch, "step": 4 * (epoch + 1), "total": 0.1 / (epoch + 1)}))
        assert len(table(tmp_path)) == epoch + 1  # readable while it runs
    write(event("end"))
    rows = table(tmp_path)
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(0, 4), (1, 8), (2, 12)]
    assert [float(row["total"]) for row in rows] == [0.1, 0.05, 0.1 / 3]  # no digit lost


def test_csv_keeps_a_term_that_comes_later_or_stays_away(tmp_path):
    write = csv_log(tmp_path)
    write(event("epoch", record={"epoch": 0, "hard": 1.0}))
    write(event("epoch", record={"epoch": 1, "hard": 2.0, "soft": 3.0}))
    write(event("epoch", record={"epoch": 2, "soft": 4.0}))
    rows = table(tmp_path)
    assert [row["hard"] for row in rows] == ["1.0", "2.0", ""]
    assert [row["soft"] for row in rows] == ["", "3.0", "4.0"]


def test_jsonl_has_one_line_a_step_with_total_and_terms(tmp_path):
    write = jsonl_log(tmp_path)
    for step in range(1, 4):
        write(event("step", step, epoch=step // 3, total=step / 4, record={"lr": 0.1 * step}))
    write(event("epoch", record={"epoch": 0}))
    assert len(lines(tmp_path)) == 3  # readable after each epoch
    write(event("end"))
    found = lines(tmp_path)
    assert [(line["step"], line["epoch"], line["total"], line["lr"]) for line in found] == [
        (1, 0, 0.25, 0.1),
        (2, 0, 0.5, 0.2),
        (3, 1, 0.75, 0.1 * 3),
    ]
    assert found[0]["terms"] == {"hard": 0.5, "soft": 1.0}


def test_the_bar_shows_terms_and_takes_no_random_number(capsys):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with progress_bar(3, "student") as show:
        for step in range(1, 4):
            show(event("step", step, record={"lr": 1e-3}))
        show(event("epoch", record={"epoch": 0, "waiting": 0.25}))
        show(event("end"))
    assert torch.equal(torch.get_rng_state(), before)
    capsys.readouterr()


def test_an_event_is_a_tuple_of_what_the_documents_name():
    assert kdlib.Event._fields[:5] == ("kind", "step", "epoch", "losses", "distiller")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_training_leaves_one_line_with_its_title(monkeypatch, terminal):
    seen = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    monkeypatch.setattr(rich, "_console", seen)
    data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
    net = kdlib.Tapped(torch.nn.Linear(4, 2), logits="")
    history = kdlib.fit(kdlib.Distiller(net, hard=kdlib.HardLabels()), data, epochs=3, batch=10, progress="mine [x]")
    text = seen.file.getvalue()
    last = history.epochs[-1]
    line = rf"mine \[x\]: 3 epochs, 6 steps, \d+\.\d s, hard {last['hard']:.4g} in the last, "
    line += rf"{100 * last['waiting']:.0f} % of it waiting for data\n"
    assert re.search(line, text)
    if not terminal:
        assert re.fullmatch(line, text)
