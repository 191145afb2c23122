"""`python -m finetune`: what `tubelet finetune` does, for torchrun, accelerate, deepspeed and srun to start.

Each loader worker imports this file again, so it imports what it needs where it needs it.
"""

import sys


def main(arguments: list[str]) -> int:
    """Finetunes as the arguments say; returns the exit code."""
    from pretrain.commandline import parse, run_command
    from pretrain.engine.progress import set_up_logging

    def command() -> None:
        from finetune.config import FinetuneConfig

        config = parse(FinetuneConfig, "finetune", arguments)
        from finetune.finetuning import finetune

        finetune(config)

    set_up_logging()
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
