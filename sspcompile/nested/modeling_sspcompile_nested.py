# Copyright the sspcompile authors. Licensed under the Apache License, Version 2.0.
"""Decoder classes that hold several sizes of one model and switch between them (`nested.json` beside the weights).

`NestedLlamaForCausalLM` is `LlamaForCausalLM` whose `set_size(0.7)` makes the matrices of every layer prefixes of the
dense ones: views, nothing is copied. Where `o_proj` or `down_proj` of a smaller size was refitted, a low-rank
difference is added to what the prefix puts out, or a matrix of its own stands in its place. A KV cache holds what
`k_proj` and `v_proj` put out, so it is as small as the size; a cache that was begun at one size cannot go on at
another. Every forward is inherited. Works with transformers 4.57 and 5.
"""

import copy
import functools
import json
import pathlib

import safetensors.torch
import torch
import transformers
from transformers.utils import cached_file

PREFIX = "Nested"
INDEX = "nested.json"
# Where a file of a model on the hub is looked for, as `from_pretrained` was told.
PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# A size that was typed is a member's own in spite of rounding.
CLOSE = 1e-9
# What the factors of a difference are called behind the name of their module: weight + lora_B diag(scale) lora_A.
WEIGHT, OUTPUTS, INPUTS, SCALES = ".weight", ".lora_B.weight", ".lora_A.weight", ".lora_scale"


class _Nested:
    """A stock class with the members of a nested artifact."""

    @classmethod
    def from_pretrained(cls, place, *args, **kwargs):
        where = {key: kwargs[key] for key in PLACE if kwargs.get(key) is not None}
        loaded = super().from_pretrained(place, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model._open_members(place, where)
        return loaded

    @property
    def sizes(self):
        """The sizes that `set_size` knows, as shares of all parameters, the whole model first."""
        return tuple(member["share"] for member in self._index["members"])

    @property
    def size(self):
        """The size that the model has now."""
        return self.sizes[self._at]

    def set_size(self, share):
        """Become the largest member of at most this share of the parameters; gives that member's share.

        Raises ValueError below the smallest.
        """
        found = next((at for at, own in enumerate(self.sizes) if own <= share + CLOSE), None)
        if found is None:
            raise ValueError(f"There is no member of {share}; the sizes are {', '.join(map(str, self.sizes))}.")
        self._become(found)
        return self.size

    def at(self, share):
        """A second model of that size over the same weights, which can be a draft for this one: `assistant_model` of
        `generate`. Moves and casts are for the one that was loaded, before. Raises like `set_size`.
        """
        tensors = [*self.parameters(), *self.buffers(), *(one for repair in self._repairs for one in repair.values())]
        tensors += [one for state in self._states for _, own, *_ in state for one in own.values() if one is not None]
        twin = copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})
        twin.set_size(share)
        return twin

    def save_pretrained(self, *args, **kwargs):
        raise NotImplementedError("Copy the model's folder, or write one size: sspcompile slice --from FOLDER --size S")

    def _open_members(self, place, where):
        self._index = json.loads(pathlib.Path(cached_file(place, INDEX, **where)).read_text("utf-8"))
        weights = list(self.model.layers.parameters())
        if any(weight.is_meta or not weight.is_floating_point() for weight in weights):
            raise ValueError("A nested model has to be in memory as a whole and unquantised.")
        files = [member["repair"] for member in self._index["members"]]
        self._repairs = [safetensors.torch.load_file(cached_file(place, f, **where)) if f else {} for f in files]
        self._at = 0
        for layer in self.model.layers:
            for part in self._index["parts"]:
                if part["axis"] == 1:
                    layer.get_submodule(part["module"]).register_forward_hook(_with_difference)
        self._prepare()

    def _prepare(self):
        """Make the parameters of every member once, so that a switch only puts them in their places."""
        for repair in self._repairs:
            for name, tensor in repair.items():
                module = name.removesuffix(SCALES).removesuffix(WEIGHT).removesuffix(".lora_A").removesuffix(".lora_B")
                own = self.get_parameter(module + WEIGHT)
                # Factors of one byte and their scales stay what they are.
                repair[name] = tensor.to(own.device, own.dtype if name == module + WEIGHT else tensor.dtype)
        members = self._index["members"]
        self._states = [self._state(*both) for both in zip(members, self._repairs, strict=True)]

    def _state(self, member, repair):
        """(module, its parameters, inputs, outputs, difference) of everything that a size changes."""
        found = []
        for number, layer in enumerate(self.model.layers):
            groups, width = member["groups"][number], member["widths"][number]
            rows = groups * self._index["head_dim"]
            counts = {"query": rows * self._index["group_size"], "group": rows, "channel": width}
            for part in self._index["parts"]:
                module, count = layer.get_submodule(part["module"]), counts[part["unit"]]
                own = dict(module._parameters)
                name = f"model.layers.{number}.{part['module']}"
                factors = (INPUTS, SCALES, OUTPUTS)
                difference = tuple(repair[name + one] for one in factors) if name + OUTPUTS in repair else None
                if name + WEIGHT in repair:
                    own["weight"] = _fixed(repair[name + WEIGHT])
                elif count < own["weight"].shape[part["axis"]]:
                    own["weight"] = _fixed(own["weight"].narrow(part["axis"], 0, count))
                if part["axis"] == 0 and own.get("bias") is not None and count < len(own["bias"]):
                    own["bias"] = _fixed(own["bias"][:count])
                outputs, inputs = own["weight"].shape
                found.append((module, own, inputs, outputs, difference))
        return found

    def _become(self, at):
        for module, own, inputs, outputs, difference in self._states[at]:
            module._parameters.update(own)
            module.__dict__.update(in_features=inputs, out_features=outputs, difference=difference)
        self.__dict__.pop("_cache", None)  # which transformers 4.57 keeps for the next text, in the shapes of the last
        self._at = at

    def _apply(self, *args, **kwargs):
        """Moves and casts (`to`, `half`, `cuda`) are of the whole, and its views are made again."""
        if "_states" not in self.__dict__:
            return super()._apply(*args, **kwargs)
        at = self._at
        self._become(0)
        super()._apply(*args, **kwargs)
        self._prepare()
        self._become(at)
        return self


def _with_difference(module, args, output):
    """A forward hook of o_proj and down_proj. `difference`: int8 [rank, inputs], scales [rank] and int8 [outputs,
    rank], None without any.
    """
    difference = module.__dict__.get("difference")
    if difference is None:
        return output
    (inputs, scales, outputs), linear = difference, torch.nn.functional.linear
    # Whole numbers times inputs are beyond what float16 holds, and scales below it.
    kind = torch.float32 if output.dtype == torch.float16 else output.dtype
    low = linear(args[0].to(kind), inputs.to(kind)) * scales.to(kind)
    return output + linear(low, outputs.to(kind)).to(output.dtype)


def _fixed(tensor):
    return torch.nn.Parameter(tensor.detach(), requires_grad=False)


@functools.cache
def _nested(stock_name):
    own = {"__module__": __name__, "_auto_class": "AutoModelForCausalLM"}
    return type(PREFIX + stock_name, (_Nested, getattr(transformers, stock_name)), own)


def __getattr__(name):
    if name.startswith(PREFIX):
        return _nested(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
