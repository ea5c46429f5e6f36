"""The small six-domain model that ships with the package: its domain pools and scenarios, in the small language that it
was taught, and questions whose answers are known (`questions`).

What makes both is `training`, beside this package in the repository. Importing this package loads nothing heavy.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The folder with the shipped weights, a Hugging Face model folder."""
POOLS_DIR: Path = Path(__file__).parent / "domains"
SCENARIOS_DIR: Path = Path(__file__).parent / "scenarios"
EMBEDDED = "embedded"
"""What artifacts call the model; a folder of that name is `./embedded`."""
