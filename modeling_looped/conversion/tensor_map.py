"""Tensor maps: how the tensors of a published checkpoint become ours, and back, as data.

A state map renames. Published checkpoints also fuse, stack and repeat tensors, lay queries and keys out for another
rotary embedding, and hold tensors that their own code never reads. A `Link` says how a few of their tensors become a
few of ours, as steps that can be undone, so that one description serves both directions. A map is total: before any
tensor is read, every name on either side is accounted for and every shape is checked.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from modeling_looped.state_map import listed

#: The names that one tensor of a published checkpoint may go by. One must be there; all that are must be equal.
Names = tuple[str, ...]


class Step(ABC):
    """Abstract reversible step between lists of tensors. It moves elements and computes nothing, so it is exact."""

    @abstractmethod
    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """From the published checkpoint towards ours."""

    @abstractmethod
    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The inverse of `forward`."""


@final
@dataclasses.dataclass(frozen=True)
class Split(Step):
    """One tensor -> consecutive parts of `sizes` rows each."""

    sizes: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        return list(whole.split(self.sizes))

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors)]


@final
@dataclasses.dataclass(frozen=True)
class Stack(Step):
    """Tensors of one shape -> one tensor with a new first dimension (a table with a row per loop)."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack(tensors)]

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        (table,) = tensors
        return list(table.unbind())


@final
@dataclasses.dataclass(frozen=True)
class Transpose(Step):
    """One matrix -> its transpose."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        (matrix,) = tensors
        return [matrix.mT.contiguous()]

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        return self.forward(tensors)


@final
@dataclasses.dataclass(frozen=True)
class Repeat(Step):
    """One tensor -> `count` equal ones, for what is tied in the published checkpoint and cannot be in our model."""

    count: int

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor, *(tensor.clone() for _ in range(self.count - 1))]

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        if not all(same_bits(tensor, tensors[0]) for tensor in tensors if not tensor.is_meta):
            raise ValueError("tensors that the published checkpoint holds once have come to differ.")
        return tensors[:1]


@final
@dataclasses.dataclass(frozen=True)
class Reshape(Step):
    """One tensor of shape `before` -> the same elements in shape `after`."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor.reshape(self.after)]

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor.reshape(self.before)]


@final
@dataclasses.dataclass(frozen=True)
class HalfRotary(Step):
    """Rows of queries and keys from the interleaved rotary layout to ours.

    Interleaved embeddings turn channels (2j, 2j + 1) of a head by angle j, ours (and Llama's) channels (j, j + K/2).
    Attention only sees products of queries and keys, so a permutation of the channels of both changes nothing else.

    Attributes:
        head_dim: K.
        positions: which of the tensors (from 0) are to be permuted; weights [heads * K, ...] or biases [heads * K].
    """

    head_dim: int
    positions: tuple[int, ...]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return self._permuted(tensors, (-1, self.head_dim // 2, 2))

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        return self._permuted(tensors, (-1, 2, self.head_dim // 2))

    def _permuted(self, tensors: list[Tensor], parts: tuple[int, int, int]) -> list[Tensor]:
        return [
            tensor.unflatten(0, parts).transpose(1, 2).flatten(0, 2) if index in self.positions else tensor
            for index, tensor in enumerate(tensors)
        ]


@dataclasses.dataclass(frozen=True)
class Link:
    """Some tensors of the published checkpoint -> some of ours.

    Attributes:
        sources: the published tensors, each with the names it may go by.
        targets: our names.
        steps: applied in order; none: a plain copy.
    """

    sources: tuple[Names, ...]
    targets: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Our tensors from the published ones."""
        for step in self.steps:
            tensors = step.forward(tensors)
        return tensors

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The published tensors from ours."""
        for step in reversed(self.steps):
            tensors = step.backward(tensors)
        return tensors


def rename(source: str | Names, target: str) -> Link:
    """The link of a tensor that only changes its name."""
    return Link(((source,) if isinstance(source, str) else source,), (target,))


@dataclasses.dataclass(frozen=True)
class Unread:
    """A published tensor, optional, that does not enter our model; it is kept aside so that the way back is exact.

    Attributes:
        name: the published name.
        because: why it does not.
        expected: makes the value that it must be close to, for tables that can be computed; `None`: anything goes.
    """

    name: str
    because: str
    expected: Callable[[], Tensor] | None = None


class TensorMap:
    """A total map between a published checkpoint's tensors and ours.

    Args:
        links: between them they must fill every one of our tensors.
        unread: published tensors that none of ours is made from.
    """

    def __init__(self, links: Sequence[Link], unread: Sequence[Unread] = ()):
        self.links = tuple(links)
        self.unread = {tensor.name: tensor for tensor in unread}
        self._place_of = {
            name: (link, index) for link in links for index, names in enumerate(link.sources) for name in names
        }

    def check(self, published: Mapping[str, torch.Size], ours: Mapping[str, torch.Size]) -> None:
        """Raise ValueError unless the map takes tensors of exactly these names and shapes to each other.

        Args:
            published: shape of every tensor of the checkpoint.
            ours: shape of every tensor that our model stores.
        """
        filled = {target for link in self.links for target in link.targets}
        problems = {
            "no rule says where these go": [name for name in published if name not in self],
            "these are missing": [
                " or ".join(names)
                for link in self.links
                for names in link.sources
                if not any(name in published for name in names)
            ],
            "nothing fills": [name for name in ours if name not in filled],
            "the model has no place for": [name for name in filled if name not in ours],
            "shapes differ": [],
        }
        for link in self.links:
            if any(target not in ours for target in link.targets):
                continue
            expected = link.backward([torch.empty(ours[target], device="meta") for target in link.targets])
            for names, tensor in zip(link.sources, expected, strict=True):
                problems["shapes differ"] += [
                    f"{name} is {list(published[name])}, and the config makes it {list(tensor.shape)}"
                    for name in names
                    if name in published and published[name] != tensor.shape
                ]
        found = [f"{problem}: {listed(cases)}" for problem, cases in problems.items() if cases]
        if found:
            raise ValueError(f"the weights do not fit: {'; '.join(found)}.")

    def __contains__(self, name: str) -> bool:
        return name in self._place_of or name in self.unread

    def to_ours(self, read: Callable[[str], Tensor], present: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Our tensors by name, made one link at a time, so that no more than one link's tensors are held.

        Args:
            read: gives a published tensor.
            present: names of the published tensors there are.

        Raises:
            ValueError: where a tensor is there under several names with different values, or tensors that become one
                are of different types; names them.
        """
        for link in self.links:
            tensors = [self._read_equal(read, [name for name in names if name in present]) for names in link.sources]
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise ValueError(
                    f"{', '.join(link.targets)} would be made of tensors of different types: "
                    + ", ".join(f"{names[0]} is {t.dtype}" for names, t in zip(link.sources, tensors, strict=True))
                )
            yield from zip(link.targets, link.forward(tensors), strict=True)

    def to_published(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The published tensor `name` from ours, which `read` gives."""
        link, index = self._place_of[name]
        return link.backward([read(target) for target in link.targets])[index]

    def check_unread(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError for an unread tensor that is not what the config says it must be."""
        expected = self.unread[name].expected
        if expected is None:
            return
        wanted = expected()
        if tensor.shape != wanted.shape or not torch.allclose(tensor.float(), wanted, atol=TABLE_TOLERANCE, rtol=0):
            raise ValueError(
                f"{name} is not the table that the config describes ({self.unread[name].because}), and our model "
                "would compute with another one."
            )

    def _read_equal(self, read: Callable[[str], Tensor], names: list[str]) -> Tensor:
        tensor = read(names[0])
        for name in names[1:]:
            if not same_bits(read(name), tensor):
                raise ValueError(f"{names[0]} and {name} are one shared tensor in this family, and differ here.")
        return tensor


#: Tables of sines and inverse frequencies may be stored in bfloat16, or computed by another device.
TABLE_TOLERANCE = 1e-2


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in type, shape and every bit (NaN and the sign of zero included)."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    )


__all__ = [
    "HalfRotary",
    "Link",
    "Names",
    "Repeat",
    "Reshape",
    "Split",
    "Stack",
    "Step",
    "TensorMap",
    "Transpose",
    "Unread",
    "rename",
    "same_bits",
]
