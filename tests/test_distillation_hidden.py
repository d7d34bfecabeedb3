"""Hidden-state matching: layer maps, local losses without gradients between parts, and states as an extra loss."""

import copy

import pytest
import torch
from helpers import randomise
from teachers import tiny_teacher
from test_distillation_trainer import batch_of_all, distill, trainer_of
from training import weights

from modeling_looped.conversion.compress import compress
from modeling_looped.conversion.layer_plan import LayerPlan, kept_plan, shared_plan
from modeling_looped.conversion.retrofit import retrofit
from modeling_looped.training.hidden_states import HiddenMatcher, HiddenStates
from modeling_looped.training.layer_map import check_map, default_map, layer_map

GATE = {"type": "gated", "initial_gate": 0.3, "free_loops": 1}


def compressed(plan=None, **options):
    teacher = tiny_teacher("llama")
    plan = shared_plan(1, 2, 1, 2) if plan is None else plan
    return teacher, compress(teacher, plan, **options).model.train()


def test_layer_maps():
    assert layer_map(shared_plan(1, 2, 1, 2), 6) == [0, 1, 2, 3, 4, 5, 6]
    assert layer_map(shared_plan(0, 3, 0, 2, order="sequence"), 6) == [0, 1, 2, 3, 4, 5, 6]
    # 0 1 | 4 5, of which 1 and 4 loop: four invocations share out the boundaries 1 to 5
    assert layer_map(kept_plan([0, 1, 4, 5], [1, 4], 2), 6) == [0, 1, 2, 3, 4, 5, 6]
    # a gap inside the coda is the work of the layer before it
    assert layer_map(LayerPlan((0,), ((1, 1),), (2, 5)), 6) == [0, 1, 2, 2, 5, 6]


def test_a_retrofit_s_loops_all_end_where_the_first_does():
    teacher = tiny_teacher("llama")
    layout = retrofit(teacher, prelude=2, core=2, coda=2, loops=3).config.slot_layout()
    boundaries = default_map(layout, 6)
    assert boundaries == [0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6]
    check_map(boundaries, layout, 6)


def test_at_full_rank_every_part_of_the_student_is_the_teacher_s():
    """The strongest check of the map: with the weights of the teacher all distances vanish, forced or not."""
    for order in ("cycle", "sequence"):
        teacher, student = compressed(shared_plan(1, 2, 1, 2, order=order), rank=32)
        batch = batch_of_all()
        valid = batch["attention_mask"].bool()
        for granularity in ("layer", "loop"):
            for forced in (True, False):
                matched = copy.deepcopy(student)
                matcher = HiddenMatcher(
                    matched, list(range(7)), granularity=granularity, loss="normalized_mse", forced=forced
                )
                states = HiddenStates(teacher)
                with torch.no_grad():
                    teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                    matcher.begin(states.states)
                    matched(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                assert matcher.distance(valid).max() < 1e-6
                matcher.begin(states.states[::-1])
                with torch.no_grad():
                    matched(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                assert matcher.distance(valid).mean() > 1e-2


def local_gradients(teacher, student, batch, places):
    """One part after the other, from the teacher's own states: the definition of stage 1, written down."""
    model = student.model
    boundaries = [teacher.get_input_embeddings()(batch)]
    rotary = teacher.model.rotary_emb(boundaries[0], torch.arange(batch.shape[1])[None])
    for layer in teacher.model.layers:
        boundaries.append(layer(boundaries[-1], position_embeddings=rotary))
    boundaries = [state.detach() for state in boundaries]
    rotary = tuple(table.unsqueeze(1) for table in model.rotary_emb(boundaries[0], torch.arange(batch.shape[1])[None]))
    mask = torch.ones(batch.shape[1], batch.shape[1], dtype=torch.bool).tril()[None, None]
    total = 0.0
    for index in range(len(boundaries) - 1):
        layer, loop = student.config.slot_layout().invocation(index)
        # the first layer's input is the student's own embedding
        before = boundaries[index] if index else student.get_input_embeddings()(batch)
        after = model.layers[layer](before, index, loop, attention_mask=mask, position_embeddings=rotary)
        if index in (2, 4):  # the last layer of a loop
            after = model.loop_update(boundaries[index - 1], after, loop, 2)
        target = boundaries[index + 1]
        distance = (after - target).square().sum(-1) / target.square().sum(-1)
        total = total + distance[:, :-1].mean()  # the last token has no next one, and counts nowhere
    return total / places


def test_stage_one_is_what_its_definition_says(tmp_path):
    """Same gradients as one part at a time, each from the teacher's own state to the teacher's own state."""
    teacher, student = compressed(loop_update=GATE)
    randomise(student, seed=3)
    batch = batch_of_all()["input_ids"][:, :9]
    reference = copy.deepcopy(student)
    expected = local_gradients(teacher, reference, batch, 6)
    expected.backward()
    trainer = trainer_of(student, tmp_path, teacher=teacher, stage="hidden")
    loss = trainer.compute_loss(trainer.model.train(), {"input_ids": batch, "labels": batch.clone()})
    loss.backward()
    for (name, parameter), other in zip(student.named_parameters(), reference.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-7, msg=name)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("granularity", ["layer", "loop"])
@pytest.mark.parametrize("kind", ["layer", "loop"])
def test_recomputed_activations_give_the_same_training(granularity, kind, tmp_path):
    runs = []
    for recompute in (False, True):
        teacher, student = compressed(loop_update=GATE)
        student.config.checkpoint_granularity = kind
        settings = {"hidden_granularity": granularity, "max_steps": 2, "learning_rate": 1e-2}
        folder = tmp_path / str(recompute)
        runs.append(
            distill(student, folder, teacher=teacher, stage="hidden", activation_checkpointing=recompute, **settings)
        )
    first, second = (weights(trainer.model) for trainer in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_stage_one_brings_the_states_and_the_logits_closer(tmp_path):
    teacher, student = compressed()
    trainer = trainer_of(
        student, tmp_path, teacher=teacher, stage="hidden", learning_rate=1e-2, max_steps=20, logging_steps=1
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "hidden_distance" in entry]
    assert entries[0]["loss"] == pytest.approx(entries[0]["hidden_distance"], rel=1e-5)
    assert entries[-1]["hidden_distance"] < 0.7 * entries[0]["hidden_distance"]
    assert trainer.evaluate()["eval_kl"] < before


@pytest.mark.parametrize("loss", ["normalized_mse", "cosine"])
def test_states_as_an_extra_loss_beside_the_logits(loss, tmp_path):
    teacher, student = compressed(kept_plan([0, 1, 4, 5], [1, 4], 2))
    trainer = distill(
        student,
        tmp_path,
        teacher=teacher,
        hidden_weight=0.5,
        hidden_loss=loss,
        logging_steps=1,
        layer_map=[0, 1, 2, 3, 4, 5, 6],
    )
    for entry in trainer.state.log_history:
        if "divergence" in entry:
            whole = entry["divergence"] + 0.5 * entry["hidden_distance"]
            assert entry["loss"] == pytest.approx(whole, rel=1e-4)


def test_what_cannot_be_matched_is_named(tmp_path):
    teacher, student = compressed(kept_plan([0, 1, 4, 5], [1, 4], 3))
    with pytest.raises(ValueError, match="layer_map is needed: the student executes 8 layers and the teacher has 6"):
        trainer_of(student, tmp_path, teacher=teacher, stage="hidden")
    with pytest.raises(ValueError, match="layer_map has 3 boundaries and must have 9"):
        trainer_of(student, tmp_path, teacher=teacher, stage="hidden", layer_map=[0, 1, 2])
    with pytest.raises(ValueError, match="must rise from 0 to 6"):
        trainer_of(student, tmp_path, teacher=teacher, stage="hidden", layer_map=[0, 2, 1, 3, 4, 5, 6, 6, 6])
    looped = retrofit(teacher, prelude=2, core=2, coda=2, loops=2)
    with pytest.raises(ValueError, match="the same state to begin and to end with"):
        trainer_of(looped, tmp_path, teacher=teacher, stage="hidden")
    trainer_of(looped, tmp_path, teacher=teacher, stage="hidden", hidden_granularity="loop")
    with pytest.raises(ValueError, match="for looped students only, not for a LlamaForCausalLM"):
        trainer_of(tiny_teacher("llama"), tmp_path, teacher=teacher, stage="hidden")
