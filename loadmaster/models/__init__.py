"""Models: found, loaded once, given adapters, and run over packed rows."""

import logging

# Libraries announce, at every start, optional kernels that they do without; errors still come through.
for _library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
