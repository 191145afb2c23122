"""torchrun that ends with the exit code of the rank that failed first; its own is 1, whatever a rank ends with."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from pretrain.errors import EXIT_FAILED


def run(arguments: list[str]) -> int:
    """Runs torchrun with its own arguments; returns the exit code."""
    try:
        main(arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)  # which rank failed, and on which host
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
