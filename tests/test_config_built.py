"""What a model makes of the config it is built by, and of what is written to it afterwards."""

from typing import Any

import pytest
import torch
from helpers import assert_close, random_tokens, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from modeling_looped import LoopedForCausalLM

TOKENS = random_tokens()
#: The prelude enters the first loop only, so that truncated backpropagation would cut it off.
IN_PLACE: dict[str, Any] = {"injection": "none", "state_init": "input"}

#: A valid model, a field that does not go with it, and what the error must say of the two.
MISFITS = {
    "truncation": (IN_PLACE, {"backprop_loops": 1}, "backprop_loops=1 with injection='none'"),
    "shared keys": ({"kv_sharing": "first_loop"}, {"backprop_loops": 1}, "backprop_loops=1 with kv_sharing="),
    "tokens unseen": ({}, {"injection": "none"}, "injection='none' with state_init='zeros'"),
    "no gate": ({}, {"loop_loss": "expected_exit"}, "loop_loss='expected_exit' with halting='none'"),
    "no gate to train": ({}, {"loop_loss": "exit_gate"}, "loop_loss='exit_gate' with halting='none'"),
    "gate unread": (
        {"halting": "gate"},
        {"loop_loss": "deep_supervision"},
        "loop_loss='deep_supervision' with halting=",
    ),
    "streams": (
        {"loop_update": "damped"},
        {"residual_streams": "hyperloop"},
        "loop_update='damped' with residual_streams='hyperloop'",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_fields_written_one_by_one_are_checked_together_before_a_model_is_built(case):
    fields, written, said = MISFITS[case]
    config = tiny_config(**fields)
    for name, value in written.items():
        setattr(config, name, value)
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        LoopedForCausalLM(config)


@pytest.mark.parametrize("case", MISFITS)
def test_fields_given_at_loading_are_checked_together_with_those_of_the_file(case, tmp_path):
    fields, given, said = MISFITS[case]
    tiny_model(**fields).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path, **given)


@pytest.mark.parametrize("case", ["truncation", "shared keys"])
def test_what_a_built_model_follows_is_checked_in_the_next_call(case):
    fields, written, said = MISFITS[case]
    model = tiny_model(**fields).train()
    before = model(TOKENS).logits
    for name, value in written.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=said):
        model(TOKENS)
    for name in written:
        setattr(model.config, name, None)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("loss", ["expected_exit", "exit_gate"])
def test_a_gate_that_truncation_would_keep_from_learning_is_noticed_in_the_next_call(loss):
    model = tiny_model(halting="gate", loop_loss=loss).train()
    model.config.backprop_loops = 1
    with pytest.raises(ValueError, match=f"backprop_loops=1 with loop_loss='{loss}'"):
        model(TOKENS, labels=TOKENS)


def gradients(model, call) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    call(TOKENS, labels=TOKENS).loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return found


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_a_truncation_written_to_a_built_model_is_the_one_it_would_be_built_with(compiles):
    built, model = tiny_model(backprop_loops=1).train(), tiny_model().train()
    model.load_state_dict(built.state_dict())
    call = torch.compile(model, backend="eager") if compiles else model
    expected = gradients(built, built)
    untruncated = gradients(model, call)
    assert any((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(untruncated, expected, strict=True))
    model.config.backprop_loops = 1
    for ours, theirs in zip(gradients(model, call), expected, strict=True):
        assert_close(ours, theirs, atol=1e-5)


def test_a_compiled_model_refuses_a_truncation_that_does_not_go_with_it():
    model = tiny_model(**IN_PLACE).train()
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    model.config.backprop_loops = 1
    with pytest.raises(Exception, match="backprop_loops=1 with injection='none'"):
        compiled(TOKENS)


def test_attention_weights_asked_for_in_the_config_do_not_stop_a_model_from_being_built():
    """Transformers' own check refuses them once it has chosen an implementation, which it does before we build."""
    model = LoopedForCausalLM(tiny_config(output_attentions=True)).eval()
    assert model(TOKENS).attentions is not None
