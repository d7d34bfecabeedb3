"""Strategies as data in the config and objects in the model.

A strategy is one choice of the architecture (how the prelude enters a loop, how a loop's result becomes the next
state, ...). In `config.json` it is a mapping with a `type` and that type's parameters, the way `rope_parameters` does
it:
`{"type": "diagonal", "initial_decay": 0.447}`. In the model it is a small module. A `Registry` joins the two: it
checks and completes the mapping when the config is made, and builds the module when the model is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import nn


class LayerShape(NamedTuple):
    """Sizes of one stored layer.

    Attributes:
        hidden_size: width D of the residual stream it works on.
        intermediate_size: width of its MLP.
        num_attention_heads, num_key_value_heads, head_dim: of its attention.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class BuildContext:
    """What a strategy may know of the model it is built for.

    Attributes:
        hidden_size: width D of the state.
        num_core_layers: layers R inside one loop.
        core_groups: groups of core layers that loop one after the other.
        initializer_range: standard deviation of the model's normal initialisation.
        rms_norm_eps: epsilon of the model's norms.
        outer_size: width of prelude and coda; `None`: that of the state.
        vocab_size: number of tokens.
        layer_shapes: sizes of every stored layer.
    """

    hidden_size: int
    num_core_layers: int
    initializer_range: float
    rms_norm_eps: float
    outer_size: int | None = None
    vocab_size: int = 0
    layer_shapes: tuple[LayerShape, ...] = ()
    core_groups: int = 1

    @property
    def prelude_size(self) -> int:
        """Width of what the prelude gives and the coda takes."""
        return self.hidden_size if self.outer_size is None else self.outer_size


@dataclasses.dataclass(frozen=True)
class NoParams:
    """The parameters of a strategy that has none."""


class SelfInitialised(nn.Module):
    """A module that knows how its own parameters and buffers start (not those of modules inside it: Transformers asks
    each module that owns some, and no other).
    """

    def init_weights(self) -> None:
        """Fill them, only through `transformers.initialization` (it keeps loaded ones)."""


class Strategy(SelfInitialised, ABC):
    """Base of all strategies: abstract families derive from it, final types from those.

    A type names its parameters in `Params`, a frozen dataclass whose `__post_init__` raises `ValueError` for values
    that make no sense. A parameter called `table_loops` (`None` by default) is the number of loops that have rows of
    their own in the type's tables; the config replaces `None` by `num_loops` once, so that changing the loop count
    later never changes the shape of a weight. Loops beyond the table use its last row.
    """

    Params: ClassVar[type] = NoParams

    def __init__(self, params: Any, context: BuildContext):
        super().__init__()
        self.params = params
        self.context = context

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(self.params).items())


def table_row(loop_idx: int, rows: int) -> int:
    """Row of a per-loop table of `rows` rows that loop `loop_idx` (from 0) uses: its own, or the last."""
    return min(loop_idx, rows - 1)


StrategyT = TypeVar("StrategyT", bound=Strategy)


class Registry(Generic[StrategyT]):
    """The types of one strategy field of `LoopedConfig`.

    Args:
        field: the config field these strategies are named in; every error names it.
    """

    def __init__(self, field: str):
        self.field = field
        self._types: dict[str, type[StrategyT]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[type[StrategyT]], type[StrategyT]]:
        """Class decorator: make a type known as `name` (and under the field's other words for it)."""

        def decorate(cls: type[StrategyT]) -> type[StrategyT]:
            self._types[name] = cls
            self._aliases.update(dict.fromkeys(aliases, name))
            return cls

        return decorate

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __getitem__(self, name: str) -> type[StrategyT]:
        return self._types[name]

    def normalise(self, spec: Mapping[str, Any] | str, *, num_loops: int | None = None) -> dict[str, Any]:
        """Check a spec and return it complete: a plain dict with `type` and every parameter.

        Args:
            spec: `{"type": name, **params}`, or just the name.
            num_loops: fills `table_loops` where the spec leaves it open; `None` leaves it open too.

        Raises:
            ValueError: for an unknown type, an unknown parameter or a bad value; names field, value and what is
                allowed.
        """
        if isinstance(spec, str):
            spec = {"type": spec}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
            raise ValueError(
                f'{self.field}={spec!r} must be a type name or a mapping {{"type": name, ...}}; '
                f"known types: {self._known()}."
            )
        given = {key: value for key, value in spec.items() if key != "type"}
        name = self._aliases.get(spec["type"], spec["type"])
        if name not in self._types:
            raise ValueError(f"{self.field}: unknown type {spec['type']!r}; known types: {self._known()}.")
        fields = {field.name: field for field in dataclasses.fields(self._types[name].Params)}
        for key in given:
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                allowed = ", ".join(fields) or "none"
                raise ValueError(
                    f"{self.field}: type {name!r} has no parameter {key!r} (its parameters: {allowed}).{hint}"
                )
        if "table_loops" in fields and given.get("table_loops") is None and num_loops is not None:
            given["table_loops"] = num_loops
        try:
            params = self._params(name, given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.field}: type {name!r}: {error}") from error
        # Through plain lists, so that a spec read back from JSON equals the one that was written.
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(params).items()}
        return {"type": name, **values}

    def build(self, spec: Mapping[str, Any], context: BuildContext) -> StrategyT:
        """Build the module of a spec that `normalise` has completed."""
        given = {key: value for key, value in spec.items() if key != "type"}
        return self._types[spec["type"]](self._params(spec["type"], given), context)

    def _params(self, name: str, given: Mapping[str, Any]) -> Any:
        """The parameters of type `name`, as their annotations have them."""
        params = self._types[name].Params
        kinds = annotations_of(params)
        return params(**{key: of_kind(key, value, kinds[key]) for key, value in given.items()})

    def _known(self) -> str:
        return ", ".join(sorted(self._types))


#: The evaluated annotations of a class; a config is made anew often enough for the evaluation to show.
annotations_of = functools.cache(typing.get_type_hints)


def of_kind(name: str, value: Any, kind: Any) -> Any:
    """`value` as a parameter annotated with `kind` holds it: a list from JSON as a tuple, a whole number as a float.

    Raises:
        TypeError: for a value of another kind (`True` is no number).
    """
    for allowed in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        if type(value) is allowed:
            return value
        if allowed is float and type(value) is int:
            return float(value)
        if typing.get_origin(allowed) is tuple and isinstance(value, list | tuple):
            return tuple(of_kind(name, item, typing.get_args(allowed)[0]) for item in value)
    raise TypeError(f"{name}={value!r} must be of type {kind.__name__ if isinstance(kind, type) else kind}.")


def check_table_loops(table_loops: int | None) -> None:
    """Shared check of the `table_loops` parameter."""
    if table_loops is not None and (not isinstance(table_loops, int) or table_loops < 1):
        raise ValueError(f"table_loops={table_loops!r} must be None (the loop count) or an integer of at least 1.")


__all__ = [
    "BuildContext",
    "LayerShape",
    "NoParams",
    "Registry",
    "SelfInitialised",
    "Strategy",
    "check_table_loops",
    "table_row",
]
