"""How good a model or artifact is."""

from bitwright.evaluation.loading import check_dtype as check_dtype
from bitwright.evaluation.loading import load as load
from bitwright.evaluation.perplexity import Perplexity as Perplexity
from bitwright.evaluation.perplexity import evaluate as evaluate
from bitwright.evaluation.perplexity import evaluate_model as evaluate_model
from bitwright.evaluation.perplexity import window_for as window_for
