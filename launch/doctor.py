"""`tubelet doctor`: whether a run could start here, before it waits in a queue or burns GPUs.

Alone it looks at this machine; started like a run (`tubelet launch`, torchrun, srun) it looks at all of its processes
and names the hosts on which something is wrong. Each check is one line: ok, warning, failed with what to do about it,
or not checked with what it would need.
"""

import logging
from collections import Counter

from rich.console import Console
from rich.text import Text

from launch.doctor_checks import CHECKS, Finding, Patient
from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.engine.all_reduce import ended_after
from pretrain.engine.devices import NETWORK, host_name, places
from pretrain.engine.distributed import Processes
from pretrain.engine.progress import set_up_logging
from pretrain.errors import Refused, TubeletError

logger = logging.getLogger(__name__)

MEET_WITHIN_S = 300.0
"""How long the processes wait for each other: nodes of a job start together."""
CHECK_WITHIN_S = 300.0
"""How long a check may take; a file system that hangs must not hold all nodes."""
HANGING = {
    "versions": NETWORK,
    "all-reduce": NETWORK,
    "run folder": "see whether the file system of --out answers on all nodes",
    "checkpoints": "see whether the file system of --out answers; a large checkpoint takes long to verify",
    "disk": "see whether the file system of --out answers on all nodes",
    "shards": "see whether the folders or the server that hold the shards answer on all nodes",
}
"""What to do about a check that does not end, where it is known."""
SEE_THE_NODES = "see what this node is busy with (dmesg, nvidia-smi), and whether the others have ended"
NAMED_HOSTS = 4
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "not checked": "dim"}

USAGE = """tubelet doctor [--config NAME] [--FIELD VALUE ...]

Checks whether a run could start here: the configuration, versions, devices, all-reduce, the run's folder, shared
memory, decoder, shards, checkpoints, disk, W&B. Every field of tubelet pretrain can be given; with --config and
--data.shards all is checked. Exit code 0 if nothing failed, else 2. On all nodes of a job:

  tubelet launch slurm --nodes 2 --gpus 8 -- doctor --config videomae_b --data.shards SHARDS --out runs/b
  tubelet launch local --processes 2 -- doctor
  torchrun --nproc-per-node 8 -m launch doctor"""


class NotWell(Refused):
    """Some check has failed; its line has been printed, and rank 0 says how many."""

    told = True


def doctor(arguments: list[str]) -> None:
    """Makes all checks and prints a line for each, on rank 0.

    Raises:
        NotWell: One failed.
        Refused: The command line is wrong, or the processes' devices or networks do not fit.
        TubeletError: Not all processes came, or they cannot talk to each other.
    """
    config = parse(PretrainConfig, "pretrain", arguments)
    with ended_after(2 * MEET_WITHIN_S, "meeting of all processes"):
        processes = Processes(meet_within_s=MEET_WITHIN_S)
    with processes:
        set_up_logging(main_process=processes.is_main)
        failed = examine(Patient(config, processes))
    if failed:
        raise NotWell(f"doctor: {failed} of {len(CHECKS)} checks failed; mend what their lines tell, then start again")


def examine(patient: Patient) -> int:
    """Makes all checks, printing as it goes, since the next one may end it; returns how many failed."""
    processes = patient.processes
    hosts = processes.gather_objects(host_name())
    console = Console(soft_wrap=True, highlight=False)
    failed = 0
    if processes.is_main:
        console.print(f"{len(hosts)} process{'es' * (len(hosts) > 1)} on {_all_of(hosts)}", markup=False)
    for name in CHECKS:
        with ended_after(CHECK_WITHIN_S, name, HANGING.get(name, SEE_THE_NODES)):
            findings = processes.gather_objects(_made(name, patient))
        failed += any(finding and finding.status == "failed" for finding in findings)
        if processes.is_main:
            for line in lines_of(name, findings, hosts):
                console.print(line)
    return failed


def _made(name: str, patient: Patient) -> Finding | None:
    """Makes a check; whatever it meets on one rank, the others must not wait for it."""
    try:
        return CHECKS[name](patient)
    except TubeletError as error:
        return Finding("failed", " ".join(str(error).split()))
    except Exception as error:
        logger.debug("traceback", exc_info=error)
        return Finding("failed", f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")


def lines_of(name: str, findings: list[Finding | None], hosts: list[str]) -> list[Text]:
    """Returns a line for each kind of finding, with the hosts and ranks that have it where others have another.

    Args:
        name: The check.
        findings: What each rank found; None where it did not look.
        hosts: The host of each rank.
    """
    ranks: dict[Finding, list[int]] = {}
    for rank, finding in enumerate(findings):
        if finding is not None:
            ranks.setdefault(finding, []).append(rank)
    lines = []
    for finding, own in ranks.items():
        where = _all_of([hosts[rank] for rank in own]) if len(ranks) == 1 else places(own, hosts)
        place = f"{where}: " if len(hosts) > 1 else ""
        lines.append(
            Text.assemble(
                (f"{finding.status:13s}", STYLES[finding.status]), (f"{name:15s}", "bold"), f"{place}{finding.text}"
            )
        )
    return lines


def _all_of(hosts: list[str]) -> str:
    """Returns the names of hosts, or how many they are."""
    counted = Counter(hosts)
    return ", ".join(counted) if len(counted) <= NAMED_HOSTS else f"all {len(counted)} hosts"
