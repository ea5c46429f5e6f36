"""Streamed reading and writing of safetensors folders: the only room that touches weight files."""

from sspcompile.checkpoint.companions import copy_companions
from sspcompile.checkpoint.fingerprint import fingerprint
from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.locate import embedded_model, locate
from sspcompile.checkpoint.manifest import Manifest, check_manifest, write_manifest
from sspcompile.checkpoint.publish import staged
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.transfer import Extent
from sspcompile.checkpoint.writer import OutputTensor, write_checkpoint

__all__ = [
    "Checkpoint",
    "Extent",
    "Manifest",
    "OutputTensor",
    "TensorInfo",
    "check_manifest",
    "copy_companions",
    "embedded_model",
    "fingerprint",
    "locate",
    "staged",
    "write_checkpoint",
    "write_manifest",
]
