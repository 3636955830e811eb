"""How good a model is: one file per metric."""

from .frechet import Moments as Moments
from .frechet import frechet_distance as frechet_distance
