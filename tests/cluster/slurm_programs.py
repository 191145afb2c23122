"""SLURM's and munge's programs: those of the system, or Debian's packages unpacked under `.venv`, installing nothing.

Unpacked, the programs find their libraries by `LD_LIBRARY_PATH` and their plugins by `PluginDir`; Debian names the
daemons `slurmd-wlm` and leaves it to the installation to link the plain names.
"""

import dataclasses
import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
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
        return self.root / "usr" / "lib" / f"{platform.machine()}-linux-gnu"

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
        environment = dict(os.environ)
        if self.is_unpacked:
            added = {"PATH": [self.root / "usr" / "bin"], "LD_LIBRARY_PATH": [self.plugins, self.libraries]}
            for name, folders in added.items():
                environment[name] = ":".join([*map(str, folders), *filter(None, [os.environ.get(name)])])
        return environment


def slurm_programs(folder: Path = ROOT / ".venv" / "slurm") -> SlurmPrograms:
    """Returns the system's SLURM where it has one, else Debian's packages in `folder`, unpacked by the first caller.

    Raises:
        RuntimeError: There is neither; says what to install.
    """
    if all(_found(name) for name in DAEMONS):
        return SlurmPrograms(Path("/"))
    if not folder.exists():
        _unpack(folder)
    return SlurmPrograms(folder)


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _unpack(folder: Path) -> None:
    """Downloads the packages and those that they need and the system lacks; unpacks them into `folder`."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        if os.geteuid() == 0:
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        simulated = _apt("install", "--simulate", "--no-install-recommends", *PACKAGES)
        needed = [line.split()[1] for line in simulated.splitlines() if line.startswith("Inst ")]
        _apt("download", *needed, cwd=temporary)
        for package in temporary.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, temporary], check=True)
            package.unlink()
        temporary.rename(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise RuntimeError(f"SLURM: cannot be had from apt ({said}); install slurm-wlm and munge") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _apt(*arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(["apt-get", *arguments], capture_output=True, check=True, text=True, cwd=cwd).stdout
