"""Cross-loss influence functions: which training examples made a model what another loss, or a component, sees in it.

::

    train, train_loss ──▶ H ──solver──▶ H⁻¹∇L_test ──▶ scores (n_train, n_test) ──▶ top · group · removal
    test,  test_loss  ──▶ ∇L_test ───────┘                                    └──▶ unlearn, leave_out

``I(z, z_test) = −∇L_test(z_test)ᵀ H⁻¹ ∇L_train(z)`` (Silva, Chopra & Gombolay, AISTATS 2022, arXiv 2012.01685).
"""

from npeff.companions.influence.coefficient import Coefficient, ComponentInfluence, component_influence
from npeff.companions.influence.estimator import CrossLossInfluence
from npeff.companions.influence.losses import cross_entropy, squared_error
from npeff.companions.influence.minimising import Minimum, minimise
from npeff.companions.influence.retraining import Retrained, leave_out
from npeff.companions.influence.scores import Scores
from npeff.companions.influence.solvers import (
    EKFAC,
    ConjugateGradients,
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Identity,
    LiSSA,
)
from npeff.companions.influence.unlearning import Unlearned, unlearn

__all__ = [
    "EKFAC",
    "Coefficient",
    "ComponentInfluence",
    "ConjugateGradients",
    "CrossLossInfluence",
    "EmpiricalFisher",
    "Exact",
    "GaussNewton",
    "Identity",
    "LiSSA",
    "Minimum",
    "Retrained",
    "Scores",
    "Unlearned",
    "component_influence",
    "cross_entropy",
    "leave_out",
    "minimise",
    "squared_error",
    "unlearn",
]
