"""Routers: who takes part in a loop, against the definition token by token, and what cannot route is refused."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import assert_close, random_tokens, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError

from modeling_looped import LoopedForCausalLM

#: A config's own checks reach the user through `@strict`.
REFUSED = (ValueError, StrictDataclassError)
IN_PLACE = {"injection": "none", "state_init": "input", "prelude_norm": False}
ROUTERS = {
    "top_k": {"type": "expert_choice", "capacity": [1.0, 0.6, 0.4]},
    "threshold": {"type": "expert_choice", "selection": "threshold"},
    "token": {"type": "token_choice", "alpha": 0.7},
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
    W = base.halting.router.weight
    taken = [0] * len(tokens)
    if spec["type"] == "expert_choice":
        alive = everyone
        for t in range(num_loops):
            gate = torch.sigmoid(x[alive] @ W[min(t, len(W) - 1)])
            if spec["selection"] == "threshold":
                chosen = alive[gate >= 0.5]
            else:
                share = spec["capacity"][min(t, len(spec["capacity"]) - 1)]
                chosen = alive[gate.topk(min(len(alive), max(1, int(share * len(tokens))))).indices.sort().values]
            if len(chosen):
                weight = spec["alpha"] * torch.sigmoid(x[chosen] @ W[min(t, len(W) - 1)])
                x = x.clone()
                x[chosen] = x[chosen] + weight[:, None] * run_layers(model, x[chosen], core, chosen)
            for token in chosen.tolist():
                taken[token] += 1
            alive = chosen
    else:
        scores = x @ W.T
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
                    output[token] = x[token] + scores[token, depth[token]] * state[token]
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


def test_what_cannot_route_is_refused():
    tokens = random_tokens(1, 6)
    with pytest.raises(REFUSED, match="looks at the whole sequence"):
        routed("top_k").generate(tokens, max_new_tokens=2)
    with pytest.raises(REFUSED, match="one sequence per row"):
        routed("top_k")(tokens, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool), use_cache=False)
    with pytest.raises(REFUSED, match="which eager and sdpa attention take"):
        routed("token", attn_implementation="flex_attention")(tokens)
    with pytest.raises(REFUSED, match="a paged cache hides no token"):
        routed("token").generate_batch([[1, 2, 3]])
    with pytest.raises(REFUSED, match=r"loop_update=.* with halting='token_choice'"):
        tiny_config(halting="token_choice", loop_update="damped", **IN_PLACE)
    for bad in ({"capacity": [0.0]}, {"alpha": float("inf")}, {"selection": "best"}):
        with pytest.raises(REFUSED, match=next(iter(bad))):
            tiny_config(halting={"type": "expert_choice", **bad}, **IN_PLACE)
