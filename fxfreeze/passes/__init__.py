"""One rewrite a file, in the order in which they run, for each backend."""

from fxfreeze.passes.affine_prologue import affine_prologue
from fxfreeze.passes.dense_buffer import dense_buffer
from fxfreeze.passes.fold_batchnorm import fold_batchnorm
from fxfreeze.passes.in_place import in_place
from fxfreeze.passes.library import library
from fxfreeze.passes.lower import lower
from fxfreeze.passes.pool_first import pool_first
from fxfreeze.passes.prepare_weights import prepare_weights
from fxfreeze.passes.remove_identity import remove_identity
from fxfreeze.passes.residual import residual
from fxfreeze.rewrite import Pass

__all__ = ["PASSES"]

PASSES: dict[str, tuple[Pass, ...]] = {
    "plain": (fold_batchnorm, prepare_weights),
    "library": (fold_batchnorm, remove_identity, residual, library, prepare_weights, in_place),
    "triton": (
        fold_batchnorm,
        remove_identity,
        pool_first,
        dense_buffer,
        residual,
        affine_prologue,
        lower,
        prepare_weights,  # of what has no kernel
    ),
}
