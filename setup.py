"""Package metadata and dependency ranges; ruff and pytest settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup


QUANTIZE = ["torchao>=0.18,<0.19", "bitsandbytes>=0.50,<0.51"]  # the language model in 8 or 4 bits
APP = ["gradio>=6.31,<7"]  # the page
SERVE = [  # `sense serve`
    "fastapi>=0.116,<1",
    "starlette>=0.44,<2",  # bounds the parts of a form
    "uvicorn>=0.34,<1",
    "python-multipart>=0.0.18,<0.1",
    "prometheus-client>=0.21,<1",
]
CONTROLS = ["spacy>=3.8.7,<3.9", "vaderSentiment>=3.3.2,<4"]  # what eval_sense.py --controls compares with
DOCS = [  # `make docs`, and the notebook that the tests run
    "mkdocs-material>=9.6,<10",
    "mkdocstrings[python]>=1.0,<2",
    "ipykernel>=7,<8",
    "nbclient>=0.10,<1",
    "nbformat>=5.10,<6",
]

setup(
    name="sense-asr",
    version="0.1.0",
    description="Speech-language models from a frozen Whisper encoder and a small LLM, native to transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["modeling_sense", "processing", "processing.*"])
    + ["recipes", "recipes.mini", "recipes.sense_mini", "recipes.accelerate", "checkpoints"],
    package_data={
        "modeling_sense": ["py.typed"],
        "processing": ["py.typed", "templates/*"],
        "processing.metrics": ["*/README.md", "*/requirements.txt"],
        "recipes.sense_mini": ["about.md"],
        "checkpoints": ["sense-mini/*"],
        "": ["*.yaml", "*.json"],
    },
    py_modules=["annotate_sense", "app", "eval_sense", "sense_cli", "serve", "train_sense"],
    entry_points={"console_scripts": ["sense=sense_cli:cli"]},
    install_requires=[
        # torch and torchaudio must be of matching CUDA builds, on machines without a GPU too: torchaudio 2.11 loads
        # with torch 2.11 to 2.14, not with a CPU-only build.
        "torch>=2.11,<2.15",
        "torchaudio>=2.11,<2.12",
        "transformers>=5.24,<6",  # 5.24 renamed past_key_values to cache
        "accelerate>=1.15,<2",  # the oldest that puts a whole model on the disk
        "peft>=0.21,<1",
        "datasets>=5.2,<6",
        "evaluate>=0.4.6,<0.5",
        "safetensors>=0.6,<1",
        "huggingface-hub>=2.0,<3",
        "soundfile>=0.13,<1",
        "jiwer>=4.0,<5",
        "scikit-learn>=1.5,<2",
        "whisper-normalizer>=0.1.12,<0.2",
        "espeakng-loader>=0.2.4,<0.3",  # speaks the quickstart's corpus
        "fsspec[http]>=2024.9,<2027",  # audio that a row names by an address
        "gguf>=0.17,<1",  # backbones without the Hub
        "filelock>=3.16",
        "jinja2>=3.1.6,<4",  # transformers renders chat templates with no older one
        "numpy>=2.1,<3",  # 2.0.0 returns `unique`'s inverse with another shape
        "silero-vad>=6.2,<7",  # where long recordings are cut
        "pyyaml>=6.0,<7",
        "rich>=14,<16",
        "matplotlib>=3.9,<4",
        "tensorboard>=2.18,<3",
        "tqdm>=4.66,<5",
        "typer>=0.20,<1",
    ],
    extras_require={
        "app": APP,
        "controls": CONTROLS,
        "docs": DOCS,
        "quantize": QUANTIZE,
        "serve": SERVE,
        "dev": [
            *APP,
            *CONTROLS,
            *DOCS,
            *QUANTIZE,
            *SERVE,
            "transformers[serving]",
            "atheris>=3.0,<4; platform_system == 'Linux'",  # coverage-guided fuzzing of the parsers
            "build>=1.2,<2",
            "httpx>=0.28,<1",
            "hypothesis>=6.100,<7",
            "mypy>=2.1,<3",
            "openai>=2,<4",  # the client that the server answers
            "pip-audit>=2.9,<3",
            "playwright>=1.50,<2",
            "pocketsphinx>=5.0,<6",  # the forced alignment that word times are compared with
            "pytest>=8.4,<10",
            "pytest-cov>=7.0,<8",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.13,<1",
            "setuptools>=77",
            "types-pyyaml>=6.0,<7",
            "uv>=0.8,<1",
        ],
    },
)
