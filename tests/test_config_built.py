"""What a model makes of the config it is built by, and of what is written to it afterwards."""

from typing import Any

import pytest
import torch
from helpers import assert_close, random_tokens, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.configuration_looped import STRATEGY_FIELDS, STRUCTURE_FIELDS

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


#: A field that a model is built by -> a value of it that `tiny_config` does not have.
OTHERS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_prelude_layers": 2,
    "num_core_layers": 1,
    "num_coda_layers": 2,
    "core_group_size": 1,
    "kv_sharing": "first_loop",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "core_hidden_size": 48,
    "core_intermediate_size": 40,
    "core_num_attention_heads": 2,
    "core_num_key_value_heads": 1,
    "hidden_act": "gelu",
    "mlp_type": "plain",
    "mlp_output_act": "relu",
    "attention_bias": True,
    "attention_value_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "attention_gate": "per_channel",
    "qkv_clip": 0.1,
    "qk_norm": "per_head",
    "norm_type": "layer",
    "norm_placement": "post",
    "final_norm": "every_loop",
    "prelude_norm": False,
    "rms_norm_eps": 1.0,
    "stored_layer_types": ["full_attention"] * 4,
    "sliding_window": 4,
    "add_cross_attention": True,
    "cross_attention_hidden_size": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10.0},
    "position_embedding": "none",
    "embedding_size": 16,
    "embedding_projection_bias": False,
    "embedding_norm": True,
    "type_vocab_size": 2,
    "mlm_head": "transform",
    "injection": "add",
    "state_init": "input",
    "loop_update": "damped",
    "loop_conditioning": "sinusoidal",
    "loop_adapter": "lora",
    "halting": "gate",
    "readout": "linear",
    "value_embedding": "gated",
    "ngram_embedding": "hashed",
    "residual_streams": "hyperloop",
    "depth_attention": "anchors",
    "schedule": "nested",
    "depth_sampling": "poisson",
    "loop_loss": "deep_supervision",
    "sequence_pooling": "first_token",
    "classifier_dropout": 0.2,
}


@pytest.fixture(scope="module")
def built():
    return tiny_model()


@pytest.mark.parametrize("field", STRUCTURE_FIELDS)
def test_a_built_model_refuses_every_field_that_it_was_built_by(built, field):
    before = getattr(built.config, field)
    try:
        setattr(built.config, field, OTHERS[field])
        with pytest.raises(ValueError, match=rf"config\.{field}=.* was written after the model was built with"):
            built(TOKENS)
    finally:
        setattr(built.config, field, before)
    built(TOKENS)


def test_the_table_of_learned_positions_cannot_grow_by_a_word():
    model = tiny_model(position_embedding="learned")
    model.config.max_position_embeddings *= 2
    with pytest.raises(ValueError, match=r"config\.max_position_embeddings=.* was written after the model was built"):
        model(TOKENS)
    rotary = tiny_model()
    rotary.config.max_position_embeddings *= 2
    rotary(TOKENS)


@pytest.mark.parametrize("field", STRATEGY_FIELDS)
def test_what_is_written_into_a_strategy_is_noticed_by_the_model_and_when_saving(built, field, tmp_path):
    config = built.config
    getattr(config, field)["treshold"] = 0.5
    try:
        with pytest.raises(ValueError, match=rf"config\.{field}=.*treshold.* was written after the model was built"):
            built(TOKENS)
        with pytest.raises(StrictDataclassError, match=f"{field}: type .* has no parameter 'treshold'"):
            config.save_pretrained(tmp_path)
    finally:
        del getattr(config, field)["treshold"]
    built(TOKENS)


def test_a_strategy_that_was_written_into_is_saved_as_it_is_read_back(tmp_path):
    config = tiny_config(halting="gate", value_embedding={"type": "gated", "layers": [0]})
    config.halting["threshold"] = 5.0
    with pytest.raises(StrictDataclassError, match=r"halting: type 'gate'.*threshold=5.0"):
        config.save_pretrained(tmp_path)
    config.halting["threshold"], config.value_embedding["layers"] = 1, (0, 1)
    del config.halting["output"]
    config.save_pretrained(tmp_path)
    back = LoopedConfig.from_pretrained(tmp_path)
    for found in (config, back):
        assert found.halting == {"type": "gate", "threshold": 1.0, "output": "threshold"}
        assert found.value_embedding["layers"] == [0, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_loops", 5), ("embedding_scale", 2.0), ("logit_scale", 2.0), ("final_logit_softcapping", 1.0)],
)
@torch.no_grad()
def test_a_built_model_follows_what_it_reads_in_every_call(field, value):
    written, built = tiny_model(), tiny_model(**{field: value})
    built.load_state_dict(written.state_dict())
    before = written(TOKENS).logits
    setattr(written.config, field, value)
    after = written(TOKENS).logits
    assert not torch.equal(after, before)
    assert torch.equal(after, built(TOKENS).logits)
