"""What a benchmark asks of its contenders."""

from __future__ import annotations

from dataclasses import dataclass

from sspcompile.errors import InputError

LEAST = {"sessions": 1, "trials": 1, "warmup": 0, "threads": 1}
FLAGS = {"trials": "repeats", "sessions": "processes"}
LEAST_LOAD = {"batch": 1, "prompt_tokens": 1, "new_tokens": 2}


@dataclass(frozen=True)
class Load:
    """`batch` sequences of `prompt_tokens` each, and `new_tokens` decoded after them (the first one by the prefill)."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def label(self) -> str:
        return f"batch {self.batch}, {self.prompt_tokens}+{self.new_tokens} tokens"

    @property
    def positions(self) -> int:
        """Columns that the cache must hold."""
        return self.prompt_tokens + self.new_tokens

    @property
    def mean_context(self) -> float:
        """Cached positions that a decode step reads on average, its own included."""
        return self.prompt_tokens + self.new_tokens / 2


@dataclass(frozen=True)
class Settings:
    """Equal for all contenders.

    `trials` of every load are counted in each of `sessions` fresh processes, after `warmup` that are not. `device` is
    `cpu`, or another of torch's; `memory` the bytes that capacities are worked out for. Models in transformers compute
    in `dtype`, or for auto in the one that they are stored in, and with a `device_map` are spread over devices.
    """

    loads: tuple[Load, ...]
    sessions: int
    trials: int
    warmup: int
    threads: int
    seed: int
    device: str
    memory: int
    dtype: str = "auto"
    device_map: str | None = None

    def check(self) -> None:
        """Raises InputError for what cannot be measured."""
        if not self.loads or len(set(self.loads)) != len(self.loads):
            raise InputError("A benchmark needs at least one load, each once.")
        values = [(name, getattr(self, name), low) for name, low in LEAST.items()]
        values += [(name, getattr(load, name), low) for load in self.loads for name, low in LEAST_LOAD.items()]
        for name, value, low in values:
            if value < low:
                flag = FLAGS.get(name, name.replace("_", "-"))
                raise InputError(f"--{flag} is {value}.", hint=f"It must be at least {low}.")
