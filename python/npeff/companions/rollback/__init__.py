"""Gradient Rollback: find the training examples behind a prediction, for models whose steps change few rows.

::

    model, triples ──fit──▶ Record (the updates of every example) ──GradientRollback──▶ Explanation
                 (or RollbackRecorder        │                                            │
                  in a loop of your own)     └────────────── faithfulness ◀───────────────┘  leave out, train again

Lawrence, Sztyler & Niepert 2021, arXiv 2010.05516. See ``docs/companions/rollback.md``.
"""

from npeff.companions.rollback.explain import (
    ComponentRollback,
    Explainer,
    Explanation,
    Faithfulness,
    GradientRollback,
    component_rollback,
    faithfulness,
    retrain,
    trained_without,
)
from npeff.companions.rollback.factor_models import (
    MODELS,
    ComplEx,
    DistMult,
    FactorModel,
    MatrixFactorization,
    Vocabulary,
    read_triples,
)
from npeff.companions.rollback.record import Recipe, Record, RowUpdates
from npeff.companions.rollback.training import RollbackRecorder, fit

__all__ = [
    "MODELS",
    "ComplEx",
    "ComponentRollback",
    "DistMult",
    "Explainer",
    "Explanation",
    "FactorModel",
    "Faithfulness",
    "GradientRollback",
    "MatrixFactorization",
    "Recipe",
    "Record",
    "RollbackRecorder",
    "RowUpdates",
    "Vocabulary",
    "component_rollback",
    "faithfulness",
    "fit",
    "read_triples",
    "retrain",
    "trained_without",
]
