"""Learning which channels to keep, and measuring what that does: command lines and what they use."""

import logging

# diffusers imports torchao where it is installed, which says at length what it can't use
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)
