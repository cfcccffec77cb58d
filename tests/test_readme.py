"""What README shows runs as it stands, and what it says of numbers and files is so."""

import re
import tomllib
from pathlib import Path

import pytest
import soundfile
import torch
from typer.testing import CliRunner

from kdlib.cli import app
from kdlib.recipe import find
from kdlib.registry import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if kind == "console" for line in re.split(r"\n| && ", block.strip())]
CLASSES, PLACES = ("clock", "rain"), 4


def test_the_loop_of_readme_trains_the_student():
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    names = {}
    exec(code, names)
    assert names["losses"].total.isfinite()
    assert int(names["distiller"].step) == 1
    assert names["big"].weight.grad is None


def test_every_link_of_readme_into_the_project_leads_somewhere():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_number_of_points_is_that_of_the_registry():
    own = [one for one in registry().plugins() if one.kind == "point" and one.package in ("kdlib", "asc")]
    assert f"| {len(own)} points |" in README


# The commands, in order, on a small data set. What is longer there is made short by further --set options.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two small data sets in the layout of DCASE 2018, by the names that the commands have."""
    folder = tmp_path_factory.mktemp("readme")
    generator = torch.Generator().manual_seed(0)
    for name, rate, channels, seconds in (("ESC10", 16000, 1, 1.7), ("DCASE", 48000, 2, 10.0)):
        (folder / name / "audio").mkdir(parents=True)
        (folder / name / "evaluation_setup").mkdir()
        rows = {"train": [], "test": []}
        for label in CLASSES:
            for place in range(PLACES):
                clip = f"audio/{label}-oslo-{place}-0-a.wav"
                sound = 0.1 * torch.randn(round(rate * seconds), channels, generator=generator)
                soundfile.write(folder / name / clip, sound.numpy(), rate)
                rows["test" if place == 0 else "train"].append(f"{clip}\t{label}\t{label}-oslo-{place}\ta\n")
        meta = "filename\tscene_label\tidentifier\tsource_label\n"
        (folder / name / "meta.csv").write_text(meta + "".join([*rows["train"], *rows["test"]]))
        for part, kind in (("train", "train"), ("test", "evaluate")):
            listed = ["\t".join(row.split("\t")[:2]) + "\n" for row in rows[part]]
            (folder / name / "evaluation_setup" / f"fold1_{kind}.txt").write_text("".join(listed))
        only = [row.split("\t")[0] + "\n" for row in rows["test"]]
        (folder / name / "evaluation_setup" / "fold1_test.txt").write_text("".join(only))
    return folder


def short(recipe):
    """Return the options that cut every training of a recipe to one epoch, and its data to what the fixture has."""

    def epochs(block, at=""):
        for key, value in block.items():
            if key == "epochs":
                yield f"{at}epochs=1"
            elif isinstance(value, dict):
                yield from epochs(value, f"{at}{key}.")

    changes = list(epochs(tomllib.loads(find(recipe).read_text(encoding="utf-8"))))
    changes += {
        "asc_quick": ["data.places=3", "data.segments=2", "data.seconds=1.7"],
        "asc_esc10": ["data.seconds=1.7"],
        "asc_dcase2018": ["train.batch=2", *(f"systems.{name}.model.width=0.125" for name in ("raw", "spectrogram"))],
    }.get(recipe, [])
    return [part for change in changes for part in ("--set", change)]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of small data sets
def test_every_command_of_readme_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        program, *arguments = command.split()
        if program != "kdlib":
            assert program in ("pip", "pytest", "sphinx-build", "bash"), command  # what .ci/run does
            continue
        if arguments[0] == "run":
            arguments += short(arguments[1])
        if arguments[0] == "predict":
            (arguments[1],) = (folder / "runs" / "asc_esc10").iterdir()
            arguments[2] = next((folder / "ESC10" / "audio").iterdir())
        done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
        assert done.exit_code == 0, f"{command}\n{done.output}"
