"""The record of a run: `metrics.jsonl`, always, and Weights & Biases beside it when wanted.

`metrics.jsonl` in the run folder is the record that counts: one JSON object a logged step, appended and flushed at
once, cut back on resume so that no step stands twice. W&B is a mirror of it (`mirror.py`), and no trouble of the mirror
stops or delays a run. Here is decided whether there is one, and under which run id.
"""

import contextlib
import json
import logging
import math
import netrc
import os
import secrets
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pretrain.engine.mirror import Connection, Mirror, missing_lines
from pretrain.engine.redaction import without_secrets
from pretrain.errors import DiskFull, TubeletError
from pretrain.files import is_out_of_space, replacing, write_text

logger = logging.getLogger(__name__)

TrackingMode = Literal["auto", "wandb", "none"]

METRICS = "metrics.jsonl"
RUN_ID_LENGTH = 8


class Tracker:
    """Rank 0's record of a run; on other ranks every method does nothing."""

    def __init__(
        self,
        out: Path,
        mode: TrackingMode,
        config: dict[str, Any],
        stage: str,
        enabled: bool = True,
        run_id: str | None = None,
    ):
        """Opens the record in the run folder, and the W&B run if there is to be one.

        Args:
            out: The run folder; its name is the W&B run's name.
            mode: "auto" uses W&B when this machine has a key (`WANDB_API_KEY` or `.netrc`) or `WANDB_MODE=offline`
                asks for it, and `WANDB_MODE` does not forbid it; "wandb" always, offline when there is no key; "none"
                never.
            config: What W&B shows of the run: the resolved config, and what it runs on; secrets are removed.
            stage: "pretrain" or "finetune": the W&B group and job type.
            enabled: False on all ranks but 0.
            run_id: The W&B run id that a checkpoint carries; by default the one of the run folder, or else a new one.
        """
        self.path = Path(out) / METRICS
        self.run_id = run_id
        self._enabled = enabled
        self._mirror: Mirror | None = None
        if not enabled:
            return
        Path(out).mkdir(parents=True, exist_ok=True)
        connection = choose_connection(mode, os.environ)
        if connection:
            try:
                self.run_id = settle_run_id(Path(out) / "wandb" / "run_id", run_id)
                missing = missing_lines(Path(out), read_metrics(self.path))
            except OSError as error:
                logger.warning("%s: W&B is not used, since this cannot be written (%s)", error.filename, error.strerror)
                return
            self._mirror = Mirror(Path(out), connection, without_secrets(config), stage, self.run_id, missing)

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Appends one line, `{"step": step, ...}`; call it once a step, with all that is known of that step.

        Numbers that JSON does not have (nan, inf) are written as null; W&B gets them as they are.

        Raises:
            DiskFull: No space is left; no partial line stays behind.
            TubeletError: `metrics.jsonl` cannot be written.
        """
        if not self._enabled:
            return
        entry = {"step": step} | {name: _json_value(value) for name, value in metrics.items()}
        try:
            _append(self.path, json.dumps(entry, allow_nan=False).encode() + b"\n")
        except OSError as error:
            if is_out_of_space(error):
                raise DiskFull(f"{self.path}: no space left on the disk; free some and start again") from error
            raise TubeletError(f"{self.path}: cannot be written ({error.strerror}); mend that and resume") from error
        if self._mirror:
            self._mirror.log({"step": step, **metrics})

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Sends a picture file to W&B; the run folder keeps its own."""
        if self._mirror:
            self._mirror.log_picture(step, name, path)

    def alert(self, title: str, text: str) -> None:
        """Sends an alert to W&B, which mails it to who wants that."""
        if self._mirror:
            self._mirror.alert(title, text)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the W&B run, within a bounded time (see `mirror.py`); what was not uploaded stays on disk."""
        mirror, self._mirror = self._mirror, None
        if mirror:
            mirror.finish(exit_code)


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of all steps after `step` from a file of JSON lines, if there is one; 0 empties it.

    Lines that are not JSON, such as the torn last one that a killed process leaves, are dropped too.
    """
    if not path.exists():
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for line, entry in _lines(path):
            if step > 0 and entry["step"] <= step:
                file.write(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a `metrics.jsonl` in file order, without a torn last line; numbers JSON lacks are None."""
    return [entry for _, entry in _lines(path)] if Path(path).exists() else []


def choose_connection(mode: TrackingMode, environment: Any) -> Connection | None:
    """Returns how to run W&B, or None for not at all, from the config's mode and the environment variables."""
    wished = environment.get("WANDB_MODE", "").lower()
    has_key = bool(environment.get("WANDB_API_KEY")) or _netrc_has_key(environment)
    if mode == "none" or (mode == "auto" and wished in ("disabled", "dryrun")):
        return None
    if mode == "auto" and not has_key and wished != "offline":
        return None
    return "online" if has_key and wished not in ("offline", "dryrun") else "offline"


def settle_run_id(path: Path, given: str | None) -> str:
    """Returns the given run id, else the one in the file, else a new one; the file then holds it."""
    stored = path.read_text().strip() if path.exists() else None
    run_id = given or stored or _new_run_id()
    if run_id != stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, run_id + "\n")
    return run_id


def _new_run_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(RUN_ID_LENGTH))


def _netrc_has_key(environment: Any) -> bool:
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return netrc.netrc(environment.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False


def _json_value(value: Any) -> float | int | str | None:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, line: bytes) -> None:
    """Appends the whole line or, when that fails, nothing."""
    with open(path, "ab", buffering=0) as file:
        size_bytes = file.tell()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size_bytes)
            raise


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each whole line with its entry, passing over what is not a line of ours."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if line.endswith(b"\n") and isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    yield line, entry
