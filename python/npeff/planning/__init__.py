"""What a computation will take, before it runs: passes, coverage, bytes, seconds, and what to choose.

``sizes`` counts bytes, ``trial`` times real calls on the first batches, ``solving`` reckons with the decomposition,
``advice`` chooses under a budget; ``planner`` ties them together into the :class:`~npeff.planning.estimate.Plan`.
"""

from npeff.planning.estimate import Plan
from npeff.planning.planner import plan

__all__ = ["Plan", "plan"]
