"""What README shows runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_loop_of_readme_trains_the_student():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert names["losses"].total.isfinite()
    assert int(names["distiller"].step) == 1
    assert names["big"].weight.grad is None


def test_every_link_of_readme_into_the_project_leads_somewhere():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parents[1] / link).exists(), link
