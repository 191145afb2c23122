"""Whether the W&B server answers, asked before a run and within seconds; a run goes on offline where it does not."""

import os
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

ANSWER_WITHIN_S = 3.0
PUBLIC_SERVER = "https://api.wandb.ai"


def unreachable_because(within_s: float = ANSWER_WITHIN_S) -> str | None:
    """Returns why the W&B server does not answer, or None if it does, whatever it answers.

    The question is asked in a thread of its own: resolving a name has no limit of time.
    """
    outcome: list[str | None] = []
    asking = threading.Thread(target=lambda: outcome.append(_ask(within_s)), daemon=True)
    asking.start()
    asking.join(within_s)
    return outcome[0] if outcome else f"no answer within {within_s:g} s"


def server_url() -> str:
    """Returns the server that W&B would use, without a password in it."""
    parts = urlsplit(os.environ.get("WANDB_BASE_URL") or PUBLIC_SERVER)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}"


def _ask(within_s: float) -> str | None:
    try:
        with urllib.request.urlopen(f"{server_url()}/healthz", timeout=within_s):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
