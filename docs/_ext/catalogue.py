"""Write the tables of points and sources from the registry."""

import re
from pathlib import Path

from kdlib.registry import Plugin, Registry

POINTS = {
    "hard_labels": ("output", "-log p_S(y)"),
    "soft_labels": ("output", "-S² Σ softmax(z_T / T) log softmax(z_S / S)"),
    "dkd": ("output", "T² (α KL of (p_y, 1 - p_y) + β KL of the classes other than y)"),
    "dist": ("output", "T² (β mean(1 - ρ of rows) + γ mean(1 - ρ of columns))"),
    "logit_mse": ("output", "(z_S - z_T)²"),
    "js": ("output", "T² (KL(p_T, m) + KL(p_S, m)) / 2, m their mean"),
    "logit_standardised": ("output", "T² KL of softmax((z - mean z) / (T std z))"),
    "sigmoid_labels": ("output", "Σ binary cross-entropy of σ(z_S / T) with σ(z_T / T)"),
    "ranking": ("output", "-log P(order of z_T | z_S)"),
    "hidden_mse": ("hidden", "(E_S - E_T)²"),
    "hidden_cosine": ("hidden", "1 - cos(E_S, E_T)"),
    "fitnet": ("hidden", "(r(h_S) - h_T)², r a projector"),
    "attention_transfer": ("hidden", "(q_S - q_T)², q = Σ_c abs(a_c)^p to length 1"),
    "fsp": ("hidden", "Σ (G_S - G_T)², G = F₁ᵀ F₂ / positions"),
    "nst": ("hidden", "MMD² of the channels' patterns"),
    "vid": ("hidden", "log σ + (h_T - r(h_S))² / 2σ², r and σ learned"),
    "similarity_preserving": ("batch", "(A_S - A_T)² / B², A rows of E Eᵀ to length 1"),
    "rkd": ("batch", "Huber of distances over their mean, and of angles"),
    "pkt": ("batch", "KL of each row's similarities to the others"),
    "correlation": ("batch", "(C_S - C_T)² / B², C a kernel of the rows"),
    "crd": ("batch", "noise-contrastive, own row against N others of a bank"),
}
"""Level and formula in short; a registered point that is not here fails the build."""
OURS = ("kdlib", "asc")
"""The plugins that this distribution brings; others may be installed beside it."""
MEASURED = {"soft_labels": "soft_labels (Hinton, T = 4)"}


def costs(table: Path) -> dict[str, str]:
    """Return the measured cost of a step by method."""
    found = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"\d+\.\d+", cells[3]):
            found[cells[0]] = cells[3]
    return found


def needs(plugin: Plugin) -> str:
    """Say what a point asks for beside taps."""
    text = plugin.build.__doc__ or ""
    found = [name for name in ("y", "index", "epoch") if f"``{name}``" in text and plugin.name != "soft_labels"]
    found += ["prepare"] if hasattr(plugin.build, "prepare") else []
    return ", ".join([*found, *plugin.live]) or "-"


def ours(registered: Registry, kind: str) -> list[Plugin]:
    """Return the plugins of a kind that this distribution brings."""
    plugins = [registered.get(kind, name) for name in registered.names(kind)]
    return [plugin for plugin in plugins if plugin.package in OURS]


def first_line(plugin: Plugin) -> str:
    """Return the first sentence of a docstring, as Markdown."""
    text = " ".join((plugin.build.__doc__ or "").split("\n\n")[0].split())
    return text.replace("``", "`").replace("|", "\\|")


def write(folder: Path, registered: Registry, measured: Path) -> None:
    """Write ``catalogue_points.md`` and ``catalogue_sources.md`` into the folder."""
    steps = costs(measured)
    lines = ["| point | level | needs | formula, in short | what, and by whom | step |", "|---|---|---|---|---|---:|"]
    order = ("output", "hidden", "batch")
    for plugin in sorted(ours(registered, "point"), key=lambda one: (order.index(POINTS[one.name][0]), one.name)):
        name = plugin.name
        level, formula = POINTS[name]
        cost = steps.get(MEASURED.get(name, name), "-")
        lines.append(
            f"| [`{name}`](#point-{name}) | {level} | {needs(plugin)} | {formula} | {first_line(plugin)} | {cost} |"
        )
    (folder / "catalogue_points.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    lines = ["| source | needs | what |", "|---|---|---|"]
    for plugin in ours(registered, "source"):
        link = f"[`{plugin.name}`](#source-{plugin.name})"
        lines.append(f"| {link} | {', '.join(plugin.live) or '-'} | {first_line(plugin)} |")
    (folder / "catalogue_sources.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
