"""Exporting: an imported checkpoint, trained further or not, in the format that it was published in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling_looped.depth_sampling import STEP

from .checkpoint import Steps
from .companions import CODE_FILES, GENERATION_CONFIG, LICENCE_FILES, TOKENIZER_FILES, code_named, copy_files
from .importing import ASIDE, ORIGINAL, described, our_shapes
from .output_folder import MANIFEST, check_output, staged
from .published import PUBLISHED
from .stored_tensors import StoredTensors


def export_checkpoint(
    source: Path,
    output: Path,
    *,
    like: Path | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Write the checkpoint in `source` to `output` as it was published: names, layout, files and config.

    With weights that have not been touched every tensor is equal to the original's in each bit.

    Args:
        source: folder with a looped checkpoint.
        output: folder to write; must not exist or be empty.
        like: folder that `import_checkpoint` wrote, whose manifest says what the original was like; `None`: `source`.
            Tokenizer and licence come from it where `source` has none.
        report: is called with each line of progress.

    Raises:
        ValueError: if there is no such manifest, or the model is no longer one that the original's config describes.
    """
    step = Steps(report)
    check_output(output, overwrite=False)  # what is there holds no manifest, so nothing tells whose it is
    like = source if like is None else like
    manifest = read_manifest(like)
    original = manifest["original"]
    family = PUBLISHED[manifest["family"]]
    told = {**original["config"], **original["settings"]}
    model_class = family.model_class_for(told)
    config_class: Any = model_class.config_class
    config = config_class.from_pretrained(source)
    refuse_changes(manifest["looped"], described(config), source)
    ours = our_shapes(model_class, config)
    names = [name for names in original["files"].values() for name in names]
    tensor_map = family.tensor_map(told, config, ours, names)
    stored = StoredTensors(source)
    check_ours(stored.shapes, ours, source)
    unread = load_file(like / ASIDE) if manifest["unread"] else {}

    def tensor(name: str) -> Tensor:
        return unread[name] if name in unread else tensor_map.to_published(name, stored.read)

    if manifest["dtype"] is not None:
        report(f"   note: the import changed the weights to {manifest['dtype']}, and so they stay")
    with staged(output) as folder:
        weight_map = {}
        for file_name, file_names in original["files"].items():
            step(f"writing {file_name}")
            # clones: several names of one shared tensor are separate tensors in a safetensors file
            tensors = {name: tensor(name).clone(memory_format=torch.contiguous_format) for name in file_names}
            if file_name.endswith(".safetensors"):
                save_file(tensors, folder / file_name, metadata={"format": "pt"})
            else:
                torch.save(tensors, folder / file_name)
            weight_map |= dict.fromkeys(file_names, file_name)
        if original["index_metadata"] is not None:
            index = {"metadata": original["index_metadata"], "weight_map": weight_map}
            write_json(folder / f"{original['weight_file']}.index.json", index)
        write_json(folder / "config.json", original["config"])
        if original["generation_config"] is not None:
            write_json(folder / GENERATION_CONFIG, original["generation_config"])
        for place in (like, source):  # of a file in both, the one that training left
            copy_files(place, folder, (*TOKENIZER_FILES, *LICENCE_FILES))
        code = copy_files(like / ORIGINAL, folder, CODE_FILES)  # the code beside our weights is ours
    step(f"saved to {output}")
    missing = [name for name in code_named(original["config"]) if name not in code]
    if missing:
        report(
            f"   note: config.json names code that the import did not keep: {', '.join(missing)}; copy it from the "
            "original, with what it imports, or the checkpoint does not load with trust_remote_code"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an imported checkpoint.

    Raises:
        ValueError: if there is none, or another conversion wrote it.
    """
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "original" not in manifest:
        raise ValueError(
            f"{folder} has no {MANIFEST} of an imported checkpoint, which says what the original was like; name the "
            "folder that import_checkpoint.py wrote with --like."
        )
    return manifest


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], source: Path) -> None:
    """Raise ValueError if the config is no longer the one that the original's config became."""
    changed = [
        f"{name}={now.get(name)!r} (was {before.get(name)!r})"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{source} is not what the original's config describes any more: {', '.join(changed)}. Set it back, or "
            "keep the checkpoint in our format."
        )


def check_ours(stored: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], source: Path) -> None:
    """Raise ValueError unless `source` holds the tensors that its config describes."""
    missing = [name for name in ours if name not in stored]
    wrong = [name for name, shape in stored.items() if ours.get(name) != shape and not name.endswith(STEP)]
    if missing or wrong:
        raise ValueError(
            f"{source} does not hold the weights of its config: missing: {', '.join(missing) or 'none'}; unknown or "
            f"of another shape: {', '.join(wrong) or 'none'}."
        )


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, as Transformers writes it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


__all__ = ["export_checkpoint"]
