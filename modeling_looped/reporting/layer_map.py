"""Layer maps: which layer of the teacher each run of a stored layer stands for, from a conversion's manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.layer_plan import LayerPlan
from modeling_looped.conversion.output_folder import MANIFEST


class LayerMap(NamedTuple):
    """For each stored layer, the teacher layer that it stands for in each loop; later loops are like its last.

    Attributes:
        teacher_layers: by stored layer (prelude, core, coda), by loop.
        num_teacher_layers: how many the teacher has; `None`: the manifest does not say.
        dropped: teacher layers that nothing stands for.
    """

    teacher_layers: tuple[tuple[int, ...], ...]
    num_teacher_layers: int | None = None
    dropped: tuple[int, ...] = ()

    def of(self, layer: int, loop: int) -> int:
        """The teacher layer of stored layer `layer` in loop `loop`, both from 0."""
        group = self.teacher_layers[layer]
        return group[min(loop, len(group) - 1)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a model's folder.

    Raises:
        ValueError: if there is none, or it is no JSON object.
    """
    path = folder / MANIFEST if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"manifest={str(path)!r} does not exist: a conversion writes {MANIFEST} beside the weights.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"manifest={str(path)!r} is not JSON: {error}.") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"manifest={str(path)!r} must be a JSON object.")
    return manifest


def layer_map_of(manifest: dict[str, Any], config: LoopedConfig) -> LayerMap:
    """The layer map of a model that `retrofit.py` or `compress.py` made.

    Raises:
        ValueError: if the manifest has none, or one of another model than `config`'s.
    """
    if "plan" in manifest:
        read = LayerPlan.from_manifest(manifest["plan"])
        groups = (*((layer,) for layer in read.prelude), *read.core, *((layer,) for layer in read.coda))
        dropped = tuple(manifest.get("dropped_layers", ()))
        layers = max(*read.executed, *dropped, -1) + 1
    elif "layers" in manifest and "teacher" in manifest:
        groups = tuple((row["teacher_layer"],) for row in manifest["layers"])
        dropped, layers = (), manifest["teacher"]["layers"]
    else:
        raise ValueError(
            f"the manifest, made by {manifest.get('made_by')!r}, says of no layer which teacher's it is; those of "
            "retrofit.py and compress.py do."
        )
    if len(groups) != config.num_stored_layers:
        raise ValueError(
            f"the manifest maps {len(groups)} stored layers and the model has {config.num_stored_layers}: it belongs "
            "to another model."
        )
    return LayerMap(groups, layers, dropped)


__all__ = ["LayerMap", "layer_map_of", "read_manifest"]
