"""The mirror of a run's record in Weights & Biases, kept up by a thread of its own, for which training never waits.

Whatever happens to W&B (no network, a server that never answers or goes away, a killed or stopped background process)
costs one warning, and at the end of the run at most `END_WITHIN_S`. A server that cannot be reached means an offline
run, which `wandb sync` uploads later. All attempts carry one run id. Steps go to W&B as a metric, never as `step=`,
since W&B drops steps that go back after a resume.

An attempt whose W&B run ended in order, with everything uploaded or in its offline folder, notes the step up to which
the mirror is whole; the next one sends what comes after, from `metrics.jsonl`. So nothing is missing there in the end,
but a step may show twice. In order means that W&B's own process has left a whole file: it writes the last of it after
`finish` has returned, so a signal may still take that.
"""

import contextlib
import logging
import os
import queue
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from pretrain.engine.signals import signals_held_back
from pretrain.engine.wandb_files import is_whole, mend_folders
from pretrain.files import sync_file, write_text

logger = logging.getLogger(__name__)

Connection = Literal["online", "offline"]

INIT_TIMEOUT_S = 10
FINISH_TIMEOUT_S = 10
END_WITHIN_S = 20
"""Longest wait at the end: long enough for a start that finds no server and for the offline run that follows it."""
SILENT_S = 2
KILLED_WITHIN_S = 2
WAITING_ENTRIES = 10_000
CORE = "wandb-core"
"""W&B's own process, which writes and uploads."""


class _Picture(NamedTuple):
    step: int
    name: str
    path: Path


class _Alert(NamedTuple):
    title: str
    text: str


class _End(NamedTuple):
    exit_code: int


class Mirror:
    """A W&B run that follows a record; no method waits for W&B but `finish`, and that one not for long."""

    def __init__(
        self,
        out: Path,
        connection: Connection,
        config: dict[str, Any],
        stage: str,
        run_id: str,
        missing: list[dict[str, Any]],
    ) -> None:
        """Starts the W&B run in the background.

        Args:
            out: The run folder; its name is the W&B run's name.
            connection: "online" falls back to "offline" where no server answers.
            config: What W&B shows as the run's configuration.
            stage: "pretrain" or "finetune": the W&B group and job type.
            run_id: The W&B run id.
            missing: Lines of the record that the attempts before may not have sent.
        """
        self._out, self._connection, self._config, self._stage, self._run_id = out, connection, config, stage, run_id
        self._missing = missing
        self._waiting: queue.Queue[dict[str, Any] | _Picture | _Alert | _End] = queue.Queue(WAITING_ENTRIES)
        self._over = False
        self._kept = ""
        self._thread = threading.Thread(target=self._follow, name="wandb", daemon=True)
        self._thread.start()

    def log(self, entry: Mapping[str, Any]) -> None:
        """Sends a line of the record."""
        self._send(dict(entry))

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Sends a picture file, as it is when its turn comes."""
        self._send(_Picture(step, name, path))

    def alert(self, title: str, text: str) -> None:
        """Sends an alert."""
        self._send(_Alert(title, text))

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run, waiting for uploads and for whatever else at most `END_WITHIN_S`."""
        self._send(_End(exit_code))
        if self._over:
            return
        self._thread.join(SILENT_S)
        if self._thread.is_alive():
            logger.info("waiting for W&B, at most %d s", END_WITHIN_S)
            self._thread.join(END_WITHIN_S - SILENT_S)
        if self._thread.is_alive():
            self._give_up(f"did not end within {END_WITHIN_S} s")
            self._thread.join(KILLED_WITHIN_S)

    def _send(self, item: dict[str, Any] | _Picture | _Alert | _End) -> None:
        if self._over:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._give_up(f"is {WAITING_ENTRIES} lines behind")

    def _give_up(self, why: str) -> None:
        """Warns, once, and kills W&B's process, on which the thread, or W&B's hook at exit, would wait for ever."""
        if self._over:
            return
        self._over = True
        logger.warning(
            "W&B %s; the record in %s has it all, the next attempt sends what W&B lacks%s", why, self._out, self._kept
        )
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # to which the lost connection would be a traceback
        _kill_core()

    def _follow(self) -> None:
        """The thread: starts the W&B run, passes on what comes, and ends it."""
        doing = "could not start"
        try:
            with signals_held_back():  # in W&B's own process, which outlives what stops the run
                run = self._start()
            doing = "stopped working"
            option = "" if run.offline else "--include-online "
            self._kept = f", `wandb sync {option}{run.settings.sync_dir}` uploads what it kept"
            mend_folders(self._out / "wandb", self._run_id, own=Path(run.settings.sync_dir))
            step = _last_step(self._missing)
            for entry in self._missing:
                run.log({name: value for name, value in entry.items() if value is not None})
            self._missing = []
            while not isinstance(item := self._waiting.get(), _End):
                if isinstance(item, _Picture):
                    _log_picture(run, item)
                elif isinstance(item, _Alert):
                    run.alert(item.title, item.text, level="WARN")
                else:
                    run.log(item)
                    step = item["step"]
            doing = f"did not take everything within {FINISH_TIMEOUT_S} s"
            run.finish(exit_code=item.exit_code)
            wandb_file = Path(run.settings.sync_file)
            _tear_down()
            if not is_whole(wandb_file):
                self._give_up("ended before it had written everything")
            elif step and not self._over:
                sync_file(wandb_file)
                note_mirrored(self._out, step)
        except Exception as error:  # the mirror may fail in any way: training goes on
            self._give_up(f"{doing} ({_in_one_line(error)})")
        finally:
            _tear_down()

    def _start(self) -> Any:
        """Returns a W&B run: online if that works within `INIT_TIMEOUT_S`, else offline."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its own telemetry keeps the process from exiting
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))  # else it announces where it found the key
        if self._connection == "online":
            try:
                return self._init("online")
            except Exception as error:  # no server, a refused key, a timeout: wandb has no common class for them
                if self._over:
                    raise
                logger.warning(
                    "W&B cannot be reached (%s); this run is kept offline, `wandb sync %s` uploads it later",
                    _in_one_line(error),
                    self._out / "wandb" / f"offline-run-*-{self._run_id}",
                )
                _tear_down()  # its process still holds the run id
        return self._init("offline")

    def _init(self, mode: Connection) -> Any:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tubelet"),
            group=self._stage,
            job_type=self._stage,
            name=self._out.resolve().name,
            dir=self._out,
            id=self._run_id,
            resume="allow",
            mode=mode,
            config=self._config,
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                disable_git=True,
                x_disable_machine_info=True,  # which would tell the command line and SLURM's variables as they are
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def missing_lines(out: Path, record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines of a record that the mirror may lack; forgets what it has of steps that are no longer there."""
    path = _mirrored(out)
    try:
        noted = int(path.read_text())
    except (OSError, ValueError):
        noted = -1  # not even what was logged before the first step
    if noted > _last_step(record):
        noted = _last_step(record)
        note_mirrored(out, noted)
    return [entry for entry in record if entry["step"] > noted]


def note_mirrored(out: Path, step: int) -> None:
    """Notes the step up to which the mirror is whole."""
    write_text(_mirrored(out), f"{step}\n")


def _mirrored(out: Path) -> Path:
    return out / "wandb" / "mirrored_step"


def _last_step(record: list[dict[str, Any]]) -> int:
    return record[-1]["step"] if record else 0


def _log_picture(run: Any, picture: _Picture) -> None:
    import wandb

    with contextlib.suppress(FileNotFoundError):
        run.log({"step": picture.step, picture.name: wandb.Image(str(picture.path))})


def _kill_core() -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == CORE:
                child.kill()


def _tear_down() -> None:
    """Stops what is left of wandb, so that its hook at exit neither waits nor prints a traceback.

    Where its process has died, wandb would end ours with that one's exit code.
    """
    with contextlib.suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def _in_one_line(error: Exception) -> str:
    told = textwrap.shorten(str(error), 200, placeholder=" ...")
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
