"""Several residual streams: what they keep, how they start, and that every path through the model takes them along.

Their equations are compared with `reference_streams.py` in `test_reference_parity.py` and over random configurations.
"""

import copy
import itertools

import pytest
import torch
from helpers import TOLERANCE, assert_close, random_tokens, tiny_config, tiny_model
from test_published_variants import NANBEIGE, convert, random_published

from modeling_looped import LoopedForCausalLM
from modeling_looped.residual_streams import RESIDUAL_STREAMS, sinkhorn

KINDS = [name for name in RESIDUAL_STREAMS if name != "none"]
every_kind = pytest.mark.parametrize("kind", KINDS)
#: Those that connect attention and MLP, not loops.
kinds = pytest.mark.parametrize("kind", [name for name in KINDS if name != "hyperloop"])


@pytest.mark.parametrize("iterations", [1, 5, 40])
def test_sinkhorn_makes_columns_exactly_and_rows_nearly_one(iterations):
    matrix = sinkhorn(3 * torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)), iterations)
    assert (matrix >= 0).all()
    assert_close(matrix.sum(-2), torch.ones(2, 5, 4), 1e-6)
    if iterations == 40:
        assert_close(matrix.sum(-1), torch.ones(2, 5, 4), 2e-2)


@pytest.mark.parametrize("spec", ["hyper_connections", {"type": "mhc", "initial_logit": 20.0}], ids=str)
@pytest.mark.parametrize("span", ["model", "part"])
@pytest.mark.parametrize("core", [None, 3])
def test_a_fresh_model_is_the_one_with_one_stream(spec, span, core):
    torch.manual_seed(0)
    plain = LoopedForCausalLM(tiny_config()).eval()
    spec = {"type": spec} if isinstance(spec, str) else spec
    several = LoopedForCausalLM(tiny_config(residual_streams={**spec, "span": span, "core_num_streams": core})).eval()
    report = several.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys
    assert all(".residual_streams." in name for name in report.missing_keys)
    assert_close(several(random_tokens()).logits, plain(random_tokens()).logits, 1e-5)


def test_the_mix_keeps_the_mean_of_the_streams():
    model = tiny_model(residual_streams="mhc")
    streams = torch.randn(2, 7, 4, 32, generator=torch.Generator().manual_seed(0))
    _, mapping = model.model.layers[1].residual_streams["mlp"](streams, 0)
    assert not torch.allclose(mapping.mix, torch.eye(4))
    assert_close((mapping.mix @ streams).mean(2), streams.mean(2), 1e-5)


@kinds
def test_loops_beyond_their_own_connections_use_the_last(kind):
    model = tiny_model(residual_streams={"type": kind, "own_loops": 2})
    states = model(random_tokens(), num_loops=4, output_loop_hidden_states=True).loop_hidden_states
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            for connection in layer.residual_streams.values():
                connection.bias[0] += 1.0
    other = model(random_tokens(), num_loops=4, initial_state=states[0], output_loop_hidden_states=True)
    assert not torch.allclose(other.loop_hidden_states[1], states[1])
    # from the state after the first loop on, the first loop's connections are not read
    assert model.model.layers[1].residual_streams["mlp"].weight.shape[0] == 2
    assert model.model.layers[0].residual_streams["mlp"].weight.shape[0] == 1


@kinds
def test_within_a_span_of_parts_the_state_is_one(kind):
    model = tiny_model(residual_streams={"type": kind, "span": "part"})
    states = model(random_tokens(), output_loop_hidden_states=True).loop_hidden_states
    assert {state.shape for state in states} == {(2, 7, 32)}


@every_kind
def test_a_state_of_streams_can_be_given_either_way(kind):
    carried = tiny_model(residual_streams=kind)
    tokens = random_tokens()
    states = carried(tokens, output_loop_hidden_states=True).loop_hidden_states
    assert {state.shape for state in states} == {(2, 7, 4, 32)}
    start = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    copies = start.unsqueeze(2).expand(-1, -1, 4, -1)
    expected = carried(tokens, initial_state=copies).logits
    assert torch.equal(carried(tokens, initial_state=start).logits, expected)
    assert not torch.allclose(carried(tokens).logits, expected)
    with pytest.raises(ValueError, match=r"initial_state has the shape \(2, 7, 3, 32\) and must have \(2, 7, 4, 32\)"):
        carried(tokens, initial_state=copies[:, :, :3])


@kinds
@pytest.mark.parametrize("span", ["model", "part"])
def test_hidden_states_are_the_mean_of_the_streams(kind, span):
    model = tiny_model(residual_streams={"type": kind, "span": span})
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    recorded = model(random_tokens(), output_hidden_states=True).hidden_states
    assert len(recorded) == model.config.num_hidden_layers + 1
    assert {state.shape for state in recorded} == {(2, 7, 32)}
    for state, output in zip(recorded[1:-1], outputs, strict=False):
        assert torch.equal(state, output.mean(2))
    # (hidden states, cache, hidden states of all layers)
    as_tuple = model.model(random_tokens(), output_hidden_states=True, return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[-1], recorded, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"type": "mhc", "core_num_streams": 2, "own_loops": 2, "sinkhorn_iterations": 2},
        {"type": "hyperloop", "num_streams": 2},
    ],
    ids=["mhc", "hyperloop"],
)
@torch.no_grad()
def test_a_forward_is_one_graph(spec):
    model = tiny_model(residual_streams=spec, num_core_layers=1, num_coda_layers=0, num_loops=2)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert_close(compiled(random_tokens(), use_cache=False).logits, model(random_tokens()).logits)


@every_kind
@torch.no_grad()
def test_compiled_blocks_take_the_streams(kind):
    model = tiny_model(residual_streams=kind)
    expected = model(random_tokens(), num_loops=4).logits
    model.compile_blocks(backend="eager", fullgraph=True)
    assert_close(model(random_tokens(), num_loops=4).logits, expected)


@every_kind
@torch.no_grad()
def test_beams_on_a_static_cache_are_those_on_a_dynamic_one(kind):
    model = tiny_model(std=1.0, residual_streams=kind)
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    texts = [model.generate(random_tokens(), **options, **cache).tolist() for cache in
             ({}, {"cache_implementation": "static"}, {"use_cache": False})]  # fmt: skip
    assert texts[0] == texts[1] == texts[2]


@kinds
def test_nested_loops_and_groups_carry_streams(kind):
    for options in (
        {"schedule": {"type": "nested", "inner_loops": 2}, "injection": "none", "state_init": "input"},
        {"core_group_size": 1, "injection": "none", "state_init": "input"},
    ):
        model = tiny_model(residual_streams=kind, **options)
        tokens = random_tokens()
        whole = model(tokens, use_cache=False).logits
        first = model(tokens[:, :4], use_cache=True)
        rest = model(tokens[:, 4:], past_key_values=first.past_key_values)
        assert_close(torch.cat((first.logits, rest.logits), dim=1), whole, TOLERANCE[torch.float32])


#: The streams of a Hyperloop transformer as its paper has them: the tokens enter once.
PLAIN_LOOP = {"injection": "none", "state_init": "input"}


@torch.no_grad()
def test_fresh_hyperloop_streams_are_moving_averages_of_what_the_loops_give():
    torch.manual_seed(0)
    model = LoopedForCausalLM(tiny_config(residual_streams="hyperloop", **PLAIN_LOOP)).eval()
    entering, leaving = [], []
    core = model.model.layers[1 : 1 + model.config.num_core_layers]
    core[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    core[-1].register_forward_hook(lambda _, __, output: leaving.append(output))
    states = model(random_tokens(), num_loops=5, output_loop_hidden_states=True).loop_hidden_states
    keep = torch.tensor([1, 3, 5, 7])[:, None] / 8
    for loop, (before, after) in enumerate(itertools.pairwise(states)):
        assert_close(entering[loop], before.mean(2), 1e-5)
        assert_close(after, keep * before + (1 - keep) * leaving[loop].unsqueeze(2), 1e-5)


@torch.no_grad()
def test_fresh_hyperloop_streams_stay_as_large_as_what_the_loops_give():
    model = LoopedForCausalLM(tiny_config(residual_streams="hyperloop", **PLAIN_LOOP)).eval()
    last = model.model.layers[model.config.num_core_layers]  # there is one layer before the core
    last.register_forward_hook(lambda _, __, output: output / output.abs().amax(-1, keepdim=True))
    states = model(random_tokens(), num_loops=200, output_loop_hidden_states=True).loop_hidden_states
    largest = torch.stack([state.abs().amax() for state in states])
    assert (largest[1:] <= largest[0].clamp_min(1.0) + 1e-4).all()


def test_every_parameter_of_hyperloop_streams_learns():
    model = tiny_model(residual_streams="hyperloop", **PLAIN_LOOP)
    tokens = random_tokens()
    model(tokens, labels=tokens).loss.backward()
    streams = model.model.residual_streams
    gradients = dict(streams.named_parameters())
    assert set(gradients) == {"weight", "bias", "gate", "shift"}
    for name, parameter in gradients.items():
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


@torch.no_grad()
def test_hyperloop_loops_beyond_the_table_use_its_last_row():
    model = tiny_model(residual_streams={"type": "hyperloop", "table_loops": 2}, **PLAIN_LOOP)
    tokens = random_tokens()
    states = model(tokens, num_loops=4, output_loop_hidden_states=True).loop_hidden_states
    model.model.residual_streams.bias[0] += 1.0
    changed = model(tokens, num_loops=4, output_loop_hidden_states=True).loop_hidden_states
    assert not torch.allclose(changed[1], states[1])
    again = model(tokens, num_loops=3, initial_state=states[1], output_loop_hidden_states=True).loop_hidden_states
    for table in model.model.residual_streams.parameters():
        table[0] = table[1]
    from_second = model(tokens, num_loops=3, initial_state=states[1], output_loop_hidden_states=True)
    assert not torch.allclose(again[1], states[2])
    for one, other in zip(from_second.loop_hidden_states, states[1:], strict=True):
        assert_close(one, other)


def test_a_router_within_a_span_of_parts_is_the_router_of_one_stream():
    halting = {"type": "token_choice"}
    model = tiny_model(residual_streams={"type": "mhc", "span": "part"}, halting=halting)
    output = model(random_tokens())
    assert output.exit_loops.shape == (2, 7)
    assert output.logits.isfinite().all()


SPLIT = {"enable_double_loop_split": True, "num_hidden_layers": 4}
NO_MIX = {"enable_mhc": True, "enable_h_res_identity": True, "mhc_identity_nohresparam": True}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, {"type": "hyper_connections", "span": "part", "num_streams": 4, "core_num_streams": None}),
        (NO_MIX, {"type": "mhc", "mixing": "identity", "span": "part"}),
        (
            {**SPLIT, "enable_mhc": True, "mhc_double_stream_position_for_loop": "edge", "mhc_sinkhorn_iterations": 3},
            {"span": "model", "num_streams": 8, "core_num_streams": 4, "sinkhorn_iterations": 3, "own_loops": 1},
        ),
        ({**SPLIT, **NO_MIX, "mhc_diff_for_loop": True}, {"span": "model", "own_loops": 3}),
    ],
    ids=["whole stack", "no mix", "double at the edge", "own in every loop"],
)
def test_nanbeige_options_come_in_and_go_back_in_every_bit(options, says, tmp_path):
    config = {**NANBEIGE, "enable_hyper_connection": True, **options}
    state = random_published("nanbeige", config, [])
    looped = convert(config, state, tmp_path)
    assert looped.config.residual_streams.items() >= says.items()
