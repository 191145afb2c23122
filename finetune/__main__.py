"""`python -m finetune`: what `tubelet finetune` does, for torchrun, accelerate, deepspeed and srun to start."""

import sys

from finetune.config import FinetuneConfig
from pretrain.commandline import parse, run_command
from pretrain.engine.progress import set_up_logging


def main(arguments: list[str]) -> int:
    """Finetunes as the arguments say; returns the exit code."""

    def command() -> None:
        config = parse(FinetuneConfig, "finetune", arguments)
        from finetune.finetuning import finetune

        finetune(config)

    set_up_logging()
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
