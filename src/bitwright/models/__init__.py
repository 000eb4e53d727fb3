"""Finds blocks, sites and linears of a Hugging Face causal language model; knows no quantization method."""

from bitwright.models.checkpoint import Checkpoint as Checkpoint
from bitwright.models.checkpoint import TensorInfo as TensorInfo
from bitwright.models.frame import context_length as context_length
from bitwright.models.sites import LinearInfo as LinearInfo
from bitwright.models.sites import SiteInfo as SiteInfo
from bitwright.models.skeleton import Skeleton as Skeleton
from bitwright.models.writers import ENTRY as ENTRY
