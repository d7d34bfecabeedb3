"""Generated tasks whose answers take several steps, made without end from a seed.

N problems, S tokens. Answers stand at the positions of the tokens that ask for them, so a model answers all of a
problem in one forward, and what it can do is bounded by its depth, not by the number of tokens that it writes. How
many steps an answer takes, its hardness, is known for each.

Training and test problems are disjoint by construction: a hash of the problem says to which of the two it belongs.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

#: Target where nothing is asked: the index that cross-entropy ignores.
NOTHING = -100
#: One problem in so many belongs to the test.
TEST_SHARE = 8
SPLITS = ("train", "test")


class Problems(NamedTuple):
    """Problems.

    Attributes:
        inputs: token ids [N, S].
        answers: token id that is to be predicted at each position, `NOTHING` where nothing is asked [N, S].
        hardness: steps that each answer takes [N, S]; 0 where nothing is asked.
    """

    inputs: Tensor
    answers: Tensor
    hardness: Tensor


class Task(ABC):
    """Abstract task.

    Attributes:
        name: what it is called.
        vocab_size, length: tokens that there are, and S.
        trained: largest hardness in training.
        hardest: largest hardness that can be asked for.
    """

    name: str
    vocab_size: int
    length: int
    trained: int
    hardest: int

    @abstractmethod
    def draw(self, random: np.random.Generator, count: int, hardest: int) -> Problems:
        """`count` problems, none of whose answers takes more than `hardest` steps; arrays become tensors later."""

    def problems(self, split: str, count: int, *, seed: int, hardest: int | None = None) -> Problems:
        """`count` problems of a split, the same for the same arguments.

        Args:
            split: `train` or `test`, which share no problem.
            count: N.
            seed: of the draw, at least 0.
            hardest: largest hardness of an answer; `None`: that of training.

        Raises:
            ValueError: for a split or a hardness that does not exist.
        """
        hardest = self.trained if hardest is None else hardest
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of: {', '.join(SPLITS)}.")
        if not 1 <= hardest <= self.hardest:
            raise ValueError(f"hardest={hardest} must lie in 1..{self.hardest} for {self.name}.")
        random = np.random.default_rng([zlib.crc32(self.name.encode()), SPLITS.index(split), seed])
        kept: list[Problems] = []
        missing = count
        while missing > 0:
            enough = TEST_SHARE * missing if split == "test" else missing + missing // 4 + 8
            drawn = self.draw(random, enough, hardest)
            chosen = (split_of(drawn.inputs) == split).nonzero()[0][:missing]
            kept.append(Problems(*(part[chosen] for part in drawn)))
            missing -= len(chosen)
        return Problems(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*kept, strict=True)))


def split_of(inputs: np.ndarray) -> np.ndarray:
    """The split that each problem belongs to, from its tokens [N, S]."""
    rows = np.ascontiguousarray(inputs, dtype="<i4")
    hashes = np.array([zlib.crc32(row.tobytes()) for row in rows])
    return np.where(hashes % TEST_SHARE == 0, "test", "train")


@final
class Hops(Task):
    """Multi-hop induction (Sanford, Hsu and Telgarsky 2024, arXiv 2402.09268, section 4.1).

    From a token, a hop goes to the place right after the latest earlier place of the same token. The first token of a
    problem says how many hops p; every later one asks where p hops lead from it, and the answer is the token there.
    """

    name = "hops"

    def __init__(self, *, symbols: int = 4, sequence: int = 32, trained: int = 3, hardest: int = 3):
        self.symbols, self.trained, self.hardest = symbols, trained, hardest
        self.vocab_size, self.length = symbols + hardest, sequence + 1

    def draw(self, random: np.random.Generator, count: int, hardest: int) -> Problems:
        steps = random.integers(1, self.symbols, (count, self.length - 1))
        symbols = steps.cumsum(axis=1) % self.symbols  # no token twice in a row, where a hop would stand still
        hops = random.integers(1, hardest + 1, count)
        hop = latest_successor(symbols, self.symbols)
        place = np.broadcast_to(np.arange(self.length - 1), symbols.shape)
        for done in range(hardest):
            going = (done < hops)[:, None] & (place >= 0)
            place = np.where(going, np.take_along_axis(hop, place.clip(0), axis=1), place)
        answers = np.where(place >= 0, np.take_along_axis(symbols, place.clip(0), axis=1), NOTHING)
        hardness = np.where(place >= 0, hops[:, None], 0)
        return Problems(
            np.concatenate((self.symbols + hops[:, None] - 1, symbols), axis=1),
            np.pad(answers, ((0, 0), (1, 0)), constant_values=NOTHING),
            np.pad(hardness, ((0, 0), (1, 0))),
        )


def latest_successor(symbols: np.ndarray, count: int) -> np.ndarray:
    """For each place, the one after the latest earlier place of the same symbol; -1 where there is none [N, S]."""
    rows = np.arange(len(symbols))
    latest = np.full((len(symbols), count), -2)
    hop = np.empty_like(symbols)
    for place in range(symbols.shape[1]):
        hop[:, place] = latest[rows, symbols[:, place]] + 1
        latest[rows, symbols[:, place]] = place
    return hop


@final
class Addition(Task):
    """Addition of two numbers of n digits, most significant first, all n + 1 digits of the sum asked at once.

    A digit of the sum takes 1 step and one more for each column below it, without a gap, whose digits add up to 9:
    through those a carry passes on, if there is one. Their share is drawn anew for every problem, from none to all.
    """

    name = "addition"

    def __init__(self, *, digits: int = 8, trained: int = 5):
        self.digits, self.trained, self.hardest = digits, trained, digits + 1
        self.vocab_size, self.length = 13, 3 * digits + 3

    def draw(self, random: np.random.Generator, count: int, hardest: int) -> Problems:
        passes = random.random((count, self.digits)) < random.random((count, 1))
        run = np.zeros(count, dtype=int)
        before = np.empty((count, self.digits + 1), dtype=int)  # columns that pass on, right below each digit
        for column in range(self.digits):  # from the least significant
            before[:, column] = run
            passes[:, column] &= run + 1 < hardest
            run = np.where(passes[:, column], run + 1, 0)
        before[:, -1] = run
        first = random.integers(0, 10, passes.shape)
        other = (9 - first + random.integers(1, 10, passes.shape)) % 10  # any digit but 9 - first
        second = np.where(passes, 9 - first, other)
        total, carry = np.empty_like(before), np.zeros(count, dtype=int)
        for column in range(self.digits):
            carry, total[:, column] = np.divmod(first[:, column] + second[:, column] + carry, 10)
        total[:, -1] = carry

        def symbol(index: int, width: int = 1) -> np.ndarray:
            return np.full((count, width), index)

        asked = self.digits + 1
        inputs = (first[:, ::-1], symbol(10), second[:, ::-1], symbol(11), symbol(12, asked))
        silent = symbol(NOTHING, self.length - asked)
        return Problems(
            np.concatenate(inputs, axis=1),
            np.concatenate((silent, total[:, ::-1]), axis=1),
            np.concatenate((0 * silent, before[:, ::-1] + 1), axis=1),
        )


@final
class Composition(Task):
    """Iterated composition of a function with itself, until nothing changes any more.

    The function maps n nodes to nodes and is listed as f(0) ... f(n-1). Its graph is a few chains, which end in nodes
    that are mapped to themselves. Then every node is asked for, in random order: where does its chain end? A node's
    hardness is the number of applications that this takes, at least 1.
    """

    name = "composition"

    def __init__(self, *, nodes: int = 16, chains: int = 4, trained: int = 4, hardest: int = 12):
        self.nodes, self.chains, self.trained, self.hardest = nodes, chains, trained, hardest
        self.vocab_size, self.length = 2 * nodes, 2 * nodes

    def draw(self, random: np.random.Generator, count: int, hardest: int) -> Problems:
        image, end, distance = self.mappings(random, count, hardest)
        asked = random.permuted(np.broadcast_to(np.arange(self.nodes), image.shape), axis=1)
        answers = np.take_along_axis(end, asked, axis=1)
        steps = np.take_along_axis(distance, asked, axis=1).clip(1)
        return Problems(
            np.concatenate((image, self.nodes + asked), axis=1),
            np.concatenate((np.full_like(image, NOTHING), answers), axis=1),
            np.concatenate((np.zeros_like(image), steps), axis=1),
        )

    def mappings(self, random: np.random.Generator, count: int, longest: int) -> tuple[np.ndarray, ...]:
        """Functions as chains: image, end and distance (at most `longest`) to the end of every node [count, nodes]."""
        shares = random.exponential(size=(count, self.chains, 1)).cumsum(axis=1)  # chains of unequal lengths
        chain = (random.random((count, 1, self.nodes)) * shares[:, -1:] > shares).sum(axis=1)
        earlier = np.tri(self.nodes, k=-1, dtype=bool)
        place = ((chain[:, :, None] == chain[:, None, :]) & earlier).sum(axis=2)
        chain += self.chains * (place // (longest + 1))  # what would be too long begins a chain of its own
        same = (chain[:, :, None] == chain[:, None, :]) & earlier  # [.., node, one before it]
        distance = same.sum(axis=2)
        itself = np.arange(self.nodes)
        previous = np.where(distance == 0, itself, np.where(same, itself, -1).max(axis=2))
        first = np.where(distance == 0, itself, np.where(same, itself, self.nodes).min(axis=2))
        # so far nodes stand in the order of their chains; now they get their names
        order = random.permuted(np.broadcast_to(itself, (count, self.nodes)), axis=1)
        named = np.take_along_axis(order, previous, axis=1), np.take_along_axis(order, first, axis=1), distance
        results = tuple(map(np.empty_like, named))
        for result, values in zip(results, named, strict=True):
            np.put_along_axis(result, order, values, axis=1)
        return results


TASKS: dict[str, Task] = {task.name: task for task in (Hops(), Addition(), Composition())}
