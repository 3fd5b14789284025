"""Gradient Rollback: which training examples made a prediction, for models whose steps touch few rows.

::

    model, triples ──fit──▶ Record (what every example moved) ──GradientRollback──▶ Explanation
                 (or RollbackRecorder        │                                         │
                  around a loop of one's own) └──────────── faithfulness ◀──────────────┘  leave out, train again

Lawrence, Sztyler & Niepert 2021, arXiv 2010.05516. See ``docs/companions/rollback.md``.
"""

from npeff.companions.rollback.baselines import GradientProducts, InfluenceFunctions, RandomNeighbours
from npeff.companions.rollback.components import ComponentRollback, component_rollback
from npeff.companions.rollback.explaining import Explainer, Explanation
from npeff.companions.rollback.faithfulness import Faithfulness, faithfulness, trained_without
from npeff.companions.rollback.influence import GradientRollback
from npeff.companions.rollback.models import MODELS, ComplEx, DistMult, FactorModel, MatrixFactorization
from npeff.companions.rollback.moves import Moves
from npeff.companions.rollback.recipe import Recipe
from npeff.companions.rollback.record import Record
from npeff.companions.rollback.recorder import RollbackRecorder
from npeff.companions.rollback.training import fit, retrain
from npeff.companions.rollback.triples import Vocabulary, parse_triples, read_triples

__all__ = [
    "MODELS",
    "ComplEx",
    "ComponentRollback",
    "DistMult",
    "Explainer",
    "Explanation",
    "FactorModel",
    "Faithfulness",
    "GradientProducts",
    "GradientRollback",
    "InfluenceFunctions",
    "MatrixFactorization",
    "Moves",
    "RandomNeighbours",
    "Recipe",
    "Record",
    "RollbackRecorder",
    "Vocabulary",
    "component_rollback",
    "faithfulness",
    "fit",
    "parse_triples",
    "read_triples",
    "retrain",
    "trained_without",
]
