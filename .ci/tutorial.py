"""Run every command of the tutorial, in order, in a new folder: python .ci/tutorial.py FOLDER."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[list[str]]:
    """Return the commands of each console block of a page."""
    found = re.findall(r"^```console\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return [[line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")] for block in found]


def main(folder: Path) -> None:
    """Run the page; after its first block the reader's edits are made, which are the files of the finished package."""
    folder.mkdir()
    for commands in blocks((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        for command in commands:
            start = time.monotonic()
            print(f"$ {command}", flush=True)
            subprocess.run(command, shell=True, cwd=folder, check=True)
            print(f"  {time.monotonic() - start:.1f} s", flush=True)
        shutil.copytree(
            DOCS / "tutorial" / "kdlib-cosine",
            folder / "kdlib-cosine",
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", ".*_cache"),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
