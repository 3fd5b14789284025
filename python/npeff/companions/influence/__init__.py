"""Cross-loss influence functions: the effect of training examples on another loss, or on a component's coefficients.

::

    train, train_loss ──▶ H ──solver──▶ H⁻¹∇L_test ──▶ scores (n_train, n_test) ──▶ top · group · removal
    test,  test_loss  ──▶ ∇L_test ───────┘                                    └──▶ unlearn

``I(z, z_test) = −∇L_test(z_test)ᵀ H⁻¹ ∇L_train(z)`` (Silva, Chopra & Gombolay, AISTATS 2022, arXiv 2012.01685).
"""

from npeff.companions.influence.coefficient import Coefficient, ComponentInfluence, component_influence
from npeff.companions.influence.curvature import EKFAC, EmpiricalFisher, GaussNewton
from npeff.companions.influence.estimator import CrossLossInfluence, Scores
from npeff.companions.influence.losses import cross_entropy, squared_error
from npeff.companions.influence.objective import Unlearned, unlearn
from npeff.companions.influence.solvers import ConjugateGradients, Exact, Identity, LiSSA, Solution

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
    "Scores",
    "Solution",
    "Unlearned",
    "component_influence",
    "cross_entropy",
    "squared_error",
    "unlearn",
]
