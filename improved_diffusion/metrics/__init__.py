"""How good a model is: one file per metric."""

from .features import FeatureNetwork as FeatureNetwork
from .features import features_of as features_of
from .frechet import Moments as Moments
from .frechet import frechet_distance as frechet_distance
from .inception_score import inception_score as inception_score
from .kernel import kernel_distance as kernel_distance
from .precision_recall import precision_recall as precision_recall
