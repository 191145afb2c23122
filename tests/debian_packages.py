"""Debian's packages unpacked in a folder of their own, installing nothing: for tests of programs the system lacks."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNPACKED = ROOT / ".venv"


def unpack(packages: Sequence[str], folder: Path) -> None:
    """Downloads packages and those that they need and the system lacks; unpacks them into `folder`, unless it exists.

    Raises:
        RuntimeError: They cannot be had; says which to install.
    """
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        if os.geteuid() == 0:
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        simulated = _apt("install", "--simulate", "--no-install-recommends", *packages)
        needed = [line.split()[1] for line in simulated.splitlines() if line.startswith("Inst ")]
        _apt("download", *needed, cwd=temporary)
        for package in temporary.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, temporary], check=True)
            package.unlink()
        temporary.rename(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        wanted = " and ".join(packages)
        raise RuntimeError(f"{folder.name}: cannot be had from apt ({said}); install {wanted}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def libraries(root: Path) -> Path:
    """Returns the folder of the libraries of a system, or of packages, in `root`."""
    return root / "usr" / "lib" / f"{platform.machine()}-linux-gnu"


def environment_with(added: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Returns this process's variables, with folders put in front of what lists of folders they hold."""
    environment = dict(os.environ)
    for name, folders in added.items():
        environment[name] = ":".join([*map(str, folders), *filter(None, [os.environ.get(name)])])
    return environment


def _apt(*arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(["apt-get", *arguments], capture_output=True, check=True, text=True, cwd=cwd).stdout
