"""One rewrite a file, in the order in which they run."""

from fxfreeze.passes.fold_batchnorm import fold_batchnorm
from fxfreeze.passes.prepare_weights import prepare_weights
from fxfreeze.rewrite import Pass

__all__ = ["PASSES"]

PASSES: tuple[Pass, ...] = (fold_batchnorm, prepare_weights)
