"""The small six-domain model that ships with the package, with everything that makes it.

`corpus` generates the text, `train` the weights, `evaluate` the accuracy, `pools` the domain pools. Importing this
package loads nothing heavy.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The folder with the shipped weights, a Hugging Face model folder."""
