"""Text generation with a loop count that the caller chooses."""

from __future__ import annotations

import copy
from typing import Any

from transformers.generation import GenerationConfig, GenerationMixin

from .configuration_looped import LoopedConfig


class LoopedGenerationMixin(GenerationMixin):
    """`GenerationMixin` that knows one more generation parameter, `num_loops`.

    Precedence: `generate(num_loops=k)`, then a `GenerationConfig(num_loops=k)` given to `generate`, then the model's own
    generation config, then `config.num_loops`. Whichever wins sizes the cache and goes to every forward of the call.
    """

    config: LoopedConfig

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        num_loops = kwargs.pop("num_loops", None)
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # Transformers keeps unknown entries of a generation config as attributes; forward must receive this one.
        if num_loops is None:
            num_loops = getattr(prepared, "num_loops", None)
        if num_loops is not None:
            model_kwargs["num_loops"] = num_loops
        return prepared, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        num_loops = model_kwargs.get("num_loops")
        if num_loops is None or num_loops == self.config.num_loops:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        # Caches are sized from `self.config`. A shallow copy of the model carries the other loop count there, so that
        # neither the user's config nor a call running in another thread sees it.
        sized = self.with_num_loops(num_loops)
        GenerationMixin._prepare_cache_for_generation(sized, generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any):
        """As in Transformers; a `num_loops` in the generation config sizes the paged cache and is used by every step."""
        num_loops = getattr(generation_config or self.generation_config, "num_loops", None)
        if num_loops is None or num_loops == self.config.num_loops:
            return super().init_continuous_batching(generation_config, *args, **kwargs)
        sized = self.with_num_loops(num_loops)
        return GenerationMixin.init_continuous_batching(sized, generation_config, *args, **kwargs)

    def with_num_loops(self, num_loops: int):
        """The same model, sharing all weights, at another default loop count.

        Useful as a cheap drafter: `model.generate(..., assistant_model=model.with_num_loops(1))`.

        Args:
            num_loops: loop count of the returned model, at least 1.
        """
        twin = copy.copy(self)
        twin.config = self.config.with_num_loops(num_loops)
        if self.base_model is not self:
            # `_modules` is shared by a shallow copy; the twin needs its own to hold a base model with its own config
            twin.__dict__["_modules"] = dict(self._modules)
            base = copy.copy(self.base_model)
            base.config = twin.config
            twin._modules[self.base_model_prefix] = base
        return twin
