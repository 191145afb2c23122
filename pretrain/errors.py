"""The errors that Tubelet raises on purpose.

The command line turns each into one line on standard error and its exit code; anything else is a bug and shows its
traceback. Every message names the file or the field that is wrong and the remedy.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 3
EXIT_GO_ON_LATER = 75
EXIT_INTERRUPTED = 130


class TubeletError(Exception):
    """Something failed in a way that Tubelet foresaw; the work done so far is safe.

    Attributes:
        exit_code: With which the command ends.
        told: Whether rank 0 meets it too and tells it for all ranks.
    """

    exit_code = EXIT_FAILED
    told = False


class Refused(TubeletError):
    """Bad input: nothing was started and nothing was written."""

    exit_code = EXIT_REFUSED


class StoppedByRule(TubeletError):
    """A rule stopped the run: a non-finite loss, or too many bad samples; all ranks find it together."""

    exit_code = EXIT_STOPPED
    told = True


class Preempted(TubeletError):
    """A signal or a limit of time ended the work before its end; what is saved goes on by the same command."""

    exit_code = EXIT_GO_ON_LATER


class Interrupted(Preempted):
    """Ctrl-C ended the work before its end."""

    exit_code = EXIT_INTERRUPTED


class BadSample(TubeletError):
    """A video that cannot be decoded; training replaces it, evaluation counts it as an error."""


class DiskFull(TubeletError):
    """A write failed for want of space; what was complete before is still there."""

    exit_code = EXIT_REFUSED


def reason_of_failure(error: Exception) -> str:
    """Returns in one line why a video was given up; one strange file must not end the work on a million.

    A bad sample has its own reason; of anything else that a library threw, the kind is told.
    """
    if isinstance(error, BadSample):
        return str(error)
    if isinstance(error, MemoryError):
        return "does not fit in memory"
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"


def printable(text: str) -> str:
    """Returns text on one line, with escapes in place of what no terminal shows, such as names of no known encoding."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
