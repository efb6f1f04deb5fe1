"""The health of the machine and of a long run: figures, levels, alerts, and what is done about them.

Owns what is measured (``reading``, ``nvml``, ``machine``), the judgement (``health``), health.jsonl (``log``), and the
watch beside the work (``guard``).  Does not own the thresholds (``hpo.study.thresholds``), the messages that are sent
(``hpo.study.notify``) or the restart of a process (``hpo.night``).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
