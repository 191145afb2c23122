"""A real SLURM of two nodes on this machine, in a temporary folder, with ports of its own.

    python -m tests.cluster.slurm_cluster        # prints SLURM_CONF and how to use it, until Ctrl-C

Both nodes are `slurmd` processes on this host, so their names do not resolve, as on some real clusters. A keeper, which
is this module run as a program, owns the daemons: it ends them, and every process of every job, when its standard input
closes, which also happens when the tests that started it are killed.
"""

import contextlib
import dataclasses
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.cluster.slurm_programs import SlurmPrograms, slurm_programs
from tests.debian_packages import ROOT

NODES = ("node1", "node2")
MARK = "TUBELET_TEST_CLUSTER"
"""Variable that the daemons carry, with the cluster's folder."""
START_S = 60
COMMAND_S = 300

CONFIGURATION = """
ClusterName=tubelet
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
{plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
EnforcePartLimits=ALL
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
DebugFlags=NO_CONF_HASH
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclasses.dataclass(frozen=True)
class SlurmCluster:
    """A running cluster.

    Attributes:
        folder: Holds its configuration, state and logs.
        programs: SLURM's programs.
    """

    folder: Path
    programs: SlurmPrograms

    @property
    def configuration(self) -> Path:
        """The file to name in SLURM_CONF."""
        return self.folder / "slurm.conf"

    def environment(self, **more: str) -> dict[str, str]:
        """Returns the variables of a user of this cluster."""
        own = {name: value for name, value in self.programs.environment().items() if not name.startswith("SLURM_")}
        return {**own, "SLURM_CONF": str(self.configuration), **more}

    def run(self, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs a command such as `squeue` as a user of this cluster, with more variables."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )

    def ask(self, *command: object) -> str:
        """Returns what a command writes to standard output; it must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        """Starts a node's daemon."""
        stepd = ["-d", self.programs.daemon("slurmstepd")] if self.programs.is_unpacked else []
        self._start_daemon("slurmd", "-N", node, "-f", str(self.configuration), *stepd)

    def lose_node(self, node: str) -> None:
        """Kills all that runs on a node at once: its daemon, step daemons and tasks."""
        lost = [int((self.folder / f"{node}.pid").read_text())]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node and self._owns(process):
                    lost.append(process.pid)
        for pid in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def nodes_are(self, state: str) -> bool:
        """Whether all nodes are in a state, such as `idle`."""
        return self.ask("sinfo", "--noheader", "--Node", "--format=%T").split() == [state] * 2 * len(NODES)

    def start(self) -> None:
        """Writes the configuration and starts all daemons.

        Raises:
            RuntimeError: They do not come up; holds their logs.
        """
        for name in ("state", "log", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.configuration.write_text(self._configuration_text())
        (self.folder / "gres.conf").write_text("Name=gpu Count=2\n")
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        named = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._start_daemon("munged", "--force", *named, f"--log-file={self.folder / 'log' / 'munge.log'}")
        self._start_daemon("slurmctld", "-f", str(self.configuration))
        for node in NODES:
            self.start_node(node)
        deadline = time.monotonic() + START_S
        while self.run("sinfo").returncode or not self.nodes_are("idle"):
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-3000:] for path in (self.folder / "log").iterdir())
                raise RuntimeError(f"SLURM did not start within {START_S} s:\n{logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Kills the daemons and every process of every job."""
        while True:
            running = [
                process for process in psutil.process_iter() if process.pid != os.getpid() and self._owns(process)
            ]
            if not running:
                return
            for process in running:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(running, timeout=5)

    def _owns(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            environment = process.environ()
        except psutil.Error:
            return False
        is_job = environment.get("SLURM_CONF") == str(self.configuration) and "SLURM_JOB_ID" in environment
        return is_job or environment.get(MARK) == str(self.folder)

    def _start_daemon(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.programs.daemon(name), *arguments],
            env=self.environment(**{MARK: str(self.folder)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")

    def _configuration_text(self) -> str:
        import getpass

        controller_port, *node_ports = _free_ports(1 + len(NODES))
        host = socket.gethostname()
        shared = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
        return CONFIGURATION.format(
            host=host,
            controller_port=controller_port,
            folder=self.folder,
            user=getpass.getuser(),
            plugins=f"PluginDir={self.programs.plugins}" if self.programs.is_unpacked else "",
            nodes="\n".join(
                f"NodeName={node} Port={port} {shared}" for node, port in zip(NODES, node_ports, strict=True)
            ),
        )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def kept_cluster() -> Iterator[SlurmCluster]:
    """Yields a cluster that ends with this process, however that ends."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told = keeper.stdout.readline()
        if not told:
            raise RuntimeError("the test cluster did not start; its keeper said why")
        configuration = Path(shlex.split(told)[-1].partition("=")[2])
        yield SlurmCluster(configuration.parent, slurm_programs())
    finally:
        keeper.stdin.close()
        keeper.wait()


def wait_until(condition: Callable[[], object], within_s: float, what: str = "") -> None:
    """Waits until a condition holds; fails after so many seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what or condition}"
        time.sleep(0.2)


def main() -> int:
    """Keeps a cluster until standard input closes or Ctrl-C; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="tubelet-slurm-", ignore_cleanup_errors=True) as folder:
        cluster = SlurmCluster(Path(folder), slurm_programs())
        try:
            cluster.start()
            print(f"export SLURM_CONF={shlex.quote(str(cluster.configuration))}")
            if cluster.programs.is_unpacked:
                for name in ("PATH", "LD_LIBRARY_PATH"):
                    added = cluster.environment()[name].removesuffix(os.environ.get(name, "")).rstrip(":")
                    print(f"export {name}={shlex.quote(added)}:${name}")
            sys.stdout.flush()
            sys.stdin.read()
        except KeyboardInterrupt:
            pass
        finally:
            cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
