"""The search space: what a study varies, over which values, and how a proposal becomes kohya's settings.

An inner room of ``hpo.study``; others reach it through that room's front door.
"""
