"""What a computation will take, before it runs: passes, coverage, bytes, seconds, and what to choose.

``sizes`` counts bytes, ``trial`` times real calls on the first batches, ``solving`` reckons with the decomposition,
``advice`` chooses under a budget; ``planner`` ties them together into the :class:`~npeff.planning.planner.Plan` that
``table`` prints.
"""

from npeff.planning.planner import Plan, plan

__all__ = ["Plan", "plan"]
