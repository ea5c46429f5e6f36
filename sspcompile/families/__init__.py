"""What is known of architectures: a table of facts, and what follows from it for a configuration.

Nothing in this room touches weights or imports torch; `checkpoint.tensors` turns a geometry into names and shapes.
"""

from sspcompile.families.depth import shallower, without_attention, without_layers
from sspcompile.families.geometry import LARGEST, LARGEST_SIZE, Geometry, family_of, geometry_of, layer_prefix
from sspcompile.families.gguf import GgufModel, gguf_model
from sspcompile.families.graphs import graph_refusal
from sspcompile.families.hosting import Host, holds, hosted_config, hosting, stand_in
from sspcompile.families.positions import Positions, positions_of, rope_of
from sspcompile.families.table import FAMILIES, FUSED_GATED, GATED, ONNX_FAMILIES, REFUSED, Experts, Family, Linear
from sspcompile.families.windows import windows_of

__all__ = [
    "FAMILIES",
    "FUSED_GATED",
    "GATED",
    "LARGEST",
    "LARGEST_SIZE",
    "ONNX_FAMILIES",
    "REFUSED",
    "Experts",
    "Family",
    "Geometry",
    "GgufModel",
    "Host",
    "Linear",
    "Positions",
    "family_of",
    "geometry_of",
    "gguf_model",
    "graph_refusal",
    "holds",
    "hosted_config",
    "hosting",
    "layer_prefix",
    "positions_of",
    "rope_of",
    "shallower",
    "stand_in",
    "windows_of",
    "without_attention",
    "without_layers",
]
