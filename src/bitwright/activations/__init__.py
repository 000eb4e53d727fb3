"""Activation quantizers: what happens to the input of a site at run time."""

from bitwright.activations.quantizer import QuantizedGroups as QuantizedGroups
from bitwright.activations.quantizer import quantize_groups as quantize_groups
from bitwright.activations.quantizer import quantize_outliers as quantize_outliers
from bitwright.activations.quantizer import quantize_site as quantize_site
