"""What runs: the packed linear, the quantized key-value cache, and the ops `torch.ops.bitwright` (schemas.py)."""

from bitwright.runtime import activation_ops as activation_ops
from bitwright.runtime import attention_ops as attention_ops
from bitwright.runtime import block_ops as block_ops
from bitwright.runtime import hadamard_ops as hadamard_ops
from bitwright.runtime import ops as ops
from bitwright.runtime import plane_ops as plane_ops
from bitwright.runtime import solver_ops as solver_ops
from bitwright.runtime.kv_cache import QuantizedKVCache as QuantizedKVCache
from bitwright.runtime.linear import QuantizedLinear as QuantizedLinear
from bitwright.runtime.linear import dense_weights as dense_weights
from bitwright.runtime.linear import pack_sites as pack_sites
from bitwright.runtime.linear import quantized_linears as quantized_linears
from bitwright.runtime.linear import to_site as to_site
from bitwright.runtime.outer import QuantizedEmbedding as QuantizedEmbedding
from bitwright.runtime.outer import QuantizedHead as QuantizedHead
from bitwright.runtime.outer import quantized_outers as quantized_outers
