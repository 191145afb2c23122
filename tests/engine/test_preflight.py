"""The first second of a job: nodes that cannot do a run together are named in one line, and all ranks end with 2."""

import shutil
import socket
from pathlib import Path

import pytest
import timm

from pretrain.engine.devices import Device, host_name, places, refuse_unfit
from pretrain.engine.preflight import Opened, Report, Same, differences, refuse_problems, versions_here
from pretrain.errors import EXIT_FAILED, Refused, TubeletError
from tests.runs import Started, run, tiny_pretraining

HOSTS = ["node1", "node1", "node2", "node2"]


@pytest.mark.parametrize(
    ("ranks", "hosts", "text"),
    [
        ([2], HOSTS, "node2 (rank 2)"),
        ([1, 3], HOSTS, "node1 (rank 1) and node2 (rank 3)"),
        (range(8), ["a"] * 8, "a (ranks 0 to 7)"),
        ([0, 2, 5], ["a"] * 8, "a (ranks 0, 2, 5)"),
        (range(4), "abcd", "a (rank 0), b (rank 1), c (rank 2) and d (rank 3)"),
        (range(9), "abcdefghi", "a (rank 0), b (rank 1), c (rank 2) and 6 more hosts"),
    ],
)
def test_ranks_are_told_by_their_hosts(ranks, hosts, text):
    assert places(list(ranks), hosts) == text


def test_a_node_is_called_by_the_name_that_slurm_knows(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert host_name() == "node7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert host_name() == socket.gethostname()


def test_nodes_without_gpus_among_others_that_have_some_are_refused():
    gpu, cpu = Device("node1", "cuda", "H100", None), Device("node2", "cpu", "cpu", None)
    for alike in ([gpu, gpu], [cpu, cpu]):
        refuse_unfit(alike)
    with pytest.raises(Refused, match=r"^devices: torch sees no GPU on node2 \(ranks 2, 3\), but there are on the oth"):
        refuse_unfit([gpu, gpu, cpu, cpu])


def test_a_device_that_cannot_do_what_is_asked_for_is_named_unless_all_are_alike():
    old, new = Device("node1", "cuda", "V100", "precision: no"), Device("node2", "cuda", "H100", None)
    with pytest.raises(Refused, match=r"^precision: no$"):
        refuse_unfit([old, old])
    with pytest.raises(Refused, match=r"^node1 \(rank 1\): precision: no$"):
        refuse_unfit([new, old._replace(host="node1"), new])


def test_nodes_whose_tubelets_report_other_things_are_told_by_their_versions():
    old, new = Same({"tubelet": "1"}, "mend it"), Same({"tubelet": "2"}, "mend it")
    (problem,) = differences([(old,), (new, Same({"more": "x"}, ""))], ["node1", "node2"])
    assert problem == "tubelet: is 1 on node1 (rank 0), but 2 on node2 (rank 1); mend it"


def test_what_differs_is_told_with_both_values_the_hosts_and_the_remedy():
    first, other = Same({"torch": "2.6", "timm": "1.0"}, "mend it"), Same({"torch": "2.7", "timm": "1.0"}, "mend it")
    assert differences([(first,)] * 4, HOSTS) == []
    assert differences([(first,), (first,), (other,), (other,)], HOSTS) == [
        "torch: is 2.6 on node1 (ranks 0, 1), but 2.7 on node2 (ranks 2, 3); mend it"
    ]


def test_of_much_that_differs_three_are_told_and_the_rest_counted():
    first, other = (Same({name: value for name in "abcdef"}, "mend it") for value in "12")
    (told,) = differences([(first,), (other,)], ["x", "y"])
    assert told.count(": is 1 on x (rank 0), but 2 on y (rank 1)") == 3
    assert told.endswith(", and 3 more differ; mend it")


def test_versions_tell_of_the_source_too_since_checkouts_of_one_version_differ():
    values = versions_here().values
    assert values["timm"] == timm.__version__
    assert "(source " in values["tubelet"]


def test_what_all_ranks_cannot_open_is_told_once_and_what_some_cannot_with_their_hosts():
    well, ill = Report("node1", (), None), Report("node2", (), ("data.shards: gone", EXIT_FAILED))
    with pytest.raises(TubeletError, match=r"^data\.shards: gone$") as everywhere:
        refuse_problems([ill, ill])
    with pytest.raises(TubeletError, match=r"^node2 \(rank 1\): data\.shards: gone$"):
        refuse_problems([well, ill])
    assert everywhere.value.exit_code == EXIT_FAILED
    assert everywhere.value.told


def test_what_a_process_alone_cannot_open_is_raised_at_once():
    def fail() -> None:
        raise Refused("gone")

    with pytest.raises(Refused, match="gone"):
        Opened.by(fail, world=1)
    assert str(Opened.by(fail, world=2).error) == "gone"


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def other_timm(folder: Path) -> Path:
    """A folder in which Python finds timm 9.9."""
    metadata = folder / "site" / "timm-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: timm\nVersion: 9.9\n")
    return metadata.parents[1]


def assert_refused_by_rank_0_alone(ended: Started, words: str) -> None:
    assert ended.codes == [2] * len(ended.codes), ended.text
    said = [line for line in ended.text.splitlines() if line.startswith("tubelet: ")]
    assert len(said) == 1, ended.text
    assert words in said[0]
    for output in ended.outputs:
        assert "Traceback" not in output.read_text()
    for output in ended.outputs[1:]:
        assert "tubelet: " not in output.read_text()


def test_nodes_with_different_versions_are_refused(recipe, tmp_path):
    command = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run"]
    ended = run("pretrain", command, tmp_path, world=2, last={"path": other_timm(tmp_path)})
    host = socket.gethostname()
    assert_refused_by_rank_0_alone(
        ended, f"timm: is {timm.__version__} on {host} (rank 0), but 9.9 on {host} (rank 1); install the same environ"
    )
    assert not (tmp_path / "run").exists()


def test_shards_that_one_node_does_not_have_are_told_with_its_name(recipe, packed_shards, tmp_path):
    shutil.copytree(packed_shards, tmp_path / "here" / "shards")
    (tmp_path / "there").mkdir()
    command = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run", "--data.shards"]
    ended = run(
        "pretrain",
        [*command, tmp_path / "here" / "shards"],
        tmp_path,
        world=2,
        last={"arguments": ["--data.shards", tmp_path / "there" / "shards"]},
    )
    assert_refused_by_rank_0_alone(ended, f"{socket.gethostname()} (rank 1): data.shards: {tmp_path}/there/shards: no ")
    assert not (tmp_path / "run").exists()
