"""What model and mixup draw in a step: a function of the seed, the step, the rank and the micro-batch alone."""

import random

import numpy as np
import torch


def seed_draws(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Seeds everything that model and mixup draw from, so that a step's draws do not depend on the steps before."""
    state = np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(3)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))
    random.seed(int(state[2]))
