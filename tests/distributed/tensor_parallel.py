"""Worker: models split over two processes by their tensor-parallel plan. `python -m torch.distributed.run … FOLDER`.

Loads `FOLDER/<variant>` with `tp_plan="auto"`, runs TOKENS, and writes what rank 0 saw to `FOLDER/seen.pt`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import VARIANTS, random_tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import modeling_looped  # noqa: F401  (registers the Auto classes)
from distributed.leave import leave

MODELS = {
    **{
        name: VARIANTS[name]
        for name in ("norms", "post_branch", "albert", "lora", "sandwich", "sliding", "gated_attention", "nanbeige")
    },
    # in training its own start is drawn, by every process for itself
    "parcae_code": {**VARIANTS["parcae_code"], "state_init": "zeros"},
    "per_head_lora": {**VARIANTS["lora"], "qk_norm": "per_head"},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "halting": VARIANTS["halting_gate"],
}
TOKENS = random_tokens(2, 7)


def look(folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        seen = {
            "local_rows": (weight.to_local() if isinstance(weight, DTensor) else weight).shape[0],
            "logits": model(TOKENS).logits,
            "one_loop": model(TOKENS, num_loops=1).logits,
            "generated": model.generate(TOKENS, max_new_tokens=4, do_sample=False),
        }
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    seen["gradients"] = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
    }
    return seen


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = {name: look(folder / name) for name in MODELS}
    if dist.get_rank() == 0:
        torch.save(seen, folder / "seen.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
