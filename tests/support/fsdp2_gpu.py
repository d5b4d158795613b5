"""FSDP2 by Accelerate on GPUs: `torchrun --nproc-per-node N -m tests.support.fsdp2_gpu`.

Trains whole, with DDP where there are several ranks, and sharded, without noise and with the same draws, and prints how far
the parameters are apart.
"""

from __future__ import annotations

import sys
import tempfile

from dp_flash_hf.distributed import Ranks
from tests.end_to_end.test_accelerate_fsdp2 import VARIANTS, trained


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for lora in (False, True):
            wanted = trained(f"{folder}/whole {lora}", lora, on_cpu=False)
            for variant, settings in VARIANTS.items():
                found = trained(f"{folder}/{variant} {lora}", lora, settings, on_cpu=False)
                apart = max(float((found[key] - wanted[key]).abs().max()) for key in wanted)
                if Ranks().first:
                    print(f"{variant}, {'LoRA' if lora else 'full'}: {apart:.2e}", flush=True)
                if apart > 1e-4:  # float32 products of three steps, in another order
                    sys.exit(f"{variant}: parameters are {apart} apart")


if __name__ == "__main__":
    main()
