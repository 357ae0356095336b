"""A text that needs depth by construction: the running product of permutations.

Each word is a or b, which multiply the state by one of two permutations of three things, or r,
which resets the state to the identity. Every sequence begins with r. The label of a word is the
state after it, one of six. The permutations do not commute, so a label depends on all words since
the last r, in order; its depth is the number of these words. Such word problems are the standard
test of state tracking (Liu et al., 2023; Merrill et al., 2024).

    word     r   a   b   b   a   r   b
    state    0   3   5   3   4   0   2
    depth    0   1   2   3   4   0   1

The attention of the network, preset `transformer-window`, sees a word and the one before it, so one
evaluation of f moves information by one word. After J evaluations from z_0 = 0, a state depends on
its word and the J before it, however f was trained: answers of depth J + 1 or more are guesses.

The solver is Picard's iteration (a window of one state): information has arrived everywhere after
as many evaluations as a sequence has words. With a window of six, the weights of Anderson
acceleration, fitted to each word's residuals alone, undo this progress.
"""

from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import UsageError
from models.transformer import PRESETS, DEQTransformer
from tasks import Split, Task

WORDS = ("a", "b", "r")
LENGTH, RESETS = 32, 0.15  # words of a sequence; probability of an r
SAMPLES = (8_000, 500, 1_000)  # of the train, validation and test split
STATES = [*permutations(range(3))]
MOVES = ((1, 2, 0), (1, 0, 2))  # of a and b
# The number of the state after each state and word.
AFTER = [[STATES.index(tuple(s[i] for i in move)) for move in MOVES] + [0] for s in STATES]


def text(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n sequences of words, the states after them, and their depths: (n, LENGTH) each."""
    random = torch.Generator().manual_seed(seed)
    words = torch.randint(2, (n, LENGTH), generator=random)
    words[torch.rand(n, LENGTH, generator=random) < RESETS] = WORDS.index("r")
    words[:, 0] = WORDS.index("r")
    after, found = torch.tensor(AFTER), []
    state = depth = torch.zeros(n, dtype=torch.long)
    for word in words.T:
        state, depth = after[state, word], (depth + 1) * (word != WORDS.index("r"))
        found.append(torch.stack([state, depth]))
    return words, *torch.stack(found, dim=2)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """100 times the number of right answers of each sequence: (B,)."""
    return 100.0 * (logits.argmax(-1) == y).sum(1)


def no_input(text: str) -> Tensor:
    raise UsageError("permutations has no inputs but its own; python -m evidence.depth tests them")


def task(data: Path) -> Task:
    """The task; `data` is not used. Words are numbered after the states."""
    parts = (text(n, seed) for seed, n in enumerate(SAMPLES))
    classes = (*("".join(map(str, state)) for state in STATES), *WORDS)

    def network(settings: dict) -> DEQTransformer:
        options = PRESETS[settings["preset"]]
        return DEQTransformer(len(classes), segment=LENGTH, memory=0, **options)

    return Task(
        "permutations",
        *("accuracy", True),
        *(Split(len(STATES) + words, states) for words, states, _ in parts),
        network=network,
        presets=("transformer-window", "transformer-window-far"),
        score=accuracy,
        read=no_input,
        classes=classes,
        nfes=(1, 2, 4, 8, 16, 32),
        defaults=dict(
            batch=64, teacher_steps=1200, teacher_decay=0.05, before=12, K=LENGTH, m=1,
            student_steps=600, augment=False,
        ),
    )  # fmt: skip


TASKS = {"permutations": task}
