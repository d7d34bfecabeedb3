"""Routers: who takes part in a loop, against the definition token by token, and what cannot route is refused."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import assert_close, random_tokens, stepwise_logits, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from modeling_looped import LoopedForCausalLM
from modeling_looped.halting import Step

#: A config's own checks reach the user through `@strict`.
REFUSED = (ValueError, StrictDataclassError)
IN_PLACE = {"injection": "none", "state_init": "input", "prelude_norm": False}
ROUTERS = {
    "top_k": {"type": "expert_choice", "capacity": [1.0, 0.6, 0.4]},
    "threshold": {"type": "expert_choice", "selection": "threshold"},
    "token": {"type": "token_choice", "alpha": 0.7},
    "mlp": {"type": "expert_choice", "selection": "threshold", "score": "tanh", "router_width": 9, "alpha": 0.4},
    "added": {"type": "token_choice", "gating": "additive", "router_width": 9, "temperature": 0.25},
    "balanced": {"type": "token_choice", "score": "sigmoid", "balancing_bias": "loss_free"},
}
CAUSAL = [name for name in ROUTERS if name != "top_k"]


def routed(name: str, **settings) -> LoopedForCausalLM:
    model = tiny_model(std=1.0, halting=ROUTERS[name], **IN_PLACE, **settings)
    bias = getattr(model.model.halting, "balancing_bias", None)
    if bias is not None:
        bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
    return model


def run_layers(model: LoopedForCausalLM, states: torch.Tensor, layers: range, positions: torch.Tensor) -> torch.Tensor:
    """Layers on some tokens alone [n, D] at their own positions: exactly what the tokens that take part see."""
    cos, sin = model.model.rotary_emb(states, positions[None])
    mask = torch.full((len(positions), len(positions)), -torch.inf).triu(1)[None, None]
    x = states[None]
    for index in layers:
        layer = model.model.layers[index]
        x = layer(x, 0, 0, attention_mask=mask, position_embeddings=(cos[None], sin[None]))
    return x[0]


def by_hand(model: LoopedForCausalLM, tokens: torch.Tensor, num_loops: int) -> tuple[torch.Tensor, list[int]]:
    """Logits [S, V] of one row and how many loops each token took, from the definition and with real subsets."""
    spec, base = model.config.halting, model.model
    prelude, core, coda = model.config.slot_layout().stored_ranges()
    everyone = torch.arange(len(tokens))
    x = run_layers(model, base.embed_tokens(tokens), prelude, everyone)
    W, V = base.halting.router.weight, base.halting.router.first_weight

    def read(x: torch.Tensor, t: int | None) -> torch.Tensor:
        x = x / spec["temperature"]
        rows = W if t is None else W[min(t, len(W) - 1)]
        if V is not None:
            x = torch.nn.functional.gelu(x @ (V[0] if t is None else V[min(t, len(V) - 1)]).T)
        return x @ rows.mT if t is None else x @ rows

    taken = [0] * len(tokens)
    if spec["type"] == "expert_choice":
        alive = everyone
        for t in range(num_loops):
            squash = torch.tanh if spec["score"] == "tanh" else torch.sigmoid
            gate = squash(read(x[alive], t))
            if spec["selection"] == "threshold":
                chosen = alive[torch.sigmoid(read(x[alive], t)) >= 0.5]
            else:
                share = spec["capacity"][min(t, len(spec["capacity"]) - 1)]
                chosen = alive[gate.topk(min(len(alive), max(1, int(share * len(tokens))))).indices.sort().values]
            if len(chosen):
                weight = spec["alpha"] * squash(read(x[chosen], t))
                x = x.clone()
                x[chosen] = x[chosen] + weight[:, None] * run_layers(model, x[chosen], core, chosen)
            for token in chosen.tolist():
                taken[token] += 1
            alive = chosen
    else:
        scores = read(x, None)
        scores = scores.softmax(-1) if spec["score"] == "softmax" else scores.sigmoid()
        scores = spec["alpha"] * scores
        bias = base.halting.balancing_bias
        depth = (scores if bias is None else scores + bias).argmax(-1)
        output, state = x.clone(), x.clone()
        for t in range(num_loops):
            active = everyone[depth >= t]
            if not len(active):
                break
            state[active] = run_layers(model, state[active], core, active)
            for token in active.tolist():
                taken[token] += 1
                if depth[token] == t or t == num_loops - 1:
                    weight = 1.0 if spec["gating"] == "additive" else scores[token, depth[token]]
                    output[token] = x[token] + weight * state[token]
        x = output
    return model.to_logits(base.norm(run_layers(model, x, coda, everyone))), taken


@pytest.mark.parametrize("num_loops", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_a_routed_model_is_the_one_that_runs_the_chosen_tokens_alone(name, num_loops):
    model, tokens = routed(name), random_tokens(3, 13)
    output = model(tokens, num_loops=num_loops, use_cache=False)
    for row in range(3):
        expected, taken = by_hand(model, tokens[row], num_loops)
        assert_close(output.logits[row], expected)
        assert output.exit_loops[row].tolist() == taken
    assert len(output.exit_loops.unique()) > 1 or num_loops == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_padding_takes_no_place(name, attention):
    model = routed(name, attn_implementation=attention)
    tokens = random_tokens(1, 8)
    for side in ((3, 0), (0, 3)):
        padded = torch.nn.functional.pad(tokens, side)
        mask = torch.nn.functional.pad(torch.ones_like(tokens), side)
        logits = model(padded, attention_mask=mask, use_cache=False).logits[:, mask[0].bool()]
        assert_close(logits, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_causal_router_gives_the_same_from_every_cache(name):
    model, tokens = routed(name), random_tokens(2, 9)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens, use_cache=False, **greedy)
    assert torch.equal(model.generate(tokens, **greedy), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(tokens, **static, **greedy), expected)


@pytest.mark.parametrize("num_loops", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_trained_parameter_gets_a_gradient(name, num_loops):
    model, tokens = routed(name).train(), random_tokens(2, 9)
    model(tokens, labels=tokens, num_loops=num_loops, use_cache=False).loss.backward()
    assert [n for n, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_a_router_works_where_hooks_bring_the_weights(name):
    model, tokens = routed(name), random_tokens(2, 9)
    expected = model(tokens, use_cache=False)
    offloaded = cpu_offload(model, execution_device="cpu")
    actual = offloaded(tokens, use_cache=False)
    assert torch.equal(actual.exit_loops, expected.exit_loops)
    assert_close(actual.logits, expected.logits)


def test_what_is_not_trained_stays_so_after_loading(tmp_path):
    model = routed("balanced")
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.halting.balancing_bias, model.model.halting.balancing_bias)
    assert "model.halting.balancing_bias" not in dict(loaded.named_parameters())


@pytest.mark.parametrize("name", ROUTERS)
def test_one_loop_of_a_routed_model_is_no_stack(name):
    with pytest.raises(REFUSED, match="halting="):
        routed(name).unroll(1)


@torch.no_grad()
def test_a_router_of_the_whole_row_takes_positions_that_pack_nothing_compiled_too():
    model, tokens = routed("top_k"), random_tokens(2, 6)
    positions = torch.arange(6)[None] + 2
    expected = model(tokens).logits
    assert_close(model(tokens, position_ids=positions).logits, expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens, position_ids=positions).logits, expected)


def test_what_cannot_route_is_refused():
    tokens = random_tokens(1, 6)
    with pytest.raises(REFUSED, match="looks at the whole sequence"):
        routed("top_k").generate(tokens, max_new_tokens=2)
    with pytest.raises(REFUSED, match="one sequence per row"):
        routed("top_k")(tokens, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool), use_cache=False)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1]])
    with pytest.raises(REFUSED, match=r"position_ids that do not go up.*one sequence per row"):
        routed("top_k")(tokens, position_ids=packed)
    with pytest.raises(REFUSED, match=r"cu_seq_lens_q.*one sequence per row"):
        routed("top_k")(tokens, cu_seq_lens_q=torch.tensor([0, 4, 6]))
    with pytest.raises(REFUSED, match="which eager and sdpa attention take"):
        routed("token", attn_implementation="flex_attention")(tokens)
    with pytest.raises(REFUSED, match="a paged cache hides no token"):
        routed("token").generate_batch([[1, 2, 3]])
    with pytest.raises(REFUSED, match=r"loop_update=.* with halting='token_choice'"):
        tiny_config(halting="token_choice", loop_update="damped", **IN_PLACE)
    worse = ({"score": "softmax"}, {"gating": "none"}, {"router_width": 0}, {"temperature": 0.0})
    for bad in ({"capacity": [0.0]}, {"alpha": float("inf")}, {"selection": "best"}, *worse):
        with pytest.raises(REFUSED, match=next(iter(bad))):
            tiny_config(halting={"type": "expert_choice", **bad}, **IN_PLACE)


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_shared_keys_and_values_are_those_of_every_token_in_the_first_loop(name):
    model, tokens = routed(name, kv_sharing="first_loop"), random_tokens(2, 9)
    output = model(tokens, use_cache=False)
    assert len(output.exit_loops.unique()) > 1
    # the same layers for all tokens with the first loop's keys, and the router's choice of what is kept of it
    full = tiny_model(std=1.0, kv_sharing="first_loop", **IN_PLACE)
    full.load_state_dict(model.state_dict(), strict=False)
    base, states = full.model, []
    prelude, core, coda = model.config.slot_layout().stored_ranges()
    positions = torch.arange(9)[None]
    cos, sin = base.rotary_emb(base.embed_tokens(tokens), positions)
    options = {"attention_mask": torch.full((9, 9), -torch.inf).triu(1)[None, None]}
    options["position_embeddings"] = (cos.unsqueeze(1), sin.unsqueeze(1))
    x = base.embed_tokens(tokens)
    for layer in prelude:
        x = base.layers[layer](x, 0, 0, **options)
    rule, held = model.model.halting, {}
    readings, valid = rule.start(x), torch.ones_like(tokens, dtype=torch.bool)
    for loop in range(3):
        route, y = rule.route(readings, x, loop, valid), x
        for layer in core:
            y, held[layer] = base.layers[layer](y, 0, loop, *([held[layer]] if loop else []), **options)
        states.append(rule.merge(route, x, y))
        readings = rule(readings, Step(x, x, states[-1], route.active), loop, loop == 2)
        x = states[-1]
    x = readings.output
    for layer in coda:
        x = base.layers[layer](x, 0, 0, **options)
    assert_close(output.logits, model.to_logits(base.norm(x)))


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_causal_router_with_shared_keys_and_values_gives_the_same_from_a_cache(name):
    model, tokens = routed(name, kv_sharing="first_loop"), random_tokens(2, 9)
    stepwise = stepwise_logits(model, tokens, DynamicCache(config=model.config), (4,))
    assert_close(stepwise, model(tokens, use_cache=False).logits)
