"""Load saved folders where the package is missing: `python -I hub_load_alone.py JOBS RESULTS`.

JOBS is a JSON file, a list of {"name", "folder", "auto_classes", "again"}; `folder` may be the id of a repository in
the Hub's cache. Each folder is loaded with each Auto class and `trust_remote_code=True`, run, and saved again to
`again` from the last class. RESULTS is a file that `torch.load` reads: name -> Auto class -> what was seen.
"""

import importlib
import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

TOKENS = torch.tensor([[5, 17, 80, 41, 9, 33, 62], [12, 3, 7, 90, 55, 21, 4]])


class PackageMissing(importlib.abc.MetaPathFinder):
    """Hides `modeling_looped`, however it is installed. (The copies that Transformers makes have other names.)"""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "modeling_looped":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def look(model: Any, missing_keys: list[str]) -> dict[str, Any]:
    """What a loaded model computes on `TOKENS`, and where its code comes from."""
    seen = {
        "module": type(model).__module__,
        "config_module": type(model.config).__module__,
        "missing_keys": sorted(missing_keys),
        "auto_map": dict(model.config.auto_map),
        "hidden": model.base_model(TOKENS).last_hidden_state,
        "output": model(TOKENS)[0],
    }
    if model.can_generate():
        seen["generated"] = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    return seen


@torch.no_grad()
def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that one folder is asked for."""
    folder, seen = job["folder"], {}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if not job["auto_classes"]:  # a folder without weights
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, trust_remote_code=True).eval()
        seen["AutoConfig"] = look(model, [])
        config.save_pretrained(job["again"])
    for auto_class in job["auto_classes"]:
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        seen[auto_class] = look(model.eval(), info["missing_keys"])
    if job["auto_classes"]:
        model.save_pretrained(job["again"])
        one_loop = type(model).from_pretrained(folder, num_loops=1).eval()
        seen[job["auto_classes"][-1]]["one_loop"] = one_loop(TOKENS)[0]
    if Path(folder, "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        pipeline = transformers.pipeline("text-generation", model=folder, trust_remote_code=True)
        (answer,) = pipeline("w5 w17 w80", max_new_tokens=4, do_sample=False, return_tensors=True)
        seen["text"] = {"prompt": tokenizer("w5 w17 w80")["input_ids"], "answer": answer["generated_token_ids"]}
    return seen


def main() -> None:
    sys.meta_path.insert(0, PackageMissing())
    try:
        importlib.import_module("modeling_looped")
    except ModuleNotFoundError:
        pass
    else:
        sys.exit("modeling_looped can be imported here, so this would prove nothing")
    torch.set_num_threads(1)
    jobs, results = sys.argv[1:]
    torch.save({job["name"]: run_job(job) for job in json.loads(Path(jobs).read_text())}, results)
    if "modeling_looped" in sys.modules:
        sys.exit("something imported modeling_looped")


if __name__ == "__main__":
    main()
