"""Packaging of `modeling_looped`. `pyproject.toml` configures the tools, `constraints.txt` pins exact versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version from `modeling_looped/version.py`, read as text: importing the package would need torch."""
    source = (ROOT / "modeling_looped" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('modeling_looped/version.py must hold a line `__version__ = "X.Y.Z"`')
    return match.group(1)


# The lower ends are the releases that the suite runs on; an older one may work, but nothing shows it.
REQUIRES = ["torch>=2.13", "transformers>=5.23"]

EXTRAS = {
    # Reading GGUF checkpoints, among them the one that `make demo` retrofits.
    # Transformers loads GGUF files only where accelerate is; scipy matches neurons and heads before layers are merged.
    "conversion": ["accelerate>=1.15", "gguf>=0.19", "scipy>=1.17"],
    # Pictures of reports, and model cards.
    "report": ["Jinja2>=3.1", "matplotlib>=3.11"],
    # `python -m modeling_looped scaling-law`.
    "scaling": ["matplotlib>=3.11", "pandas>=3.1", "scipy>=1.17"],
    "train": [
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "peft>=0.21.2",
        "tensorboard>=2.21",
        "trl>=1.16",
    ],
    "eval": ["lm_eval>=0.4.13"],
    "test": [
        "hypothesis>=6.170",
        "pytest>=9.2",
        "pytest-cov>=7.1",
        "pytest-xdist>=3.8",
        # The two backends of Transformers' quantised cache.
        "hqq>=0.2.8",
        "optimum-quanto>=0.2.7",
    ],
    # `nodejs` brings the runtime that pyright needs, so that no Node has to be installed.
    "lint": ["pyright[nodejs]>=1.1.414", "ruff>=0.17.6", "transformers-mlinter>=0.1.5"],
}
EXTRAS["dev"] = sorted(requirement for extra in EXTRAS.values() for requirement in extra)

setup(
    name="modeling-looped",
    version=read_version(),
    description="Looped language models for Hugging Face Transformers: train, convert, run and share them.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["transformers", "looped transformer", "recurrent depth", "weight sharing", "language model"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # `configuration/`, `conversion/`, `model_cards/` and `tests/` are folders of the repository, never installed.
    packages=find_packages(include=["modeling_looped", "modeling_looped.*"]),
    # Data files that the code opens by path, such as the model-card template.
    package_data={"modeling_looped": ["py.typed", "**/*.md", "**/*.json", "**/*.yaml"]},
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    zip_safe=False,
)
