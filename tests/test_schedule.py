"""Nested loops and prefixes: against Transformers' own HRM-Text, and what a built model refuses to become."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import assert_close, random_tokens, randomise, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import HrmTextConfig, HrmTextForCausalLM, StaticCache

from modeling_looped import LoopedForCausalLM

#: A config's own checks reach the user through `@strict`.
REFUSED = (ValueError, StrictDataclassError)
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
NESTED = {
    "num_prelude_layers": 0,
    "num_coda_layers": 0,
    "num_core_layers": 4,
    "injection": "none",
    "state_init": "input",
    "prelude_norm": False,
    "norm_type": "rms_unweighted",
    "attention_gate": "per_channel",
    "final_norm": "every_loop",
    "prefix_lm": True,
}


def pair(slow: int, fast: int) -> tuple[HrmTextForCausalLM, LoopedForCausalLM]:
    """Transformers' model and ours with the same random weights."""
    stock = HrmTextForCausalLM(
        HrmTextConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=8,
            max_position_embeddings=256,
            embedding_scale=1.5,
            H_cycles=slow,
            L_cycles=fast,
            rms_norm_eps=1e-5,
        )
    )
    randomise(stock, std=1.0)
    looped = tiny_model(
        **NESTED,
        num_key_value_heads=4,
        num_loops=slow,
        schedule={"type": "nested", "inner_loops": fast},
        embedding_scale=1.5,
    )
    state = {}
    for name, tensor in stock.state_dict().items():
        for stack, first in (("L_module", 0), ("H_module", 2)):
            for layer in range(2):
                name = name.replace(f"{stack}.layers.{layer}.", f"layers.{first + layer}.")
        state[name.replace("z_L_init", "schedule.low_state")] = tensor
    looped.load_state_dict(state)
    return stock.eval(), looped


@pytest.mark.parametrize(("slow", "fast"), [(1, 1), (2, 3), (3, 2)])
@torch.no_grad()
def test_nested_loops_are_those_of_transformers_hrm_text(slow, fast):
    stock, looped = pair(slow, fast)
    tokens = random_tokens(2, 9)
    types = (torch.arange(9) < 4).long().expand(2, 9)
    assert looped.config.num_hidden_layers == stock.config.num_hidden_layers == 2 * slow * (fast + 1)
    assert_close(looped(tokens).logits, stock(tokens).logits)
    assert_close(looped(tokens, token_type_ids=types).logits, stock(tokens, token_type_ids=types).logits)


@torch.no_grad()
def test_a_slot_is_filled_once_and_in_order():
    model, seen = tiny_model(**NESTED, num_loops=2, schedule={"type": "nested", "inner_loops": 3}), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((module.layer, *args[1:3])))
    model(random_tokens())
    layout = model.config.slot_layout()
    assert [slot for _, slot, _ in seen] == list(range(layout.num_slots))
    assert [(layer, loop) for layer, _, loop in seen] == [layout.layer_and_loop(slot) for slot in range(16)]


@pytest.mark.parametrize("ends", [0, 1], ids=["types end in 0", "types end in 1"])
@torch.no_grad()
def test_new_tokens_never_join_the_prefix(ends):
    _, model = pair(2, 2)
    tokens = random_tokens(1, 7)
    types = torch.ones_like(tokens)
    types[:, -1] = ends
    expected = model.generate(tokens, token_type_ids=types, use_cache=False, **GREEDY)
    for options in (
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"assistant_model": model.with_num_loops(1)},
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(model.generate(tokens, token_type_ids=types, **options, **GREEDY), expected), options
    beams = {"num_beams": 3, "token_type_ids": types}
    assert torch.equal(
        model.generate(tokens, **beams, **GREEDY), model.generate(tokens, use_cache=False, **beams, **GREEDY)
    )
    with pytest.raises(REFUSED, match="prefill_chunk_size=3 with token_type_ids"):
        model.generate(tokens, token_type_ids=types, prefill_chunk_size=3, **GREEDY)


@torch.no_grad()
def test_early_exit_drafts_change_no_token():
    _, model = pair(2, 2)
    tokens = random_tokens(1, 7)
    expected = model.generate(tokens, **GREEDY)
    for slots in (1, 4, 7):
        assert torch.equal(model.generate(tokens, assistant_early_exit=slots, **GREEDY), expected)


@pytest.mark.parametrize("halting", ["gate", "act", "state_change"])
@torch.no_grad()
def test_a_rule_gives_out_everything_when_a_nested_forward_is_cut(halting):
    model = tiny_model(**{**NESTED, "final_norm": "end"}, num_loops=3, schedule="nested", halting=halting)
    tokens = random_tokens()
    for slots in range(1, model.config.num_hidden_layers):
        model.config.num_hidden_layers = slots
        assert model(tokens, use_cache=False).logits.abs().max() > 1e-3, slots


@torch.no_grad()
def test_nested_loops_work_where_hooks_bring_the_weights():
    _, model = pair(2, 2)
    tokens = random_tokens()
    expected = model(tokens).logits
    assert_close(cpu_offload(model, execution_device="cpu")(tokens).logits, expected)


def test_the_fast_state_is_not_trained_before_or_after_loading(tmp_path):
    model = tiny_model(**NESTED, schedule="nested")
    assert "model.schedule.low_state" not in dict(model.named_parameters())
    model.save_pretrained(tmp_path)
    assert "model.schedule.low_state" not in dict(LoopedForCausalLM.from_pretrained(tmp_path).named_parameters())


def test_tables_have_a_row_for_every_run_of_the_fast_half():
    conditioned = {**NESTED, "norm_type": "rms", "loop_conditioning": "norms"}
    config = tiny_config(**conditioned, num_loops=3, schedule={"type": "nested", "inner_loops": 2})
    assert config.loop_conditioning["table_loops"] == 6


def test_a_forward_on_a_static_cache_is_one_graph():
    torch.compiler.reset()
    model, tokens = tiny_model(num_core_layers=1, num_loops=2), random_tokens()
    positions = torch.arange(7)[None]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = compiled(tokens, past_key_values=cache, position_ids=positions, use_cache=True).logits
        assert_close(logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_sharing", "first_loop"),
        ("schedule", "nested"),
        ("core_group_size", 1),
        ("position_embedding", "learned"),
        ("num_core_layers", 1),
    ],
)
def test_a_built_model_refuses_a_config_that_it_cannot_follow(field, value):
    model, tokens = tiny_model(injection="none", state_init="input"), random_tokens()
    before = model(tokens).logits
    previous = getattr(model.config, field)
    setattr(model.config, field, value)
    with pytest.raises(REFUSED, match=f"config.{field}=.* was written after the model was built"):
        model(tokens)
    setattr(model.config, field, previous)
    assert torch.equal(model(tokens).logits, before)


def test_a_schedule_changed_in_place_is_noticed():
    model = tiny_model(**NESTED, schedule="nested")
    model.config.schedule["inner_loops"] = 3
    with pytest.raises(REFUSED, match=r"config.schedule=.* was written after"):
        model(random_tokens())


@torch.no_grad()
def test_shared_keys_and_values_belong_to_one_loop_count_too():
    model, tokens = tiny_model(injection="none", state_init="input", kv_sharing="first_loop"), random_tokens()
    cache = model(tokens, num_loops=1, use_cache=True).past_key_values
    with pytest.raises(REFUSED, match="num_loops=3 with a cache that num_loops=1 filled"):
        model(tokens[:, :1], num_loops=3, past_key_values=cache)
    with pytest.raises(REFUSED, match="assistant_early_exit=2 with kv_sharing"):
        model.generate(tokens[:1], assistant_early_exit=2, max_new_tokens=2)
    assert model(tokens).logits.isfinite().all()  # the refusal left nothing behind


def test_combinations_without_a_meaning_are_refused():
    shared = {"kv_sharing": "first_loop", "backprop_loops": 1, "injection": "add"}
    with pytest.raises(REFUSED, match="backprop_loops=1 with kv_sharing='first_loop'"):
        tiny_config(**shared)
    with pytest.raises(REFUSED, match="schedule='nested' with num_core_layers=3"):
        tiny_config(**{**NESTED, "num_core_layers": 3}, schedule="nested")
    with pytest.raises(REFUSED, match="prefix_lm=True with is_causal=False"):
        tiny_config(prefix_lm=True, is_causal=False)
    with pytest.raises(REFUSED, match="loop_conditioning='norms' with norm_type='rms_unweighted'"):
        tiny_config(norm_type="rms_unweighted", loop_conditioning="norms")
    with pytest.raises(REFUSED, match="initial_state has the shape"):
        tiny_model()(random_tokens(), initial_state=torch.zeros(1, 1, 32))
    model, tokens = tiny_model(**NESTED, schedule="nested"), random_tokens()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(REFUSED, match="prefix_lm=True with attn_implementation='flash_attention_2'"):
        model(tokens, token_type_ids=torch.ones_like(tokens))


@torch.no_grad()
def test_no_stock_stack_has_what_a_stack_of_ours_may_have():
    stacked = {"num_core_layers": 0, "num_prelude_layers": 3}
    for settings, field in (({"prefix_lm": True}, "prefix_lm"), ({"final_norm": "none"}, "final_norm")):
        with pytest.raises(REFUSED, match=field):
            tiny_model(**stacked, **settings).unroll()
