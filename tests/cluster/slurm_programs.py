"""SLURM's and munge's programs: those of the system, or Debian's packages unpacked under `.venv`, installing nothing.

Unpacked, the programs find their libraries by `LD_LIBRARY_PATH` and their plugins by `PluginDir`; Debian names the
daemons `slurmd-wlm` and leaves it to the installation to link the plain names.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from tests.debian_packages import UNPACKED, environment_with, libraries, unpack

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
DAEMONS = ("slurmctld", "slurmd", "munged")


@dataclasses.dataclass(frozen=True)
class SlurmPrograms:
    """Where the programs are.

    Attributes:
        root: Folder that stands for `/`.
    """

    root: Path

    @property
    def is_unpacked(self) -> bool:
        """Whether they are packages unpacked in a folder of their own."""
        return self.root != Path("/")

    @property
    def libraries(self) -> Path:
        """The folder of the system's libraries."""
        return libraries(self.root)

    @property
    def plugins(self) -> Path:
        """The folder of SLURM's plugins."""
        return self.libraries / "slurm-wlm"

    def daemon(self, name: str) -> str:
        """Returns the file of a daemon."""
        if not self.is_unpacked:
            return str(_found(name))
        plain = self.root / "usr" / "sbin" / name
        return str(plain if plain.exists() else plain.with_name(f"{name}-wlm"))

    def environment(self) -> dict[str, str]:
        """Returns this process's variables with the programs on the path."""
        if not self.is_unpacked:
            return dict(os.environ)
        return environment_with(
            {"PATH": [self.root / "usr" / "bin"], "LD_LIBRARY_PATH": [self.plugins, self.libraries]}
        )


def slurm_programs(folder: Path = UNPACKED / "slurm") -> SlurmPrograms:
    """Returns the system's SLURM where it has one, else Debian's packages in `folder`, unpacked by the first caller.

    Raises:
        RuntimeError: There is neither; says what to install.
    """
    if all(_found(name) for name in DAEMONS):
        return SlurmPrograms(Path("/"))
    unpack(PACKAGES, folder)
    return SlurmPrograms(folder)


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
