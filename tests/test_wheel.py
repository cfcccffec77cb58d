"""What the distributions hold. They are installed and used in a fresh environment by .ci/packages."""

import email
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LITTER = ("__pycache__/", "_cache/")


def sources(*tops):
    """Return the files of the source tree that are no litter, as names in it."""
    paths = [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return {name for name in names if not any(litter in name for litter in LITTER)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = next(iter(WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    path = next(iter(SdistBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("sdist")))))
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_wheel_holds_the_two_packages_whole_and_nothing_beside_them(wheel):
    own = {name for name in wheel if ".dist-info/" not in name}
    assert own == sources("kdlib", "kdlib_asc")


@pytest.mark.parametrize(
    "name",
    [
        "kdlib/py.typed",
        "kdlib_asc/py.typed",
        "kdlib/recipes/digits.toml",
        "kdlib_asc/recipes/asc_quick.toml",
        "kdlib/template/pyproject.toml",
        "kdlib/template/.gitignore",
        "kdlib/template/.github/workflows/test.yml",
        "kdlib/template/src/kdlib_new_point/recipes/digits_new_point.toml",
        "kdlib/template/tests/test_new_point.py",
    ],
)
def test_the_wheel_holds_what_is_no_module_too(wheel, name):
    assert wheel[name] == (ROOT / name).read_bytes()


def test_the_metadata_name_licence_extras_and_readme(wheel):
    (name,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
    found = email.message_from_bytes(wheel[name])
    assert found["Name"] == "kdlib-asc"
    assert found["License-Expression"] == "MIT"
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert found.get_payload(decode=True).decode() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert name.replace("METADATA", "licenses/LICENSE") in wheel


def test_no_required_package_is_the_one_with_the_malicious_versions():
    wanted = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    assert not [one for one in wanted if one.startswith("lightning")]


def test_the_sdist_holds_what_a_change_must_pass(sdist):
    assert sdist >= sources("kdlib", "kdlib_asc", "tests", ".ci")
    assert sdist >= {"pyproject.toml", "constraints.txt", "LICENSE", "README.md", "docs/conf.py", "docs/tutorial.md"}
    assert not [name for name in sdist if any(litter in name for litter in (*LITTER, "_build/", "generated/"))]
