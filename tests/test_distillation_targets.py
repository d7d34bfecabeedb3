"""A teacher's distributions on disk: what is kept, going on after a stop, refusing those of something else."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file
from teachers import tiny_teacher
from training import run_arguments

from modeling_looped.training import DistillationConfig, DistillationTrainer
from modeling_looped.training import targets as module
from modeling_looped.training.data import PackedBlocks, collate_packed
from modeling_looped.training.targets import TargetBlocks, compute_targets, cut

SETTINGS = {"teacher": {"name": "tiny"}, "top_k": 5}


def blocks(count=7, length=6, seed=0):
    return PackedBlocks(np.random.default_rng(seed).integers(3, 97, (count, length), dtype=np.int32))


def test_kept_entries_and_the_rest_are_a_distribution():
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * 4
    kept = cut(logits, 6)
    assert (kept.indices.dtype, kept.log_probs.dtype) == (torch.int32, torch.float16)
    assert (kept.indices.shape, kept.log_probs.shape) == ((9, 6), (9, 7))
    torch.testing.assert_close(kept.log_probs.float().exp().sum(-1), torch.ones(9), rtol=0, atol=2e-3)
    exact = torch.log_softmax(logits, dim=-1).gather(-1, kept.indices.long())
    torch.testing.assert_close(kept.log_probs[:, :-1].float(), exact, rtol=1e-3, atol=1e-3)
    assert cut(torch.eye(9, 40) * 1e4, 6).log_probs.isfinite().all()
    flat = cut(logits, 6, temperature=1e3)
    assert flat.log_probs[:, -1].exp().min() > 0.8


def test_training_from_disk_needs_no_teacher_and_follows_it(tmp_path):
    teacher, data = tiny_teacher("llama"), blocks()
    settings = {**SETTINGS, "top_k": 96}
    compute_targets(lambda: teacher, data, tmp_path / "targets", **settings)
    stored = TargetBlocks(data, tmp_path / "targets", **settings)
    losses = []
    for given, rows in ((teacher, data), (None, stored)):
        arguments = run_arguments(
            tmp_path / str(given is None), DistillationConfig, max_steps=3, logging_steps=1, learning_rate=1e-2
        )
        torch.manual_seed(0)
        model = tiny_model().train()
        trainer = DistillationTrainer(
            model, given, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate_packed
        )
        trainer.train()
        losses.append([entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry])
        losses[-1].append(trainer.evaluate()["eval_kl"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # float16 rounds


def test_a_computation_that_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCKS_PER_FILE", 2)
    teacher, data = tiny_teacher("llama"), blocks()
    compute_targets(lambda: teacher, data, tmp_path / "whole", **SETTINGS)
    reports = []

    def stop(line):
        reports.append(line)
        if len(reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_targets(lambda: teacher, data, tmp_path / "parts", report=stop, **SETTINGS)
    (tmp_path / "parts" / "targets-00002.safetensors.unfinished").write_bytes(b"half")
    with pytest.raises(ValueError, match="lacks 2 files"):
        TargetBlocks(data, tmp_path / "parts", **SETTINGS)
    compute_targets(lambda: teacher, data, tmp_path / "parts", report=reports.append, **SETTINGS)
    assert len(reports) == 4  # two files before, two after
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) == 4
    for name in names:
        whole, parts = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    stored = TargetBlocks(data, tmp_path / "parts", **SETTINGS)
    expected = cut(teacher(torch.from_numpy(data.blocks[4:5].astype(np.int64))).logits[0].detach(), 5)
    assert torch.equal(stored[4]["teacher_indices"], expected.indices)

    def unwanted():
        raise AssertionError("a complete folder needs no teacher")

    compute_targets(unwanted, data, tmp_path / "parts", **SETTINGS)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"teacher": {"name": "another"}}, "teacher: {'name': 'tiny'} there, {'name': 'another'} here"),
        ({"top_k": 4}, "top_k: 5 there, 4 here"),
        ({"temperature": 2.0}, "temperature: 1.0 there, 2.0 here"),
        ({}, "data: "),
    ],
)
def test_targets_of_something_else_are_refused(other, message, tmp_path):
    compute_targets(lambda: tiny_teacher("llama"), blocks(2), tmp_path, **SETTINGS)
    data = blocks(2) if other else blocks(2, seed=1)
    for use in (TargetBlocks, lambda *args, **kwargs: compute_targets(None, *args, **kwargs)):
        with pytest.raises(ValueError, match="were computed for something else") as error:
            use(data, tmp_path, **{**SETTINGS, **other})
        assert message in str(error.value)
    assert json.loads((tmp_path / "targets.json").read_text())["top_k"] == 5


def test_folders_and_sizes_that_cannot_be_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no targets\.json"):
        TargetBlocks(blocks(), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="top_k=97 must be less than the vocabulary of 97"):
        compute_targets(lambda: tiny_teacher("llama"), blocks(2), tmp_path, **{**SETTINGS, "top_k": 97})
    compute_targets(lambda: tiny_teacher("llama"), blocks(2), tmp_path, **SETTINGS)  # the folder is not spoilt
    assert json.loads((tmp_path / "targets.json").read_text())["top_k"] == SETTINGS["top_k"]
