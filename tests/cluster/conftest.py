"""A cluster for all tests here, and a way to submit jobs as a person would."""

import getpass
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.cli import main
from tests.cluster.jobs import Job
from tests.cluster.slurm_cluster import SlurmCluster, kept_cluster, wait_until
from tests.runs import own_environment, tiny_pretraining

EMPTY_S = 120


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="let every disturbance of a run meet every ZeRO stage")


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    with kept_cluster() as running:
        yield running


@pytest.fixture
def submit(cluster, tmp_path) -> Iterator[Callable[..., Job]]:
    """Submits a job as a person would; whatever is in the queue at the end of the test is cancelled."""
    count = itertools.count()

    def sbatch(*arguments: object, **variables: str) -> Job:
        log = tmp_path / f"job-{next(count)}.out"
        own = own_environment()
        wanted = {key: own[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
        wanted |= {"TUBELET_PYTHON": sys.executable} | variables
        done = cluster.run("sbatch", "--parsable", f"--output={log}", *arguments, **wanted)
        assert done.returncode == 0, done.stderr
        return Job(cluster, done.stdout.strip(), log)

    yield sbatch
    cluster.run("scancel", "--user", getpass.getuser())
    wait_until(lambda: not cluster.ask("squeue", "--noheader"), EMPTY_S, "the queue is empty")
    wait_until(lambda: cluster.nodes_are("idle"), EMPTY_S, "all nodes are idle")


@pytest.fixture
def launch(cluster, submit, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs `tubelet launch slurm`, as a user of the cluster; returns its exit code and what it says.

    Logs of jobs go to the test's folder, with the names that the scripts give.
    """

    def run(*arguments: object) -> tuple[int, str]:
        for name, value in (own_environment() | cluster.environment()).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SBATCH_OUTPUT", str(tmp_path / "%x-%j.out"))
        capsys.readouterr()
        code = main(["launch", "slurm", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, packed_shards) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)
