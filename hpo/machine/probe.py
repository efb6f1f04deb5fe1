"""What PyTorch and bitsandbytes say about this machine, one JSON object a line.  Run as a process of its own.

A broken driver or library can hang or abort this process; what it has printed until then is still known.  Imports
nothing of this tool.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any


def tell(part: str, **values: Any) -> None:
    print(json.dumps({"part": part, **values}), flush=True)


def torch_part() -> None:
    import torch

    tell(
        "wheel",
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=getattr(torch.version, "hip", None),
        threads=torch.get_num_threads(),
    )
    built = list(torch.cuda.get_arch_list())
    flash = bool(getattr(torch.backends.cuda, "is_flash_attention_available", bool)())
    tell("kernels", built=built, flash=flash)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = bool(torch.cuda.is_available())
    reason = "\n".join(str(warning.message) for warning in caught)
    if not available and not reason:
        try:
            torch.cuda.init()
        except Exception as error:
            reason = str(error)
    tell("cuda", available=available, reason=reason.strip()[:500])
    for index in range(torch.cuda.device_count() if available else 0):
        about = torch.cuda.get_device_properties(index)
        card = {
            "index": index,
            "name": str(about.name),
            "capability": [int(about.major), int(about.minor)],
            "total_bytes": int(about.total_memory),
            "uuid": str(getattr(about, "uuid", "")),
        }
        try:
            (torch.ones(8, device=f"cuda:{index}") * 2).sum().item()
            free = int(torch.cuda.mem_get_info(index)[0])
            tell("card", **card, works=True, free_bytes=free, reason="")
        except Exception as error:
            tell("card", **card, works=False, free_bytes=None, reason=str(error)[:500])


def bitsandbytes_part() -> None:
    tell("bitsandbytes begins")
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib

        error = str(getattr(lib, "error_msg", ""))[:500]
        on_cuda = bool(getattr(lib, "compiled_with_cuda", False))
        tell("bitsandbytes", version=str(bitsandbytes.__version__), cuda=on_cuda, reason=error)
    except Exception as error:
        tell("bitsandbytes", version="", cuda=False, reason=f"{type(error).__name__}: {error}"[:500])


def main() -> None:
    try:
        torch_part()
    except Exception as error:
        tell("failed", reason=f"{type(error).__name__}: {error}"[:500])
        sys.exit(1)
    bitsandbytes_part()


if __name__ == "__main__":
    main()
