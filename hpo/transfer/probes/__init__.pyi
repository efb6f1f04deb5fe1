from .run import consult as consult
