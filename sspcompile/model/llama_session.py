"""A GGUF in llama.cpp, by llama-cpp-python: one text at a time, read and gone on with."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.checkpoint.manifest import NAME as MANIFEST
from sspcompile.checkpoint.references import read_settings
from sspcompile.errors import ArtifactError, InputError
from sspcompile.machine import usable_cores

if TYPE_CHECKING:
    from llama_cpp import Llama

MODEL = "model.gguf"
PACKAGE = "llama_cpp"
# The type of the cache (ggml_type).
F32, F16 = 0, 1
# A context is made anew for a longer text, which opens the file once more.
LEAST_CONTEXT = 512


def is_gguf(folder: Path) -> bool:
    """Whether this is an export for llama.cpp, and not a model folder with such a file beside its own weights."""
    return (folder / MODEL).is_file() and not any(folder.glob("*.safetensors"))


def gguf_context(folder: Path) -> int | None:
    """The longest text of an export in tokens, from its manifest; None where that does not say."""
    said = _origin(folder).get("context_length")
    return said if isinstance(said, int) else None


def gguf_type(folder: Path) -> str | None:
    """The type of an export as `--type` names it, from its manifest; None where that does not say."""
    said = _origin(folder).get("type")
    return said if isinstance(said, str) else None


def _origin(folder: Path) -> dict[str, Any]:
    """What a manifest says of an export; nothing where there is none."""
    found = read_settings(folder / MANIFEST).get("origin", {})
    return found if isinstance(found, dict) else {}


def has_llama_cpp() -> bool:
    """Whether llama.cpp can be run here."""
    return importlib.util.find_spec(PACKAGE) is not None


def demand_llama_cpp() -> None:
    """Raise InputError where llama.cpp cannot be run."""
    if not has_llama_cpp():
        raise InputError("llama.cpp is not installed.", hint="pip install 'sspcompile[gguf]' (it compiles llama.cpp)")


class LlamaModel:
    """One file, open in llama.cpp on the processor.

    `exact` keeps keys and values in fp32 instead of fp16. `scoring` keeps the logits of every token. `context`: tokens
    that there is room for; more makes room anew.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        exact: bool = False,
        scoring: bool = False,
        context: int = LEAST_CONTEXT,
    ) -> None:
        """Open a file. Raises InputError without llama.cpp, and ArtifactError for a file that it does not take."""
        demand_llama_cpp()
        self._path, self._exact, self._scoring = path, exact, scoring
        self._threads = threads or usable_cores()
        self._llama = self._opened(context)

    def _opened(self, context: int) -> Llama:
        import llama_cpp

        quiet()
        kind = F32 if self._exact else F16
        try:
            return llama_cpp.Llama(
                str(self._path),
                n_ctx=context,
                n_batch=LEAST_CONTEXT,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                logits_all=self._scoring,
                type_k=kind,
                type_v=kind,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"llama.cpp cannot open {self._path}: {error}.", hint="Export it again.") from error

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self._llama.n_vocab()

    @property
    def positions(self) -> int | None:
        """The longest text that the model was made for, in tokens; None where the file does not say."""
        architecture = self._llama.metadata.get("general.architecture")
        said = self._llama.metadata.get(f"{architecture}.context_length")
        return int(said) if said is not None else None

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, special ones by their names."""
        return self._llama.tokenize(text.encode("utf-8"), add_bos=True, special=True)

    def start(self, ids: Sequence[int], room: int) -> np.ndarray:
        """Read a text from its start, with room for as many tokens in all; logits of its last token, [V] fp32."""
        if self._llama.n_ctx() < room:
            self._llama.close()
            self._llama = self._opened(room)
        self._llama.reset()
        return self.read(ids)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Read on; logits of the last token, [V] fp32."""
        import llama_cpp

        self._llama.eval(list(ids))
        last = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(last, shape=(self.vocab,)).copy()

    def scores(self) -> np.ndarray:
        """Logits of everything that was read since `start`, [T, V] fp32. Raises ValueError without `scoring`."""
        if not self._scoring:
            raise ValueError("this model was opened without scoring")
        return self._llama.scores[: self._llama.n_tokens].copy()

    def close(self) -> None:
        """Let go of the file and its memory."""
        self._llama.close()


@functools.cache
def quiet() -> object:
    """llama.cpp writes nothing to stderr; what it raises is told by the command line.

    What is returned is what llama.cpp calls instead, and must live as long as it does: the cache keeps it.
    """
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def quantise(source: Path, target: Path, file_type: int, *, threads: int | None = None) -> None:
    """Round a file to a type (llama_ftype) by llama.cpp's own quantiser. Raises ArtifactError where it fails."""
    import llama_cpp

    quiet()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = file_type
    settings.nthread = threads or usable_cores()
    failed = llama_cpp.llama_model_quantize(
        str(source).encode("utf-8"), str(target).encode("utf-8"), ctypes.byref(settings)
    )
    if failed:
        raise ArtifactError("llama.cpp's quantiser failed.", hint="Use another --type.")
