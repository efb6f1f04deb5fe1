"""The search space: the parameters of a study, their values, and how a proposal becomes kohya's settings.

An inner room of ``hpo.study``; other rooms import its names from ``hpo.study``.
"""
