"""What Fishers and their decomposition will take, before they are computed."""

from npeff.planning.planner import Plan, plan

__all__ = ["Plan", "plan"]
