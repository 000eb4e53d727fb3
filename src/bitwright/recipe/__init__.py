"""What was asked for: recipes, their parts and presets."""

from bitwright.recipe.parts import ActivationRecipe as ActivationRecipe
from bitwright.recipe.parts import AllocateRecipe as AllocateRecipe
from bitwright.recipe.parts import CalibrationRecipe as CalibrationRecipe
from bitwright.recipe.parts import KVRecipe as KVRecipe
from bitwright.recipe.parts import OuterRecipe as OuterRecipe
from bitwright.recipe.parts import OutlierCount as OutlierCount
from bitwright.recipe.parts import SearchRecipe as SearchRecipe
from bitwright.recipe.parts import SiteRecipe as SiteRecipe
from bitwright.recipe.parts import TransformRecipe as TransformRecipe
from bitwright.recipe.parts import TuneRecipe as TuneRecipe
from bitwright.recipe.parts import WeightRecipe as WeightRecipe
from bitwright.recipe.parts import outlier_count as outlier_count
from bitwright.recipe.presets import DEFAULT as DEFAULT
from bitwright.recipe.presets import PRESETS as PRESETS
from bitwright.recipe.presets import preset as preset
from bitwright.recipe.whole import Recipe as Recipe
from bitwright.recipe.whole import parse_option as parse_option
