"""Plan, run, resume: joins models and solvers."""

from bitwright.pipeline.plan import Plan as Plan
from bitwright.pipeline.plan import plan as plan
from bitwright.pipeline.run import Quantized as Quantized
from bitwright.pipeline.run import quantize as quantize
