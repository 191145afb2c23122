"""`tubelet merge`: makes one shard set of the parts that `tubelet pack --part I/N` has packed.

The shards are there and stay as they are; what is written is what a pack in one piece would write last.
"""

import dataclasses
from pathlib import Path

from pretrain.data.pack import telling_how_to_go_on
from pretrain.data.pack_folder import PackFolder
from pretrain.data.pack_plan import shard_names
from pretrain.data.pack_report import PackSummary, show_summary, summary_of_set


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Which parts to merge."""

    shards: str
    """Folder into which all parts were packed."""


def merge(config: MergeConfig) -> PackSummary:
    """Writes the index of a set whose parts are all finished; shows a closing table on standard error.

    Raises:
        Refused: The folder holds no pack, a part is not finished, a process packs into it, or no video was accepted.
        DiskFull: There is no space left.
        Interrupted: Ctrl-C was pressed.
        TubeletError: The disk failed.
    """
    folder = PackFolder(Path(config.shards))
    settings = folder.settings()
    finished_before = folder.is_finished()
    if not finished_before:
        folder.refuse_unfinished(settings)
        names = shard_names(settings["videos"], settings["samples_per_shard"])
        with telling_how_to_go_on(folder, names), folder.merging():
            finished_before = folder.is_finished()  # by another merge, since it was checked
            if not finished_before:
                folder.finish(settings)
    summary = summary_of_set(folder, finished_before)
    show_summary(summary)
    return summary
