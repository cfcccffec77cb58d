"""The command ``kdlib``."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdlib import ranks, signals
from kdlib.errors import DataError, KdlibError, PluginError, RankError, did_you_mean, printable
from kdlib.progress import silent
from kdlib.registry import register, registry
from kdlib.words import in_words

MEANING = {
    "without": "the teacher, trained on hard labels",
    "continued": "the control: from the teacher, as many updates as the student, on hard labels",
    "alone": "the control: the student's network and updates, on hard labels",
    "with": "the student, trained by the points of the recipe",
}

app = typer.Typer(
    help="Knowledge distillation from recipes: train a teacher, distil a student, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look a data set over, or make one.", no_args_is_help=True)
app.add_typer(data_app, name="data")
store_app = typer.Typer(help="Build, show or verify a store of a teacher's soft labels.", no_args_is_help=True)
app.add_typer(store_app, name="store")
console = Console()
errors = Console(stderr=True)

RECIPE_HELP = "A recipe that comes with kdlib, or the path of a TOML or JSON file."
RecipeName = Annotated[str, typer.Argument(help=RECIPE_HELP)]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. train.epochs=5.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. rate=16000.")
]
Modules = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="MODULE", help="Register a module that can be imported.")
]


@app.command("run")
def run_command(
    recipe: Annotated[str | None, typer.Argument(help=f"{RECIPE_HELP} Not needed with --resume.")] = None,
    changes: Changes = None,
    plugins: Modules = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make. Default: runs/NAME/TIME-DIGEST.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Go on with a run that was interrupted.")
    ] = None,
    every: Annotated[
        int | None, typer.Option("--save-every", metavar="STEPS", min=1, help="Default: save after each epoch.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on though recipe, data or versions differ.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost on this machine.")] = False,
) -> None:
    """Run a recipe: train, distil, score, and show the rows. Runs under torchrun, too."""
    from kdlib.recipe import read
    from kdlib.run import run

    _register(plugins)
    if recipe is None and resume is None:
        raise KdlibError("Name a recipe, or a run to go on with: --resume FOLDER.")
    if force and resume is None:
        raise KdlibError("--force is for --resume FOLDER.")
    named = recipe if recipe is not None else f"{resume}/recipe.json"
    if dry:
        if ranks.launched()[0] == 0:
            _show_cost_of(read(named, changes))
        return
    with _exit_by_signal(), ranks.group(), silent(ranks.rank() > 0, console):
        with ranks.together():
            wanted = read(named, changes)
        ranks.once(_refuse_wrong, wanted)
        say = (lambda _: None) if quiet else _print
        folder = run(wanted, out, progress=not quiet, say=say, every=every, resume=resume, force=force)
        if ranks.rank() == 0:
            _show_result(folder)


@app.command("check")
def check_command(recipe: RecipeName, changes: Changes = None, plugins: Modules = None) -> None:
    """Look a recipe over on one batch of its data, without training."""
    from kdlib.checking import check
    from kdlib.recipe import read

    _register(plugins)
    good = True
    for title, report in check(read(recipe, changes)):
        console.print(f"[bold]{title}[/bold]")
        _print(str(report))
        good = good and bool(report)
    if not good:
        raise KdlibError("Something is wrong; see the lines above.")


@app.command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    files: Annotated[list[Path], typer.Argument(help="Files to classify, of any length.")],
    fold: Annotated[str | None, typer.Option(help="Of which fold. Default: the only one.")] = None,
    system: Annotated[str | None, typer.Option(help="Of which system. Default: the fusion, or the only one.")] = None,
    changes: Changes = None,
    plugins: Modules = None,
    as_json: Annotated[bool, typer.Option("--json", help="All scores, one line a file, for programs.")] = False,
) -> None:
    """Classify files with the students of a finished run: class and highest scores of each."""
    from kdlib.predict import predict
    from kdlib.progress import track
    from kdlib.survey import listed, reason_of

    _register(plugins)
    bad = {}
    found = predict(run, files, fold=fold, system=system, changes=changes)
    for file, scores in track(found, "files", len(files)):
        if isinstance(scores, KdlibError):
            bad[str(file)] = reason_of(str(file), scores)
        elif as_json:
            typer.echo(json.dumps({"file": str(file), "class": next(iter(scores)), "scores": scores}))
        else:
            best = ", ".join(f"{name} {value:.3g}" for name, value in list(scores.items())[:3])
            _print(f"{file}: {next(iter(scores))}  ({best}{', ...' if len(scores) > 3 else ''})")
    if len(bad) == 1:
        raise KdlibError("".join(f"{file}: {reason}" for file, reason in bad.items()))
    if bad:
        raise KdlibError("\n".join([f"{len(bad)} of {len(files)} files cannot be read:", *listed(bad)]))


@app.command("figures")
def figures_command(run: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Draw the confusion matrices and training curves of a finished run anew, into its folder."""
    from kdlib import figures
    from kdlib.run import read_result

    result, missing = read_result(run, ("name", "rows", "classes")), figures.missing()
    if missing is not None:
        raise KdlibError(missing)
    figures.draw(run, result)
    _list_pictures(run)


@data_app.command("check")
def data_check_command(
    root: Annotated[Path, typer.Argument(help="The folder of the data set.")],
    kind: Annotated[str, typer.Option(help="A registered data set that reads a folder.")] = "dcase",
    changes: Settings = None,
    plugins: Modules = None,
) -> None:
    """Read a whole data set, every fold and every clip, and list all that is wrong with it."""
    from kdlib.survey import survey

    _register(plugins)
    found = survey(kind, {"root": str(root.absolute())}, changes)
    _print(str(found))
    if not found:
        raise KdlibError("Something is wrong; see the lines above.")


@data_app.command("make")
def data_make_command(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    kind: Annotated[str, typer.Option(help="A registered data set that can be written.")] = "synthetic_scenes",
    changes: Settings = None,
    plugins: Modules = None,
) -> None:
    """Write a data set that is made, not recorded, into a new folder."""
    from kdlib.making import make

    _register(plugins)
    make(folder, kind, changes)
    _print(f"Everything is in {folder}")


@store_app.command("build")
def store_build_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, whose teacher labels.")],
    out: Annotated[Path, typer.Argument(help="The folder of the store; one that is not finished is finished.")],
    system: Annotated[str | None, typer.Option(help="Of which system. Default: the only one.")] = None,
    views: Annotated[int, typer.Option(min=0, help="Epochs to draw; as many as the student trains, for all.")] = 1,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="float16 takes half the room.")] = "float32",
    batch: Annotated[int | None, typer.Option(min=1, help="Clips at once. Default: as the teacher's training.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as the teacher's training.")] = None,
    changes: Changes = None,
    plugins: Modules = None,
) -> None:
    """Store the soft labels of a run's teacher, as the run's source makes them. Runs under torchrun, too."""
    from kdlib.storing import store_run

    _register(plugins)
    with ranks.group(), silent(ranks.rank() > 0, console):
        for store in store_run(
            run, out, system=system, views=views, dtype=dtype, batch=batch, threads=threads, changes=changes
        ):
            _show_store(store)


@store_app.command("info")
def store_info_command(
    folder: Annotated[Path, typer.Argument(help="The folder of a store, or of several.")],
    as_json: Annotated[bool, typer.Option("--json", help="All that it is made of, for programs.")] = False,
) -> None:
    """Say what stored soft labels are made of, and how large they are."""
    from kdlib.sources.stored import open_stores

    stores = open_stores(folder)
    if as_json:
        typer.echo(json.dumps({str(store.folder): store.manifest.model_dump() for store in stores}, indent=2))
        return
    for store in stores:
        _show_store(store)


@store_app.command("verify")
def store_verify_command(folder: Annotated[Path, typer.Argument(help="The folder of a store, or of several.")]) -> None:
    """Read every shard of stored soft labels and compare it with its checksum."""
    from kdlib.progress import track
    from kdlib.sources.stored import open_stores

    bad = []
    stores = open_stores(folder)
    shards = [(store, shard) for store in stores for shard in store.finished()]
    for store, shard in track(shards, "shards"):
        try:
            store.check(shard)
        except KdlibError as error:
            bad.append(str(error))
    if bad:
        bad.insert(0, f"{len(bad)} of {len(shards)} shards:")
    for store in stores:
        missing = store.shards - len(store.finished())
        if missing:
            bad.append(f"{store.folder}: not finished: {missing} of {store.shards} shards are missing.")
    if bad:
        raise KdlibError("\n".join(bad))
    _print(f"{len(shards)} shards, all as they were written")


@app.command("plugins")
def plugins_command(
    name: Annotated[str | None, typer.Argument(help="Show this one: what it does, and its settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    plugins: Modules = None,
) -> None:
    """List what is registered, by whom, and what is broken."""
    _register(plugins)
    known = registry()
    if name is not None:
        _describe(name)
        return
    if as_json:
        listed: list[dict[str, Any]] = [
            {"kind": one.kind, "name": one.name, "plugin": one.package, "settings": one.settings.model_json_schema()}
            for one in known.plugins()
        ]
        clashes = [{"kind": kind, "name": name, "plugins": by} for kind, name, by in known.clashes()]
        typer.echo(json.dumps({"plugins": listed, "broken": known.broken, "clashes": clashes}, indent=2))
        return
    table = Table("kind", "name", "plugin", "what")
    for one in known.plugins():
        table.add_row(one.kind, one.name, one.package, escape((one.build.__doc__ or "").strip().partition("\n")[0]))
    console.print(table)
    for kind, name, packages in known.clashes():
        _print(f"clash: the {kind} '{name}' is claimed by {' and '.join(packages)}; neither is used")
    for name, reason in known.broken.items():
        _print(f"broken: {name}: {reason}")


@app.command("bench")
def bench_command(
    rounds: Annotated[int, typer.Option(min=1, help="How often the loops take turns.")] = 15,
) -> None:
    """Measure what distilling costs here: a step of kdlib beside the same by hand, and beside the student alone."""
    import torch

    from kdlib.bench import bench

    table = Table("network", "kdlib's step", "beside", caption_justify="left", pad_edge=False)
    for column in ("ms", "ratio", "range", "weights"):
        table.add_column(column, justify="right")
    before = ""
    for one in bench(rounds):
        if before not in ("", one.network):
            table.add_section()
        median, least, largest = (f"{value:.2f}" for value in one.ratio)
        numbers = (f"{1e3 * one.step:.2f}", median, f"{least}-{largest}", f"{one.difference:.1g}")
        table.add_row(one.network if one.network != before else "", one.what, one.beside, *numbers)
        before = one.network
    table.caption = (
        f"One thread, process time, {rounds} rounds in which the loops take turns, torch {torch.__version__}. ms: the "
        "step beside it. weights: the largest difference at the end from the distillation by hand."
    )
    console.print(table)


@app.command("doctor")
def doctor_command(
    folder: Annotated[Path, typer.Option(help="Where a cache of features would lie.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="The machine, for programs.")] = False,
) -> None:
    """Say what this machine has for training, and what to do to make it faster: one line each to copy."""
    from kdlib.doctor import advise, describe

    machine = describe(folder)
    if as_json:
        typer.echo(json.dumps(machine, indent=2))
        return
    found = advise(machine)
    width = max(len(one.about) for one in found)
    for one in found:
        _print(f"{one.about:{width}}  {one.found}")
        if one.why:
            _print(f"{'':{width}}  {one.why}:\n{'':{width}}  {one.line}")


@app.command("new-plugin")
def new_plugin_command(
    name: Annotated[str, typer.Argument(help="The package's name, for example kdlib-my-loss.")],
    parent: Annotated[Path, typer.Option(help="Where its folder is made.")] = Path(),
) -> None:
    """Write a plugin package with one point, its test and its CI, to start your own from."""
    from kdlib.scaffold import new_plugin

    folder = new_plugin(name, parent)
    _print(f"Everything is in {folder}. Next: cd {folder} && pip install -e '.[test]' && pytest")


@app.command("schema")
def schema_command(plugins: Modules = None) -> None:
    """Print the JSON schema of recipes over everything that is registered."""
    from kdlib.schema import schema

    _register(plugins)
    typer.echo(json.dumps(schema(), indent=2))


@app.command("recipes")
def recipes_command(
    name: Annotated[str | None, typer.Argument(help="Print this one, to start your own from.")] = None,
    plugins: Modules = None,
) -> None:
    """List the recipes that come along, or print one."""
    from kdlib.recipe import find, shipped, text_of

    _register(plugins)
    if name is not None:
        typer.echo(text_of(find(name)), nl=False)
        return
    table = Table("recipe", "what")
    for known, path in shipped().items():
        table.add_row(known, escape(text_of(path).partition("\n")[0].removeprefix("# ")))
    console.print(table)


def _list_pictures(folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"), key=lambda path: (len(path.parts), path.parent, path.stem))
    names = [path.relative_to(folder).as_posix() for path in paths]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    if names:
        _print(f"Pictures: {', '.join(names[:8])}{more}")


def _show_store(store: Any) -> None:
    from kdlib.sources.stored import ERROR, teachers_of, views_of
    from kdlib.storing import rounding

    made_of = store.manifest.made_of
    views, data, source = made_of["views"], made_of["data"], made_of["source"]
    finished = store.finished()
    size = len(finished) and sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    drawn = f"{views} epochs and one view without augmentation" if views else "one view, without augmentation"
    settings = ", ".join(f"{name} {value}" for name, value in source["settings"].items())
    _print(f"{store.folder}")
    _print(f"  source: {source['class']}{f' ({settings})' if settings else ''}")
    for teacher in teachers_of(source):
        _print(f"  teacher: {teacher['class']}, weights {teacher['state'][:16]}")
    _print(f"  data: {data['rows']} rows, {len(data['classes'] or ())} classes, items {data['items'][:16]}")
    _print(f"  views: {drawn}" + ("" if made_of["changes"] else "; nothing changes from epoch to epoch"))
    taps = {name: form for name, form in store.manifest.arrays.items() if name != ERROR}
    worst = rounding(store) if len(finished) == store.shards else {}
    for name, form in taps.items():
        error = f", at most {worst[name]:.2g} from what was computed" if name in worst else ""
        _print(f"  tap {name}: {form.dtype} {form.shape}{error}")
    rows = data["rows"] * views_of(store)
    _print(f"  {len(finished)} of {store.shards} shards written, {rows} rows in all, {size:,} bytes")


def _refuse_wrong(recipe: Any) -> None:
    """Look every system over before the first is trained: a slip in the last one's student should not cost a day."""
    from kdlib.checking import check

    try:
        for title, report in check(recipe):
            if report.fault is not None:
                raise report.fault
            if not report:
                raise KdlibError(f"{title}: something is wrong, and nothing was trained.\n{report}")
    except DataError:  # of the few clips that a check takes; the training says it of all of them
        return


def _show_result(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    console.print(_table(result))
    _list_pictures(folder)
    seconds = result["seconds"]
    _print(f"{seconds['wall']:.0f} s, {seconds['cpu'] / 60:.1f} CPU minutes. Everything is in {folder}")


@contextmanager
def _exit_by_signal() -> Iterator[None]:
    """Leave with 130 after Ctrl-C and with 143 after SIGTERM, as shells have it, and say how to go on."""
    try:
        with signals.raised():
            yield
    except KeyboardInterrupt as stop:
        if ranks.launched()[0] == 0:
            for line in (str(stop) or "Stopped by SIGINT.", *getattr(stop, "__notes__", ())):
                _print(line, errors)
        raise typer.Exit(128 + getattr(stop, "signal", signal.SIGINT)) from None


def _show_cost_of(recipe: Any) -> None:
    from kdlib.estimate import estimate

    with console.status("trying each training for a few steps"):
        cost = estimate(recipe)
    table = Table("system", "training", title="expected on this machine, roughly")
    for column in ("steps", "s a step", "time", "memory"):
        table.add_column(column, justify="right")
    for one in cost.costs:
        numbers = (str(one.steps), f"{one.step:.3g}", _time(one.seconds), _bytes(one.memory))
        table.add_row(one.system, one.training, *numbers)
    console.print(table)
    folds = f"{cost.folds} folds, " if cost.folds > 1 else ""
    _print(f"{folds}features and scoring {_time(cost.folds * cost.other)}: {_time(cost.seconds)} in all.")
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _print(
        f"Memory: {_bytes(cost.memory)} at most, of them {_bytes(cost.kept)} clips and features; this machine has "
        f"{_bytes(there)}."
    )
    if cost.memory > there:
        _print("That does not fit. Take a smaller train.batch, with train.accumulate to keep the updates.")


def _describe(name: str) -> None:
    """Show a plugin's docstring and settings, or those of all kinds that have one of the name."""
    found = [one for one in registry().plugins() if one.name == name]
    if not found:
        raise PluginError(f"No plugin named '{name}'.{did_you_mean(name, {one.name for one in registry().plugins()})}")
    for one in found:
        _print(f"{one.kind} {one.name}, of plugin {one.package}\n\n{inspect.getdoc(one.build) or ''}\n")
        table = Table("setting", "default", "what it may be")
        schemas = one.settings.model_json_schema()["properties"] if one.settings.model_fields else {}
        for setting, field in one.settings.model_fields.items():
            default = "required" if field.is_required() else repr(field.default)
            table.add_row(setting, escape(default), escape(_allowed(schemas[setting], field.annotation)))
        console.print(table)


def _allowed(schema: dict[str, Any], annotation: Any) -> str:
    try:
        return in_words(schema)
    except ValueError:  # of a plugin that has a type of its own
        return str(annotation).replace("typing.", "")


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _print(text: str, to: Console = console) -> None:
    """Print text as it is: names of files and plugins may hold anything, and a path is one line."""
    to.print(printable(text, keep="\n\t"), markup=False, highlight=False, soft_wrap=True)


def _register(modules: list[str] | None) -> None:
    for name in modules or []:
        sys.path.insert(0, "")
        try:
            module = import_module(name)
        except ImportError as error:
            hint = f" A module is named, not a file: --plugin {name[:-3]}." if name.endswith(".py") else ""
            raise KdlibError(f"--plugin {name}: cannot be imported: {error}.{hint}") from error
        finally:
            sys.path.remove("")
        register(module, name)


def _table(result: dict[str, Any]) -> Table:
    several = len({row["system"] for row in result["rows"]}) > 1
    roles = list(dict.fromkeys(row["role"] for row in result["rows"]))
    legend = "\n".join(f"{role}: {MEANING[role]}" for role in roles)
    table = Table(title=f"{result['name']}: test part", caption=legend, caption_justify="left")
    for column in (["system"] if several else []) + ["training"]:
        table.add_column(column)
    for column in ("correct", "accuracy %", "95 % interval", "macro %"):
        table.add_column(column, justify="right")
    before = None
    for row in result["rows"]:
        if before not in (None, row["system"]):
            table.add_section()
        low, high = row["interval"]
        table.add_row(
            *([row["system"] if row["system"] != before else ""] if several else []),
            row["role"],
            f"{row['correct']} / {row['total']}",
            f"{100 * row['accuracy']:.2f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * row['macro']:.2f}",
        )
        before = row["system"]
    return table


def main() -> None:
    """Run the command. Exit codes: 0, 2 for a user's error (one message), 1 for a fault (with its traceback)."""
    rank, world = ranks.launched()
    who = f"rank {rank}: " if world > 1 else ""
    warnings.showwarning = lambda message, *_, **__: _print(f"{who}warning: {message}", errors)
    try:
        app(standalone_mode=True)
    except KdlibError as error:
        passed_on = isinstance(error, RankError)  # its text names the rank that failed, and one rank says it
        if rank == 0 or not passed_on:
            text = str(error)
            behind = "\n" if "\n" in text else " "
            _print(f"{'' if passed_on else who}error: {text}{behind}[{error.page}]", errors)
            for note in getattr(error, "__notes__", []):
                _print(f"  {note}", errors)
        sys.exit(2)
    except Exception:
        _print(f"{who}{traceback.format_exc()}", errors)
        errors.print("This is a fault of the program or of a plugin, not of yours; please report the lines above.")
        sys.exit(1)


if __name__ == "__main__":
    main()
