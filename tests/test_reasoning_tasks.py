"""The generated tasks of benchmarks/reasoning.py: every answer checked by a solver that follows the definition."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from reasoning_tasks import NOTHING, TASKS, Addition, Composition, Hops


def solve_hops(task: Hops, tokens: list[int]) -> list[tuple[int, int]]:
    """Walk back to the same token, p times, one place after it each time."""
    hops, symbols = tokens[0] - task.symbols + 1, tokens[1:]
    solved = [(NOTHING, 0)]
    for start in range(len(symbols)):
        place = start
        for _ in range(hops):
            earlier = [j for j in range(place) if symbols[j] == symbols[place]]
            place = earlier[-1] + 1 if earlier else None
            if place is None:
                break
        solved.append((NOTHING, 0) if place is None else (symbols[place], hops))
    return solved


def solve_addition(task: Addition, tokens: list[int]) -> list[tuple[int, int]]:
    """Python's own addition; a digit's hardness from the columns below it."""
    first, second = tokens[: task.digits], tokens[task.digits + 1 : 2 * task.digits + 1]
    total = int("".join(map(str, first))) + int("".join(map(str, second)))
    digits = [int(digit) for digit in str(total).zfill(task.digits + 1)]
    hardness = []
    for place in range(task.digits + 1):  # of the sum, which has one column more than the numbers
        below = list(zip(first[place:], second[place:], strict=True))
        run = next((i for i, (a, b) in enumerate(below) if a + b != 9), len(below))
        hardness.append(run + 1)
    silent = [(NOTHING, 0)] * (len(tokens) - task.digits - 1)
    return silent + list(zip(digits, hardness, strict=True))


def solve_composition(task: Composition, tokens: list[int]) -> list[tuple[int, int]]:
    """Apply the function until nothing changes."""
    image = tokens[: task.nodes]
    solved = [(NOTHING, 0)] * task.nodes
    for asked in tokens[task.nodes :]:
        node, steps = asked - task.nodes, 0
        while image[node] != node:
            node, steps = image[node], steps + 1
        solved.append((node, max(1, steps)))
    return solved


SOLVERS = {"hops": solve_hops, "addition": solve_addition, "composition": solve_composition}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_the_one_that_the_definition_gives(name, split):
    task = TASKS[name]
    for hardest in (task.trained, task.hardest):
        problems = task.problems(split, 60, seed=3, hardest=hardest)
        assert problems.inputs.shape == problems.answers.shape == (60, task.length)
        assert 0 <= problems.inputs.min() <= problems.inputs.max() < task.vocab_size
        assert problems.hardness.max() == hardest  # so hard ones are really among them
        for tokens, answers, hardness in zip(*(part.tolist() for part in problems), strict=True):
            solved = SOLVERS[name](task, tokens)
            assert answers == [answer for answer, _ in solved]
            assert hardness == [steps for _, steps in solved]


@pytest.mark.parametrize("name", TASKS)
def test_problems_follow_from_the_seed_and_the_splits_are_disjoint(name):
    task = TASKS[name]
    train, again, other = (task.problems("train", 400, seed=seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, train, again))
    assert not torch.equal(train.inputs, other.inputs)
    assert len(train.inputs) == 400
    rows = [{tuple(row) for row in part.inputs.tolist()} for part in (train, task.problems("test", 400, seed=0))]
    assert not rows[0] & rows[1]
    assert min(map(len, rows)) > 390  # they hardly repeat themselves either


@pytest.mark.parametrize("name", TASKS)
def test_every_hardness_up_to_the_hardest_is_asked_for_often(name):
    task = TASKS[name]
    hardness = task.problems("train", 400, seed=0).hardness
    counts = torch.bincount(hardness[hardness > 0])[1:]
    assert len(counts) == task.trained
    assert counts.min() > 0.02 * counts.sum()


def test_bad_requests_are_refused():
    task = TASKS["addition"]
    with pytest.raises(ValueError, match="split='valid' must be one of: train, test"):
        task.problems("valid", 1, seed=0)
    with pytest.raises(ValueError, match=r"hardest=10 must lie in 1\.\.9 for addition"):
        task.problems("train", 1, seed=0, hardest=10)
