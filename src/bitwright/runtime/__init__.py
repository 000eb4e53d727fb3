"""What runs: the packed linear and the quantized key-value cache."""

from bitwright.runtime.kv_cache import QuantizedKVCache as QuantizedKVCache
from bitwright.runtime.linear import QuantizedLinear as QuantizedLinear
from bitwright.runtime.linear import dense_weights as dense_weights
from bitwright.runtime.linear import pack_sites as pack_sites
from bitwright.runtime.linear import quantized_linears as quantized_linears
