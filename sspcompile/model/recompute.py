"""stub"""

import contextlib

from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def recomputed(layers):
    originals = [layer.forward for layer in layers]
    try:
        for layer, forward in zip(layers, originals):

            def again(*args, _forward=forward, **options):
                return checkpoint(_forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

            layer.forward = again
        yield
    finally:
        for layer, forward in zip(layers, originals):
            layer.forward = forward
