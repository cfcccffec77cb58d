"""What the doctor makes of a described machine, and how it describes one."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kdlib.cli import app
from kdlib.doctor import advise, describe
from kdlib.errors import KdlibError
from kdlib.recipe import read

SOUND = {
    "system": "Linux",
    "python": "3.11.9",
    "torch": "2.13.0+cpu",
    "processor": "A Processor",
    "units": ["amx_bf16", "avx512_bf16", "avx512f", "avx2"],
    "cores": 8,
    "quota": None,
    "threads": 8,
    "allocator": "tcmalloc",
    "mmap_threshold": None,
    "trim_threshold": None,
    "memory": 64_000_000_000,
    "available": 60_000_000_000,
    "limit": None,
    "disk": 100_000_000_000,
    "gpus": [],
    "driver": False,
    "compiler": "/usr/bin/g++",
}


def of(about, **changes):
    (one,) = [found for found in advise(SOUND | changes) if found.about == about]
    return one


def test_of_a_sound_machine_only_the_precision_is_left_to_choose():
    assert [one.about for one in advise(SOUND) if one.why] == ["processor"]
    assert all(bool(one.why) == bool(one.line) and "\n" not in one.line for one in advise(SOUND))


@pytest.mark.parametrize(
    ("units", "unit", "precision"),
    [
        (["amx_bf16", "avx512_bf16"], "AMX with bf16", "bf16"),
        (["avx512_bf16", "avx512f"], "AVX-512 with bf16", "bf16"),
        (["avx512f", "avx2"], "AVX-512", "fp32"),
        (["avx2"], "AVX2", "fp32"),
        ([], "no vector unit known", "fp32"),
    ],
)
def test_bf16_is_for_processors_that_compute_it(units, unit, precision):
    one = of("processor", units=units)
    assert one.found == f"A Processor, {unit}"
    assert one.line == f"kdlib run RECIPE --set train.precision={precision} --set train.layout=channels_last"


@pytest.mark.parametrize(
    ("cores", "quota", "threads", "wanted"),
    [
        (8, None, 8, None),
        (2, None, 16, 2),
        (64, 4.0, 64, 4),
        (64, 1.5, 4, 1),
        (64, 0.5, 64, 1),
        (4, 8.0, 8, 4),
        (8, 0.2, 1, None),
        (8, None, 1, 8),
    ],
)
def test_threads_are_to_be_as_many_as_cores_that_may_be_used(cores, quota, threads, wanted):
    one = of("threads", cores=cores, quota=quota, threads=threads)
    assert one.line == ("" if wanted is None else f"export OMP_NUM_THREADS={wanted}")
    assert (quota is None) == ("limit" not in one.found)


@pytest.mark.parametrize(
    ("allocator", "mmap", "trim", "advised"),
    [
        ("glibc", None, None, True),
        ("glibc", 1 << 30, None, True),
        ("glibc", 1 << 20, 1 << 30, True),
        ("glibc", 1 << 30, 1 << 32, False),
        ("jemalloc", None, None, False),
        (None, None, None, False),
    ],
)
def test_glibc_is_to_keep_large_blocks(allocator, mmap, trim, advised):
    one = of("allocator", allocator=allocator, mmap_threshold=mmap, trim_threshold=trim)
    assert bool(one.line) == advised
    if advised:
        assert one.line == "export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824"


def test_little_memory_of_the_machine_or_of_a_limit_is_noticed():
    little = {"memory": 8_000_000_000, "available": 6_000_000_000}
    assert "checkpoint_activations" in of("memory", **little).line
    limited = of("memory", limit=7_000_000_000)
    assert "checkpoint_activations" in limited.line
    assert limited.found == "64.0 GB, 60.0 GB of it free, and a limit of 7.0 GB"
    assert of("memory", available=None).found == "64.0 GB"
    assert of("memory", memory=None, available=None) == ("memory", "not known", "", "")


def test_a_machine_that_trains_on_a_gpu_is_told_nothing_of_its_processors_arithmetic():
    changes = {"gpus": ["A Card"], "allocator": "glibc", "units": ["avx512_bf16"]}
    assert [one.about for one in advise(SOUND | changes) if one.why] == []


def test_every_line_for_a_recipe_is_one_that_a_shipped_recipe_takes(tmp_path):
    poor = {"units": [], "disk": 0, "memory": 10**9, "available": 10**9}
    lines = [one.line for one in advise(SOUND | poor) if one.line.startswith("kdlib run RECIPE ")]
    assert len(lines) == 3
    for line in lines:
        changes = [f"data.root={tmp_path}", *line.removeprefix("kdlib run RECIPE --set ").split(" --set ")]
        assert read("asc_dcase2018", changes).dump() != read("asc_dcase2018", changes[:1]).dump()


def test_a_full_disk_a_driver_without_a_torch_for_it_and_no_compiler_are_noticed():
    assert "float16" in of("disk", disk=30_000_000_000).line
    assert "pip install" in of("GPU", driver=True).line
    assert of("GPU", gpus=["A Card"], driver=True).line == ""
    assert of("C++ compiler", compiler=None).line == "apt-get install g++"


def test_this_machine_is_described_and_advised(tmp_path):
    found = describe(tmp_path)
    assert found.keys() == SOUND.keys()
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()
    assert found["disk"] > 0
    assert len(advise(found)) == 8


@pytest.fixture
def root(tmp_path):
    """A file system that tells of a machine."""

    def made(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return describe(tmp_path, root=tmp_path)

    return made


def test_processor_and_memory_are_read(root):
    cpu = "processor\t: 0\nmodel name\t: Some Chip\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
    found = root(proc__cpuinfo=cpu, proc__meminfo="MemTotal:       1000 kB\nMemFree: 3 kB\nMemAvailable:    500 kB\n")
    assert (found["processor"], found["units"]) == ("Some Chip", ["avx512_bf16", "avx512f", "avx2"])
    assert (found["memory"], found["available"], found["limit"]) == (1_024_000, 512_000, None)


def test_an_allocator_that_is_loaded_is_seen(root):
    assert root(proc__self__maps="7f00 r-xp /usr/lib/libtcmalloc_minimal.so.4\n")["allocator"] == "tcmalloc"


def test_limits_of_the_second_version_of_control_groups(root, tmp_path):
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text("2000\n")
    found = root(proc__self__cgroup="0::/a/b\n")
    assert (found["quota"], found["limit"]) == (1.5, 2000)
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    found = root()
    assert (found["quota"], found["limit"]) == (None, None)


def test_limits_of_the_first_version_of_control_groups(root, tmp_path):
    for name, files in {
        "cpu,cpuacct": {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"},
        "memory": {"memory.limit_in_bytes": "9223372036854771712"},
    }.items():
        (tmp_path / "sys/fs/cgroup" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "sys/fs/cgroup" / name / file).write_text(text)
    found = root(proc__self__cgroup="4:memory:/a\n3:cpu,cpuacct:/a\n1:name=systemd:/a\n")
    assert (found["quota"], found["limit"]) == (2.0, None)


QUOTA = {"cpu.cfs_quota_us": "{cores}00", "cpu.cfs_period_us": "100"}
SECOND = {"": {"cpu.max": "{cores}00 100", "memory.max": "{size}"}}
FIRST = {"cpu,cpuacct": QUOTA, "memory": {"memory.limit_in_bytes": "{size}"}}


@pytest.mark.parametrize("hierarchies", [SECOND, FIRST], ids=["second version", "first version"])
@pytest.mark.parametrize("narrow", ["", "system.slice", "system.slice/job_7", "system.slice/job_7/step_0/task"])
def test_the_narrowest_limit_from_the_group_up_to_the_root_counts(root, tmp_path, hierarchies, narrow):
    own = "system.slice/job_7/step_0/task"
    limits = {own: (8, 8000), "system.slice/job_7/step_0": (16, 16_000), "another.slice": (1, 1000), narrow: (2, 3000)}
    for name, files in hierarchies.items():
        for group, (cores, size) in limits.items():
            folder = tmp_path / "sys/fs/cgroup" / name / group
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in files.items():
                (folder / file).write_text(text.format(cores=cores, size=size) + "\n")
    found = root(proc__self__cgroup="".join(f"{number}:{name}:/{own}\n" for number, name in enumerate(hierarchies)))
    assert (found["quota"], found["limit"]) == (2.0, 3000)


def test_a_container_that_does_not_see_its_group_reads_the_limits_at_the_top(root, tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    (top / "cpu").mkdir(parents=True)
    (top / "memory").mkdir()
    (top / "cpu/cpu.cfs_quota_us").write_text("300")
    (top / "cpu/cpu.cfs_period_us").write_text("100")
    (top / "memory/memory.limit_in_bytes").write_text("5000")
    found = root(proc__self__cgroup="4:memory:/docker/0a1b\n3:cpu,cpuacct:/docker/0a1b\n")
    assert (found["quota"], found["limit"]) == (3.0, 5000)


def test_a_machine_that_tells_nothing_is_described_all_the_same(tmp_path):
    found = describe(tmp_path, root=tmp_path / "none")
    assert (found["units"], found["memory"], found["limit"], found["quota"]) == ([], None, None, None)
    assert len(advise(found)) == 8


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (None, None)),
        ({"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "5"}, (1 << 30, 5)),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=0x100:glibc.malloc.trim_threshold=7"}, (256, 7)),
        ({"MALLOC_MMAP_THRESHOLD_": "much"}, (None, None)),
    ],
)
def test_thresholds_are_those_of_the_environment(monkeypatch, tmp_path, variables, found):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    here = describe(tmp_path)
    assert (here["mmap_threshold"], here["trim_threshold"]) == found


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KdlibError, match="nowhere: there is no such folder"):
        describe(tmp_path / "nowhere")


def test_the_command_shows_each_finding_and_for_programs_the_machine(tmp_path):
    shown = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    for one in advise(describe(tmp_path)):
        assert one.about in shown.output
        assert one.line in shown.output
    plain = CliRunner().invoke(app, ["doctor", "--json", "--folder", str(tmp_path)])
    assert json.loads(plain.output).keys() == SOUND.keys()
