"""`python -m pretrain`: what `tubelet pretrain` does, for torchrun, accelerate, deepspeed and srun to start.

Each loader worker imports this file again, so it imports what it needs where it needs it.
"""

import sys


def main(arguments: list[str]) -> int:
    """Pretrains as the arguments say; returns the exit code."""
    from pretrain.commandline import parse, run_command
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from pretrain.config import PretrainConfig

        config = parse(PretrainConfig, "pretrain", arguments)
        from pretrain.pretraining import pretrain

        pretrain(config)

    set_up_logging()
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
